"""The likeliest tokens beside each one, of drawn and of given tokens; scores beside streams."""

import pytest
import torch
from plain_loop import CONFIG, Letters, make_model

from phiforge.inference.engine import Engine
from phiforge.inference.interface import Request, Sampling


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, Letters())


def expected_top(model, ids, num_top):
    """After each of `ids`, by the model's own forward pass."""
    with torch.inference_mode():
        logprobs_tv = torch.log_softmax(model(torch.tensor([ids]))[0].float(), -1)
    return logprobs_tv.topk(num_top, dim=-1)


def check(top, row, values_tk, ids_tk):
    for place, (found, values, ids) in enumerate(zip(top, values_tk, ids_tk, strict=True)):
        assert [token for token, _ in found] == ids.tolist(), (row, place)
        assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-3)


def test_of_drawn_tokens(engine, model):
    """Rows of one batch ask for different numbers, or none."""
    prompt = [5, 6, 7]
    requests = [
        Request(
            prompt=prompt, index=i, max_tokens=30, logprobs=num is not None, top_logprobs=num or 0
        )
        for i, num in enumerate((3, None, 1, 0, 5))
    ]
    streams = [engine.submit(request) for request in requests]
    received = [list(stream) for stream in streams]
    for request, stream, tokens in zip(requests, streams, received, strict=True):
        completion, num = stream.completion, request.top_logprobs
        plain = engine.generate([prompt], first_index=request.index, max_tokens=30)[0][0]
        assert completion.token_ids == plain.token_ids
        if not num:
            assert completion.top_logprobs is None
            assert all(token.top_logprobs == () for token in tokens)
            continue
        top = completion.top_logprobs
        assert tuple(token.top_logprobs for token in tokens) == top
        row = [*prompt, *completion.token_ids]
        values_tk, ids_tk = expected_top(model, row[:-1], num)
        check(top, row, values_tk[len(prompt) - 1 :], ids_tk[len(prompt) - 1 :])


def test_a_drawn_token_has_one_logprob(engine):
    request = Request(prompt="abc", temperature=0, max_tokens=20, logprobs=True, top_logprobs=2)
    for token in engine.submit(request):
        assert token.top_logprobs[0] == (token.token_id, token.logprob)


def test_of_given_tokens(engine, model):
    prompt, completion = [9], list(range(20, 90))
    stream = engine.submit_score(prompt, completion, top_logprobs=2)
    while not stream.done:
        engine.step()
    found = stream.completion
    assert list(found.logprobs) == engine.score([prompt], [completion])[0]
    row = prompt + completion
    values_tk, ids_tk = expected_top(model, row[:-1], 2)
    check(found.top_logprobs, row, values_tk, ids_tk)
    assert engine.submit_score(prompt, ()).done


def test_of_forced_and_drawn_tokens(engine):
    whole = engine.submit(Request(prompt="ab", max_tokens=12, logprobs=True, top_logprobs=2))
    list(whole)
    ids = whole.completion.token_ids
    half = engine.submit(
        Request(prompt="ab", max_tokens=12, logprobs=True, top_logprobs=2, forced=ids[:5])
    )
    list(half)
    assert half.completion == whole.completion


def test_scores_join_the_rows_under_way(engine):
    """A score needs no step of its own: it is done while a stream goes on."""
    stream = engine.submit(Request(prompt="abc", max_tokens=50, index=1))
    engine.step()
    score = engine.submit_score([5], [6, 7, 8])
    while not score.done:
        engine.step()
    assert not stream.done
    assert list(score.completion.logprobs) == engine.score([[5]], [[6, 7, 8]])[0]
    list(stream)
    expected = engine.generate(["abc"], max_tokens=50, first_index=1)[0][0]
    assert stream.completion == expected


def test_what_is_refused(engine):
    with pytest.raises(ValueError, match=r"top_logprobs is 2, which needs logprobs=True"):
        Sampling(top_logprobs=2)
    with pytest.raises(ValueError, match="top_logprobs is -1"):
        Sampling(top_logprobs=-1, logprobs=True)
    with pytest.raises(ValueError, match="completion 0: token id 9999 at place 1 is unknown"):
        engine.submit_score([5], [6, 9999])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.submit_score([], [6])
    with pytest.raises(ValueError, match="prompt 0 with its completion has"):
        engine.submit_score([5], [6] * CONFIG.max_position_embeddings)


def test_more_alternatives_than_tokens(engine):
    stream = engine.submit(
        Request(prompt="a", max_tokens=1, logprobs=True, top_logprobs=CONFIG.vocab_size + 5)
    )
    (token,) = stream
    assert len(token.top_logprobs) == CONFIG.vocab_size
