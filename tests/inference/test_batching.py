"""Sharing, forcing, masking, refusing, failing: what rows of one engine do to each other."""

import threading

import numpy as np
import pytest
import torch
from plain_loop import KERNELS, Letters, make_model, plain_generate

from phiforge.inference.engine import Engine, NonFiniteLogits, allow_only, forbid_first
from phiforge.inference.interface import Request

PATH = tuple(range(30, 140))


def make_engine(kernels: str = "auto", **limits) -> Engine:
    return Engine(make_model(), Letters(), kernels=kernels, **limits)  # type: ignore[arg-type]


def tokens(completions):
    return [[completion.token_ids for completion in samples] for samples in completions]


@pytest.mark.parametrize("kernels", KERNELS)
def test_all_prefixes_of_a_path_cost_the_path(kernels):
    mine = make_engine(kernels)
    prefixes = [PATH[: 4 * k] for k in range(1, 25)]
    first = tokens(mine.generate(prefixes, n=20, max_tokens=4))
    assert mine.num_prefilled_tokens == 96
    assert mine.num_cached_tokens == sum(map(len, prefixes)) * 20 - 96
    again = tokens(mine.generate(prefixes[::-1], n=20, max_tokens=4))
    assert mine.num_prefilled_tokens == 96
    assert again[::-1] == first


def test_prompts_that_part_ways_share_their_start():
    mine = make_engine()
    mine.generate([(*PATH[:70], last) for last in range(10)], max_tokens=1)
    assert mine.num_prefilled_tokens == 71 + 9
    mine.score([PATH[:70]] * 3, [[3, 4], [3, 5], [4, 4]])
    # (path, 3) and (path, 4) are cached since the first call: nothing is left to compute
    assert mine.num_prefilled_tokens == 71 + 9


def test_streams_share_and_a_next_turn_finds_the_last_answer():
    mine = make_engine()
    stream = mine.submit(Request(prompt=PATH, max_tokens=10))
    answer = [token.token_id for token in stream]
    before = mine.num_prefilled_tokens
    list(mine.submit(Request(prompt=(*PATH, *answer, 7, 8), max_tokens=2)))
    assert mine.num_prefilled_tokens - before == 3  # the answer's last token, and what is new


def test_old_prompts_are_evicted_and_computed_again():
    mine = make_engine(max_cache_tokens=192)
    for _ in range(2):
        for start in range(4):
            mine.generate([PATH[start : start + 100]], max_tokens=2)
    assert mine.num_prefilled_tokens == 800


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_are_put_off_when_blocks_run_out(kernels, monkeypatch):
    from phiforge.inference.engine.scheduler import Scheduler

    put_off = []
    original = Scheduler._put_off
    monkeypatch.setattr(Scheduler, "_put_off", lambda s, r: (put_off.append(r), original(s, r)))
    mine = make_engine(kernels, max_cache_tokens=320)
    free = make_engine(kernels)
    prompts = [(token,) for token in range(50, 58)]
    settings = {"max_tokens": 150, "logprobs": True}
    assert mine.generate(prompts, **settings) == free.generate(prompts, **settings)
    assert put_off


@pytest.mark.parametrize("kernels", KERNELS)
def test_long_prompts_in_chunks_are_the_prompt_in_one(kernels, monkeypatch):
    from phiforge.inference.engine import scheduler

    whole = tokens(make_engine(kernels).generate([PATH, PATH[50:]], n=2, max_tokens=9))
    monkeypatch.setitem(scheduler._PASS_TOKENS, "cpu", 1)
    assert tokens(make_engine(kernels).generate([PATH, PATH[50:]], n=2, max_tokens=9)) == whole


def test_forced_tokens_begin_the_answer_and_are_scored():
    mine = make_engine()
    free = mine.generate(["abc"], n=3, max_tokens=12, logprobs=True)[0]
    for index, sample in enumerate(free):
        forced = sample.token_ids[:4]
        (again,) = mine.generate(
            ["abc"], first_index=index, max_tokens=12, logprobs=True, forced=[forced]
        )
        assert again[0] == sample
    expected, _ = plain_generate(mine, (99, 100, 101), forced=(50, 51), max_tokens=12)
    assert mine.generate(["abc"], max_tokens=12, forced=[(50, 51)])[0][0].token_ids == expected


@pytest.mark.parametrize("logprobs", [False, True])
def test_forced_tokens_may_be_the_whole_answer(logprobs):
    mine = make_engine()
    ended, full = mine.generate(
        ["abc", "abc"], max_tokens=2, forced=[(70, 1), (70, 71)], logprobs=logprobs
    )
    assert (ended[0].token_ids, ended[0].finish_reason, ended[0].text) == ((70, 1), "stop", "D")
    assert (full[0].token_ids, full[0].finish_reason) == ((70, 71), "length")
    if logprobs:
        assert [list(c[0].logprobs) for c in (ended, full)] == mine.score(
            ["abc", "abc"], [(70, 1), (70, 71)]
        )
    stream = mine.submit(Request(prompt="abc", max_tokens=2, forced=(70, 71), logprobs=logprobs))
    assert [token.token_id for token in stream] == [70, 71]
    assert stream.completion == full[0]
    cut = mine.generate(["abc"], max_tokens=9, forced=[[70, 71, 72]], stop="DE")[0][0]
    assert (cut.text, cut.token_ids, cut.finish_reason) == ("", (70, 71), "stop")


def test_masks_say_what_may_be_drawn():
    mine = make_engine()
    free = mine.generate(["abc"], n=200, max_tokens=2)[0]
    common = max({c.token_ids[0] for c in free}, key=[c.token_ids[0] for c in free].count)
    found = mine.generate(["abc"], n=200, max_tokens=2, masks=[forbid_first([common])])[0]
    assert common not in {completion.token_ids[0] for completion in found}
    only = mine.generate(["abc"], n=5, max_tokens=30, masks=[allow_only([66, 67])])[0]
    assert {token for completion in only for token in completion.token_ids} == {66, 67}
    seen = []
    mine.generate(["abc"], max_tokens=3, masks=[seen.append], forced=[[60]])
    assert [len(drawn) for drawn in seen] == [1, 2]
    assert seen[0] == (60,)


def test_a_mask_of_no_use_fails_its_own_request_alone():
    mine = make_engine()
    other = mine.submit(Request(prompt="abc", max_tokens=8))
    bad = mine.submit(Request(prompt="abc", mask=lambda drawn: np.zeros(300, bool)))
    odd = mine.submit(Request(prompt="abc", mask=lambda drawn: [True]))
    with pytest.raises(ValueError, match="request 2: its mask forbids every token"):
        list(bad)
    with pytest.raises(ValueError, match=r"request 3: its mask returned bool of shape \[1\]"):
        list(odd)
    assert isinstance(bad.error, ValueError)
    assert bad.done
    assert len(list(other)) > 0
    with pytest.raises(ZeroDivisionError):
        mine.generate(["a", "b"], masks=[lambda drawn: 1 / 0, None])
    assert not mine.step()
    with pytest.raises(ValueError, match="token id 999 is unknown"):
        mine.generate(["a"], masks=[allow_only([999])])


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_damaged_token_fails_its_own_request_alone(kernels):
    whole, model = make_model(), make_model()
    with torch.no_grad():
        model.embedding.weight[250] = torch.nan
    mine = Engine(model, Letters(), kernels=kernels)
    good = [PATH[:70], (*PATH[:70], 9), PATH[:3]]
    reference = tokens(Engine(whole, Letters(), kernels=kernels).generate(good, max_tokens=12))
    streams = [mine.submit(Request(prompt=prompt, max_tokens=12)) for prompt in good]
    bad = mine.submit(Request(prompt=(*PATH[:65], 250), max_tokens=12))
    forced = mine.submit(Request(prompt=PATH[:70], max_tokens=12, forced=(5, 250)))
    found = [[token.token_id for token in stream] for stream in streams]
    for stream in (bad, forced):
        with pytest.raises(NonFiniteLogits, match=r"request \d, token"):
            list(stream)
        assert isinstance(stream.error, NonFiniteLogits)
    assert [tuple(row) for row in found] == [row[0] for row in reference]
    with pytest.raises(NonFiniteLogits, match="prompt 1, sample 0, token 0"):
        mine.generate([PATH[:3], (250, 5)], max_tokens=3)
    assert tokens(mine.generate(good, max_tokens=12)) == reference
    assert not mine.step()


def test_two_threads_iterate_two_streams():
    mine = make_engine()
    requests = [Request(prompt=PATH[:k], max_tokens=40, seed=k) for k in (5, 50, 66, 100)]
    expected = [list(make_engine().submit(request)) for request in requests]
    found: list[list] = [[] for _ in requests]
    streams = [mine.submit(request) for request in requests]

    def read(place: int) -> None:
        found[place] = list(streams[place])

    threads = [threading.Thread(target=read, args=(place,)) for place in range(len(requests))]
    calls = threading.Thread(target=mine.generate, args=([PATH],), kwargs={"max_tokens": 20})
    for thread in [*threads, calls]:
        thread.start()
    for thread in [*threads, calls]:
        thread.join(60)
    assert found == expected


def test_a_stream_is_not_starved_by_a_call_of_another_thread():
    mine = make_engine()
    stream = mine.submit(Request(prompt="abc", max_tokens=30))
    expected = len(mine.generate(["abc"], max_tokens=30)[0][0].token_ids)
    progress = []
    call = threading.Thread(
        target=mine.generate,
        args=([[token] for token in range(2, 250)],),
        kwargs={"max_tokens": 40, "n": 4, "progress": progress.append},
    )
    call.start()
    assert len(list(stream)) == expected
    assert call.is_alive()
    call.join()
    assert sum(progress) == 4 * 248


def test_cancelled_requests_give_their_blocks_back():
    mine = make_engine()
    streams = [mine.submit(Request(prompt=PATH[:60], index=i, max_tokens=90)) for i in range(5)]
    for _ in range(10):
        mine.step()
    for stream in streams:
        assert len(stream.take()) > 0
        stream.cancel()
        assert stream.done
    assert not mine.step()
    pool = mine._scheduler._pool
    assert pool._rows.sum() == 0


def test_an_interrupted_call_leaves_the_others_alone():
    mine = make_engine(rows=2)
    stream = mine.submit(Request(prompt="abc", max_tokens=25))
    expected = tokens(make_engine().generate(["abc"], max_tokens=25))[0][0]

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine.generate(["x"], n=9, max_tokens=3, progress=stop)
    assert tuple(token.token_id for token in stream) == expected
    assert not mine.step()


def test_a_failing_pass_can_be_tried_again(monkeypatch):
    mine = make_engine()
    expected = list(make_engine().submit(Request(prompt=PATH, max_tokens=20)))
    stream = mine.submit(Request(prompt=PATH, max_tokens=20))
    received = [next(stream) for _ in range(5)]
    runner = mine._scheduler.runner
    forward = type(runner).forward

    def fail(self, batch):
        raise MemoryError("no memory")

    monkeypatch.setattr(type(runner), "forward", fail)
    with pytest.raises(MemoryError):
        next(stream)
    monkeypatch.setattr(type(runner), "forward", forward)
    assert received + list(stream) == expected


def test_streams_go_on_with_new_weights():
    mine = make_engine()
    stream = mine.submit(Request(prompt="abc", max_tokens=30))
    first = [next(stream) for _ in range(3)]
    with torch.no_grad():
        mine.model.layers[0].mlp.down.weight.mul_(0.5)
    mine.generate(["x"], max_tokens=1)
    assert len([*first, *stream]) == len(stream.completion.token_ids)


def test_forced_and_masks_are_checked():
    mine = make_engine()
    with pytest.raises(ValueError, match="forced has 1 entries for 2 prompts"):
        mine.generate(["a", "b"], forced=[[5]])
    with pytest.raises(ValueError, match="masks has 3 entries for 1 prompts"):
        mine.generate(["a"], masks=[None, None, None])
    with pytest.raises(ValueError, match=r"prompt 0, sample 0: 3 tokens are forced.* have 2"):
        mine.generate(["a"], max_tokens=2, forced=[[5, 6, 7]])
    with pytest.raises(ValueError, match="request 2: forced: token id 999"):
        mine.submit(Request(prompt="a", forced=[999]))


def test_too_large_a_cache_is_a_clear_error():
    mine = make_engine(max_cache_tokens=10**12)
    with pytest.raises(MemoryError, match=r"GiB on cpu, which are not free.*max_cache_tokens"):
        mine.generate(["a"])


def test_which_kernels_run_is_printed_once(capfd):
    from phiforge.inference.engine import engine

    engine._announce.cache_clear()
    for _ in range(2):
        make_engine("torch").generate(["a"], max_tokens=1)
    assert capfd.readouterr().err == "engine: torch fp32 (kernels='torch')\n"


@pytest.mark.parametrize("weights", [None, "int4"])
def test_a_folder_is_the_model_it_was_saved_from(weights, tmp_path):
    from phiforge.model.huggingface import load, save
    from phiforge.model.phi import Phi
    from phiforge.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a few words to train a tokenizer on"] * 3, vocab_size=400)
    config = make_model().config.replace(vocab_size=tokenizer.vocab_size)
    save(Phi(config).initialize(torch.Generator().manual_seed(0)), tokenizer, tmp_path / "m")
    model, tokenizer = load(tmp_path / "m", dtype="bfloat16", device="cpu")
    settings = {"n": 2, "max_tokens": 8, "logprobs": True}
    whole = Engine(model, tokenizer, weights=weights).generate(["a few"], **settings)
    folder = Engine.from_folder(tmp_path / "m", weights=weights)
    assert folder.generate(["a few"], **settings) == whole
    assert folder.context == 192
    assert (weights or "bf16") in folder.name
