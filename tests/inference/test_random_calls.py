"""Random calls against the plain uncached loop: prompts, lengths, settings, rows, memory, dtype."""

import random

import pytest
import torch
from plain_loop import KERNELS, Letters, make_model, plain_generate

from phiforge.inference.engine import Engine


def random_prompts(draw: random.Random, context: int, vocab_size: int) -> list[tuple[int, ...]]:
    """A few prompts that often extend one another or share a start."""
    lengths = (1, 5, 33, 40, 90)
    paths = [[draw.randrange(2, vocab_size) for _ in range(draw.choice(lengths))] for _ in range(2)]
    prompts = []
    for _ in range(draw.randrange(1, 10)):
        path = draw.choice(paths)
        start = path[: draw.randrange(1, len(path) + 1)]
        own = [draw.randrange(2, vocab_size) for _ in range(draw.choice((0, 0, 1, 7, 40)))]
        prompts.append(tuple(start + own)[: context - 1])
    return prompts


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "trial", [*range(8), *(pytest.param(i, marks=pytest.mark.slow) for i in range(8, 60))]
)
def test_engine_equals_plain_loop(trial, kernels):
    draw = random.Random(trial)
    heads, kv_heads = draw.choice([(4, 2), (4, 4), (3, 1), (8, 2)])
    shape = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": draw.choice([8, 16, 18, 36]),
        "hidden_size": draw.choice([32, 48, 37]),
        "intermediate_size": draw.choice([80, 77]),
        "max_position_embeddings": draw.choice([100, 192, 400]),
        "tie_word_embeddings": draw.random() < 0.5,
        "sliding_window": draw.choice([None, None, 20]),
        "vocab_size": draw.choice([300, 517]),
    }
    model = make_model(draw.choice([torch.float32, torch.bfloat16]), seed=trial, **shape)
    bound = draw.choice([None, 4 * 448, 40 * 448])
    rows = draw.choice([1, 3, 16, 40])
    engine = Engine(model, Letters(), rows=rows, max_cache_tokens=bound, kernels=kernels)
    settings = {
        "max_tokens": draw.choice([1, 8, 30]),
        "temperature": draw.choice([0.0, 1.0, 1.0, 0.7]),
        "top_p": draw.choice([1.0, 1.0, 0.9]),
        "top_k": draw.choice([0, 0, 5]),
        "min_p": draw.choice([0.0, 0.0, 0.05]),
    }
    n, first_index = draw.choice([1, 2, 5]), draw.choice([0, 3])
    prompts = random_prompts(draw, shape["max_position_embeddings"], shape["vocab_size"])
    found = engine.generate(
        prompts, n=n, first_index=first_index, seed=7, logprobs=True, **settings
    )
    for number in draw.sample(range(len(prompts)), min(2, len(prompts))):
        sample = draw.randrange(n)
        expected = plain_generate(engine, prompts[number], first_index + sample, 7, **settings)
        completion = found[number][sample]
        assert (completion.token_ids, completion.logprobs) == expected
    flat = [(p, c) for p, of_prompt in zip(prompts, found, strict=True) for c in of_prompt]
    scores = engine.score([p for p, _ in flat], [c.token_ids for _, c in flat])
    assert scores == [list(c.logprobs) for _, c in flat]
