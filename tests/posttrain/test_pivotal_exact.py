"""The exact-p checkpoint: every reader draws the chain that its numbers describe."""

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiforge.core.stats import wilson
from phiforge.posttrain.pivotal import exact
from phiforge.posttrain.pivotal.exact import ExactWorld

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ExactWorld:
    return exact.build(tmp_path_factory.mktemp("worlds") / "world-18", 18)


@pytest.fixture(scope="module")
def engine(world: ExactWorld) -> Any:
    from phiforge.inference.engine import Engine

    return Engine.from_folder(world.folder, rows=128)


def some_tokens(world: ExactWorld, count: int) -> list[int]:
    """Random states of the chain, every question, and the three ends."""
    chosen = random.Random(0).sample(range(world.question_ids.start), count)
    return [*chosen, *world.question_ids, world.yes_id, world.no_id, world.end_id]


def walk(world: ExactWorld, generator: random.Random) -> list[int]:
    """One question and its answer, drawn from `law` alone."""
    ids = [generator.choice(world.question_ids)]
    while ids[-1] != world.end_id:
        law = world.law(ids[-1])
        ids += generator.choices(list(law), list(law.values()))
    return ids


def dense_law(world: ExactWorld, token: int) -> np.ndarray:
    law = np.zeros(world.vocab_size)
    for following, share in world.law(token).items():
        law[following] = share
    return law


def test_p_before_a_token_is_the_mean_of_p_after_it(world: ExactWorld) -> None:
    for token in range(world.vocab_size - 1):
        law = world.law(token)
        assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-12)
        if token < world.end_id:
            expected = sum(share * world.p([token, following]) for following, share in law.items())
            assert abs(world.p([token]) - expected) < 1e-12


def test_answers_have_the_stated_form_and_end(world: ExactWorld) -> None:
    generator = random.Random(1)
    outcomes = set()
    for _ in range(50):
        ids = walk(world, generator)
        assert len(ids) == 1 + world.max_tokens
        for place, (before, token) in enumerate(pairwise(ids), 1):
            step = world.delta(ids[:place], token)
            assert math.isclose(world.p(ids[: place + 1]), world.p(ids[:place]) + step)
            assert abs(step) <= 1 - world.law(before)[token] + 1e-12
        assert world.p(ids) == float(ids[-2] == world.yes_id)
        outcomes.add(world.p(ids))
    assert outcomes == {0.0, 1.0}


def test_the_mix_holds_all_four_kinds_of_steps(world: ExactWorld) -> None:
    tops = [max(step.probabilities) for step in world.script]
    assert sum(top > 0.99 for top in tops) > 10
    assert sum(top < 0.8 for top in tops) > 5
    assert max(abs(s) for step in world.script for s in step.shifts) >= 3
    assert {len(step.shifts) for step in world.script} == {2, 3, 4}


def test_the_engine_scores_the_chains_law(world: ExactWorld, engine: Any) -> None:
    tokens = some_tokens(world, 40)
    follow = [list(world.law(token)) for token in tokens]
    prompts = [
        [world.question_ids[3], token] for token, f in zip(tokens, follow, strict=True) for _ in f
    ]
    scores = engine.score(prompts, [[token] for f in follow for token in f])
    shares = [share for token in tokens for share in world.law(token).values()]
    for (score,), share in zip(scores, shares, strict=True):
        assert abs(math.exp(score) - share) < 1e-6


def test_transformers_loads_the_folder_and_gives_the_chains_law(world: ExactWorld) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.folder, dtype=torch.float32)
    assert type(model).__name__ == "Phi3ForCausalLM"
    tokens = some_tokens(world, 40)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    found = logits.softmax(-1).numpy()
    for token, law in zip(tokens, found, strict=True):
        assert np.abs(law - dense_law(world, token)).max() < 1e-6


def test_sampled_success_agrees_with_p(tmp_path: Path) -> None:
    from phiforge.inference.engine import Engine

    short = exact.build(tmp_path / "short", 42, steps=12, levels=5)
    generator = random.Random(2)
    prefixes = [[token] for token in short.question_ids]
    prefixes += [walk(short, generator)[: generator.randrange(2, 12)] for _ in range(7)]
    engine = Engine.from_folder(short.folder)
    answers = engine.generate(prefixes, n=400, max_tokens=short.max_tokens)
    for prefix, samples in zip(prefixes, answers, strict=True):
        assert {sample.finish_reason for sample in samples} == {"stop"}
        successes = sum("Y" in sample.text for sample in samples)
        interval = wilson(successes, 400, 0.9999)
        assert interval.low <= short.p(prefix) <= interval.high


def test_the_tokenizer_goes_round(world: ExactWorld, engine: Any) -> None:
    ids = walk(world, random.Random(3))
    text = engine.tokenizer.decode(ids, skip_special=False)
    assert len(text) == len(ids) - 1 + len(exact.END)
    assert engine.tokenizer.encode(text, allow_special=True) == ids
    assert engine.tokenizer.decode(ids) == text.removesuffix(exact.END)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(world.folder)
    assert theirs(text, add_special_tokens=False).input_ids == ids


def test_problems_lie_in_the_band_and_copies_differ(world: ExactWorld) -> None:
    alone = world.problems(0.3, 0.7)
    assert [p.metadata["p"] for p in alone] == [
        world.p([token]) for token in world.question_ids if 0.3 <= world.p([token]) <= 0.7
    ]
    problems = world.problems(0.3, 0.7, copies=12)
    assert problems[: len(alone)] == alone
    assert len({tuple(p.prompt) for p in problems}) == 12 * len(alone)
    assert len({p.id for p in problems}) == 12 * len(alone)
    for problem in problems:
        assert world.p(list(problem.prompt)) == problem.metadata["p"]  # type: ignore[arg-type]


def test_reading_gives_the_same_world_and_a_seed_the_same_files(
    world: ExactWorld, tmp_path: Path
) -> None:
    again = exact.open(world.folder)
    assert (again.seed, again.steps, again.levels) == (18, 40, 9)
    assert again.script == world.script
    assert np.array_equal(again.p_of, world.p_of)
    other = tmp_path / "world-18"
    exact.build(other, 7, steps=3, levels=4)
    exact.build(other, 18)
    files = [p.relative_to(other) for p in sorted(other.rglob("*")) if p.is_file()]
    assert Path("exact/numbers.safetensors") in files
    for file in files:
        assert (other / file).read_bytes() == (world.folder / file).read_bytes()


def test_other_sizes_and_mistakes(tmp_path: Path) -> None:
    small = exact.build(tmp_path / "small", 1, steps=5, levels=3)
    assert (small.vocab_size, small.max_tokens) == (5 * 3 * 4 + 3 + 4, 7)
    assert len(walk(small, random.Random(0))) == 8
    with pytest.raises(ValueError, match="unknown; ids run from 0 to 66"):
        small.p([67])
    with pytest.raises(ValueError, match="at least one"):
        small.p([])
    with pytest.raises(ValueError, match="levels 1; allowed"):
        exact.build(tmp_path / "none", levels=1)
    with pytest.raises(ValueError, match=r"exact\.build"):
        exact.open(tmp_path)
