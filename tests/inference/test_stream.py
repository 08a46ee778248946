"""Streams give generate's tokens one by one, and text that never has to be taken back."""

import pytest
from plain_loop import Letters, make_model

from phiforge.inference.engine import Engine
from phiforge.inference.interface import Request


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(make_model(), Letters())


@pytest.mark.parametrize("stop", [(), ("e",), ("zz", "\x00")])
def test_a_stream_is_generate_one_token_at_a_time(engine, stop):
    for index in range(6):
        settings = {"max_tokens": 30, "stop": stop, "logprobs": True, "seed": 4}
        stream = engine.submit(Request(prompt="abc", index=index, **settings))
        received = list(stream)
        expected = engine.generate(["abc"], first_index=index, **settings)[0][0]
        assert stream.completion == expected
        assert tuple(token.token_id for token in received) == expected.token_ids
        assert tuple(token.logprob for token in received) == expected.logprobs
        assert "".join(token.text for token in received) == expected.text


def test_text_waits_for_whole_characters(engine):
    for index in range(20):
        received = list(engine.submit(Request(prompt="abc", index=index, max_tokens=12)))
        joined = ""
        for token in received[:-1]:
            joined += token.text
            assert not joined.endswith("\ufffd")


def test_cancel_ends_the_stream_and_keeps_what_came(engine):
    whole = engine.generate(["abc"], max_tokens=50)[0][0]
    stream = engine.submit(Request(prompt="abc", max_tokens=50))
    first = [next(stream) for _ in range(3)]
    stream.cancel()
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.token_ids == whole.token_ids[:3]
    assert [token.token_id for token in first] == list(whole.token_ids[:3])
    stream.cancel()


def test_cancel_before_the_first_token(engine):
    stream = engine.submit(Request(prompt="abc"))
    stream.cancel()
    assert list(stream) == []
    assert stream.completion.token_ids == ()


def test_streams_and_calls_may_interleave(engine):
    requests = [Request(prompt=prompt, max_tokens=15) for prompt in ("abc", "de")]
    expected = [engine.generate([r.prompt], max_tokens=15)[0][0].token_ids for r in requests]
    streams = [engine.submit(request) for request in requests]
    received: list[list[int]] = [[], []]
    for _ in range(15):
        for place, stream in enumerate(streams):
            token = next(stream, None)
            received[place] += [token.token_id] if token else []
        engine.generate(["other"], n=2, max_tokens=2)
    assert [tuple(ids) for ids in received] == expected


def test_wrong_requests_are_refused_at_once(engine):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.submit(Request(prompt=""))
    with pytest.raises(ValueError, match="temperature"):
        engine.submit(Request(prompt="a", temperature=-1))
    with pytest.raises(ValueError, match="index"):
        engine.submit(Request(prompt="a", index=-1))
