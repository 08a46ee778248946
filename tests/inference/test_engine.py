"""What the engine promises: the plain loop's tokens whatever the batch, cache or shared prefix."""

import re

import pytest
import torch
from plain_loop import KERNELS, Letters, make_model, plain_generate

from phiforge.inference.engine import Engine, NonFiniteLogits
from phiforge.inference.interface import Request

DTYPES = [torch.float32, torch.bfloat16]
PATH = tuple(range(30, 110))


def engine(dtype=torch.float32, rows=256, **changes) -> Engine:
    names = ("mode", "max_cache_tokens", "kernels", "weights")
    limits = {key: changes.pop(key) for key in names if key in changes}
    return Engine(make_model(dtype, **changes), Letters(), rows=rows, **limits)


def tokens(completions):
    return [[completion.token_ids for completion in of_prompt] for of_prompt in completions]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_and_batched_equal_the_plain_loop(dtype, temperature, kernels):
    prompts = ["one", "the second, longer", PATH[:50], PATH[:51], PATH, (*PATH[:60], 7, 8)]
    mine = engine(dtype, kernels=kernels)
    ids = [tuple(mine.tokenizer.encode(p)) if isinstance(p, str) else p for p in prompts]
    n = 3 if temperature else 1
    settings = {"max_tokens": 20, "temperature": temperature}
    found = mine.generate(prompts, n=n, seed=3, logprobs=True, **settings)
    for prompt, completions in zip(ids, found, strict=True):
        for index, completion in enumerate(completions):
            expected, logprobs = plain_generate(mine, prompt, index, seed=3, **settings)
            assert completion.token_ids == expected
            assert completion.logprobs == logprobs


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_memory_never_change_results(dtype, kernels):
    prompts = [PATH[:i] for i in (3, 33, 64, 65)] + ["shared" * 8 + x for x in "ab"]
    model = make_model(dtype)

    def answers(prompts, **limits):
        mine = Engine(model, Letters(), kernels=kernels, **limits)
        return tokens(mine.generate(prompts, n=3, max_tokens=8))

    reference = answers(prompts)
    for rows, bound in [(1, None), (5, None), (17, 2000), (256, 512), (256, 128)]:
        assert answers(prompts, rows=rows, max_cache_tokens=bound) == reference
    assert answers(prompts[::-1], rows=6)[::-1] == reference


@pytest.mark.parametrize("changes", [{"sliding_window": 24}, {"num_heads": 3, "num_kv_heads": 1}])
def test_other_shapes_equal_the_plain_loop(changes):
    mine = engine(head_dim=16, **changes)
    (found,) = mine.generate([PATH[:45]], n=2, max_tokens=15)
    for index in range(2):
        expected, _ = plain_generate(mine, PATH[:45], index, max_tokens=15)
        assert found[index].token_ids == expected


def test_logits_are_the_models():
    mine = engine(sliding_window=40)
    (found,) = mine.generate([PATH], n=2, max_tokens=20, logprobs=True)
    for completion in found:
        row = torch.tensor([PATH + completion.token_ids])
        logprobs_tv = torch.log_softmax(mine.model(row)[0].double(), -1)
        places = torch.arange(len(PATH) - 1, row.shape[1] - 1)
        expected = logprobs_tv[places, row[0, places + 1]]
        got = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_returns_the_logprobs_of_generate(dtype):
    mine = engine(dtype)
    prompts = [PATH[:20], PATH[:60], PATH[:61], "text"]
    found = mine.generate(prompts, n=3, max_tokens=10, logprobs=True)
    flat = [(p, c) for p, of_prompt in zip(prompts, found, strict=True) for c in of_prompt]
    scores = mine.score([p for p, _ in flat], [c.token_ids for _, c in flat])
    assert scores == [list(c.logprobs) for _, c in flat]
    assert mine.score(["a", "b"], [[], [7]])[0] == []
    assert mine.score([], []) == []


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
def test_score_at_a_temperature_is_the_sampler_s_law(temperature):
    model = engine()
    prompt, answer = [5, 9, 2], [7, 3, 3, 8]
    (scored,) = model.score([prompt], [answer], temperature=temperature)
    logits = model.model(torch.tensor([prompt + answer]))[0, 2:-1].float()
    law = torch.log_softmax(logits / temperature, dim=-1)
    expected = law.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert scored == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="temperature is 0"):
        model.score([prompt], [answer], temperature=0)


def test_counts_lengths_and_first_indices_may_differ_by_prompt():
    model = engine()
    prompts = [[5, 9], [4, 4, 4], [1, 2]]
    together = model.generate(prompts, n=[2, 1, 3], max_tokens=[8, 3, 5], first_index=[0, 7, 2])
    for i, prompt in enumerate(prompts):
        alone = model.generate(
            [prompt], n=[2, 1, 3][i], max_tokens=[8, 3, 5][i], first_index=[0, 7, 2][i]
        )
        assert tokens(together)[i] == tokens(alone)[0]
    with pytest.raises(ValueError, match="n: 2 values for 3 prompts"):
        model.generate(prompts, n=[1, 2])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        model.generate(prompts, max_tokens=[1, 0, 1])


def test_a_forbidden_first_token_is_never_first_and_may_come_later():
    model = engine()
    free = model.generate([[5, 9]], n=64, max_tokens=6)[0]
    common = max((c.token_ids[0] for c in free), key=[c.token_ids[0] for c in free].count)
    barred = model.generate([[5, 9], [5, 9]], n=64, max_tokens=6, forbidden_first=[[common], []])
    assert all(c.token_ids[0] != common for c in barred[0])
    assert tokens([barred[1]]) == tokens([free])
    with pytest.raises(ValueError, match="not both"):
        model.generate([[5]], masks=[None], forbidden_first=[[1]])


def test_first_index_continues_the_samples():
    mine = engine()
    whole = tokens(mine.generate(["abc", "abd"], n=6, max_tokens=8))
    later = tokens(mine.generate(["abc", "abd"], n=2, first_index=4, max_tokens=8))
    assert [row[4:] for row in whole] == later
    assert len(set(whole[0])) == 6
    assert tokens(mine.generate(["abc"], n=6, max_tokens=8, seed=1)) != whole[:1]


def test_equal_prompts_and_greedy_samples_are_computed_once():
    mine = engine()
    found = tokens(mine.generate(["abc", [99, 100, 101], "abc"], n=2, max_tokens=8))
    assert found[0] == found[2]
    before = mine.num_generated_tokens
    greedy = mine.generate(["q"], n=5, max_tokens=8, temperature=0)[0]
    assert len(set(greedy)) == 1
    assert mine.num_generated_tokens - before == len(greedy[0].token_ids)


def test_a_shared_prefix_is_computed_once():
    mine = engine()
    mine.generate([PATH[:i] for i in range(40, 81)], n=3, max_tokens=2)
    assert mine.num_prefilled_tokens == 80
    mine.generate([(*PATH[:64], i) for i in range(10)], n=3, max_tokens=2)
    assert mine.num_prefilled_tokens == 80 + 10
    mine.generate([(*PATH[:64], 7, i) for i in range(10)], n=3, max_tokens=2)
    assert mine.num_prefilled_tokens == 80 + 10 + 10


def test_stop_token_ends_and_stays_in_the_ids_but_not_in_the_text():
    mine = engine()
    found = [c for c in mine.generate(["a"], n=200, max_tokens=100)[0] if c.finish_reason == "stop"]
    assert found
    for completion in found:
        assert completion.token_ids[-1] == 1
        assert 1 not in completion.token_ids[:-1]
        assert completion.text == Letters().decode(completion.token_ids[:-1])


def test_stop_strings_are_looked_for_in_the_text_not_in_special_tokens_names():
    tokenizer = Letters()
    tokenizer.special_ids = frozenset({ord("x") + 2})
    mine = Engine(make_model(), tokenizer)
    abc_with_x = [[ord(letter) + 2 for letter in "axbc"]]
    (named,) = mine.generate(["a"], forced=abc_with_x, max_tokens=4, stop=["x"])[0]
    assert (named.token_ids, named.finish_reason) == (tuple(abc_with_x[0]), "length")
    (spanned,) = mine.generate(["a"], forced=abc_with_x, max_tokens=4, stop=["ab"])[0]
    assert (spanned.token_ids, spanned.finish_reason) == (tuple(abc_with_x[0][:3]), "stop")


def test_stop_strings_cut_the_text_at_their_first_byte():
    mine = engine()
    (free,) = mine.generate(["a"], n=40, max_tokens=40)
    stops = tuple(text for c in free for text in re.findall(r"[!-~]{2}", c.text))[:6] + ("e", "0")
    (found,) = mine.generate(["a"], n=40, max_tokens=40, stop=stops)
    for whole, cut in zip(free, found, strict=True):
        places = [p for stop in stops if (p := whole.text.find(stop)) >= 0]
        assert cut.text == (whole.text[: min(places)] if places else whole.text)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert cut.finish_reason == ("stop" if places else whole.finish_reason)


def test_answers_end_with_the_context():
    mine = engine(max_position_embeddings=64)
    (found,) = mine.generate([PATH[:60]], n=20, max_tokens=50)
    longest = max(len(completion.token_ids) for completion in found)
    assert longest == 4
    assert {c.finish_reason for c in found if len(c.token_ids) == 4 and c.token_ids[-1] != 1} == {
        "length"
    }
    expected, _ = plain_generate(mine, PATH[:60], max_tokens=50)
    assert found[0].token_ids == expected


def test_more_tokens_than_one_block_of_random_numbers():
    mine = engine(max_position_embeddings=192)
    prompt = next(
        (i,)
        for i in range(2, 200)
        if len(mine.generate([(i,)], max_tokens=150)[0][0].token_ids) > 130
    )
    expected, _ = plain_generate(mine, prompt, max_tokens=150)
    assert mine.generate([prompt], max_tokens=150)[0][0].token_ids == expected


def test_progress_counts_completions():
    done = []
    engine(rows=3).generate(["a", "b", "a"], n=4, max_tokens=5, progress=done.append)
    assert sum(done) == 12


def test_a_changed_model_is_noticed():
    mine = engine()
    before = tokens(mine.generate(["abc"], n=4, max_tokens=10))
    with torch.no_grad():
        mine.model.layers[0].mlp.down.weight.mul_(-1)
    after = tokens(mine.generate(["abc"], n=4, max_tokens=10))
    assert before != after
    assert after == tokens(Engine(mine.model, Letters()).generate(["abc"], n=4, max_tokens=10))


def test_fast_mode_says_nearly_the_same():
    exact, fast = engine(), engine(mode="fast")
    answer = exact.generate([PATH[:50]], max_tokens=20)[0][0].token_ids
    a, b = (mine.score([PATH[:50]], [answer])[0] for mine in (exact, fast))
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=1e-4)
    assert len(fast.generate(["abc", "d"], n=3, max_tokens=5)[1]) == 3


def test_damaged_weights_are_reported_and_harm_no_later_call():
    mine = engine()
    good = tokens(mine.generate(["abc"], n=3, max_tokens=6))
    weight = mine.model.layers[1].mlp.down.weight
    saved = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLogits, match=r"prompt 0, sample 5, token 0"):
        mine.generate(["abc"], n=3, first_index=5, max_tokens=6)
    with pytest.raises(NonFiniteLogits, match="completion 0"):
        mine.score(["abc"], [[5, 6]])
    with torch.no_grad():
        weight[0, 0] = saved
    assert tokens(mine.generate(["abc"], n=3, max_tokens=6)) == good


def test_refusals():
    mine = engine()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        mine.generate(["a", ""])
    with pytest.raises(ValueError, match="prompt 0: token id 999"):
        mine.generate([[999]])
    with pytest.raises(ValueError, match="prompt 0 has 192 tokens"):
        mine.generate([[5] * 192])
    with pytest.raises(ValueError, match="n is 0"):
        mine.generate(["a"], n=0)
    with pytest.raises(ValueError, match="first_index is -1"):
        mine.generate(["a"], first_index=-1)
    with pytest.raises(ValueError, match="prompts is one text"):
        mine.generate("a")
    with pytest.raises(ValueError, match="mode is 'quick'"):
        engine(mode="quick")
    with pytest.raises(ValueError, match="rows is 0"):
        engine(rows=0)
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        mine.score(["a", "b"], [[5]])
    with pytest.raises(ValueError, match="completion 0: token id 300"):
        mine.score(["a"], [[300]])
    with pytest.raises(ValueError, match="prompt 0 with its completion has 193"):
        mine.score([[5] * 190], [[5] * 3])
    assert mine.generate([]) == []


def test_a_sample_that_cannot_fit_is_refused():
    mine = engine(max_cache_tokens=130)
    assert mine.generate([PATH], max_tokens=49)
    with pytest.raises(ValueError, match=r"prompt 0, sample 0 needs 129.*holds 128.*max_cache"):
        mine.generate([PATH], max_tokens=50)
    with pytest.raises(ValueError, match="max_cache_tokens"):
        mine.submit(Request(prompt=PATH, max_tokens=100))
    with pytest.raises(ValueError, match="completion 0 needs 180"):
        mine.score([PATH], [[5] * 101])
