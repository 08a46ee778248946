"""The endpoint client as a Generator: what it sends, what it keeps, what it replays."""

import asyncio
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stub_server import React, Request, StubServer, status

from phiforge.inference.endpoint import (
    Answer,
    AnswersFailed,
    Call,
    Endpoint,
    EndpointConfig,
    Failure,
    Prices,
)
from phiforge.inference.endpoint.calls import sample_seed
from phiforge.inference.endpoint.job import prefix_order
from phiforge.inference.interface import Completion, Generator, Sampling


class Letters:
    """A tokenizer of characters, with a chat format."""

    stop_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages, add_generation_prompt=False) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def decode(self, ids, skip_special=True) -> str:
        return "".join(map(chr, ids))

    def token_bytes(self, index: int) -> bytes:
        return chr(index).encode()


@pytest.fixture
def server():
    with StubServer() as found:
        yield found


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache.sqlite"


def texts(results) -> list[list[str]]:
    return [[answer.text for answer in row] for row in results]


# --------------------------------------------------------------------------------- generating


def test_generate_gives_the_samples_in_the_callers_order(server):
    with Endpoint(server.url, "m", tokenizer=Letters()) as endpoint:
        generator: Generator = endpoint
        counted = []
        found = generator.generate(
            ["b", "a", "b"], n=2, max_tokens=8, seed=3, progress=counted.append
        )
    other = sample_seed(3, 1)
    assert texts(found)[:2] == [
        ["echo: b #3+0", f"echo: b #{other}+0"],
        ["echo: a #3+0", f"echo: a #{other}+0"],
    ]
    assert found[2] == found[0]
    assert len(server.requests) == 4, "a prompt given twice is asked once"
    assert sum(counted) == 6
    first = found[0][0]
    assert first == Completion(first.text, tuple(Letters().encode(first.text)), None, "stop")


def test_what_is_sent(server):
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "stop": ["x"]}
    with Endpoint(server.url, "m", extra_body={"guided": 1}) as endpoint:
        endpoint.generate(["text"], max_tokens=8)
        endpoint.generate([[5, 6]], max_tokens=8, logprobs=True, first_index=2, **settings)
        endpoint.generate([[{"role": "user", "content": "hi"}]], max_tokens=8, logprobs=True)
        endpoint.chat(["hi"])
        endpoint.complete(["hi"])
    plain, full, chat, via_chat, via_completions = server.requests
    common = {"model": "m", "max_tokens": 8, "temperature": 1.0, "guided": 1}
    assert plain.path == "/v1/completions"
    assert plain.body == {**common, "prompt": "text", "seed": 0}
    assert full.body == {
        **common,
        **settings,
        "prompt": [5, 6],
        "logprobs": 1,
        "seed": sample_seed(0, 2),
    }
    assert chat.path == "/v1/chat/completions"
    assert chat.body["logprobs"] is True
    assert via_chat.body["messages"] == [{"role": "user", "content": "hi"}]
    assert via_completions.body["prompt"] == "hi"


def test_chat_false_renders_messages_and_chat_true_wraps_text(server):
    messages = [{"role": "user", "content": "hi"}]
    with Endpoint(server.url, "m", chat=False, tokenizer=Letters()) as endpoint:
        endpoint.generate([messages])
    with Endpoint(server.url, "m", chat=True) as endpoint:
        endpoint.generate(["hi"])
        with pytest.raises(ValueError, match="call 0: token ids cannot go through"):
            endpoint.generate([[1, 2]])
    with (
        Endpoint(server.url, "m", chat=False) as endpoint,
        pytest.raises(ValueError, match="need a tokenizer with a chat template"),
    ):
        endpoint.generate([messages])
    assert server.requests[0].body["prompt"] == Letters().encode("<user>hi")
    assert server.requests[1].body["messages"] == messages
    assert len(server.requests) == 2


def test_token_ids_and_logprobs_come_from_the_server(server):
    with Endpoint(server.url, "m", returns_token_ids=True) as endpoint:
        ((found,),) = endpoint.generate(["a"], logprobs=True)
    assert found.token_ids == (1, 2, 3)
    assert found.logprobs == (-0.5, -0.25)
    assert server.requests[0].body["return_token_ids"] is True


def test_servers_that_refuse_seeds_and_old_field_names(server):
    with Endpoint(
        server.url, "m", sends_seed=False, max_tokens_field="max_completion_tokens"
    ) as endpoint:
        endpoint.chat(["a"])
    assert "seed" not in server.requests[0].body
    assert server.requests[0].body["max_completion_tokens"] == 256
    assert "max_tokens" not in server.requests[0].body


def test_score(server):
    with Endpoint(server.url, "m", tokenizer=Letters()) as endpoint:
        found = endpoint.score([[1, 2], "ab", [3]], [[3, 4], [99], []])
    assert found == [[-0.03, -0.04], [-0.99], []]
    assert server.requests[0].body["echo"] is True


def test_score_is_refused_clearly(server):
    with Endpoint(server.url, "m") as endpoint:
        with pytest.raises(ValueError, match="token ids; give Endpoint a tokenizer"):
            endpoint.score(["text"], [[1]])
        server.script = lambda request: React(kind="raw", body=b'{"choices": [{"text": "x"}]}')
        with pytest.raises(ValueError, match="0 log-probabilities came back for 2 prompt tokens"):
            endpoint.score([[1]], [[2]])
        server.script = lambda request: status(400, "echo is unknown")
        with pytest.raises(ValueError, match=r"echo is unknown.*phiforge serve"):
            endpoint.score([[1]], [[2]])


# ----------------------------------------------------------------------------- replaying


def test_samples_are_cached_one_by_one(server, cache):
    with Endpoint(server.url, "m", cache=cache) as endpoint:
        four = endpoint.generate(["a", "b"], n=4)
        assert len(server.requests) == 8
    with Endpoint(server.url, "m", cache=cache) as endpoint:
        eight = endpoint.generate(["a", "b"], n=8)
        assert len(server.requests) == 16
        assert [row[:4] for row in eight] == four
        assert endpoint.generate(["b"], n=2, first_index=3) == [eight[1][3:5]]
        assert len(server.requests) == 16
        usage = endpoint.usage["teacher"]
    assert (usage.spent.calls, usage.cached) == (16, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"sampling": Sampling(temperature=0.5)},
        {"sampling": Sampling(max_tokens=9)},
        {"sampling": Sampling(stop=("x",))},
        {"template_version": "2"},
        {"via": "chat"},
        {"schema": {"type": "object"}},
        {"first_index": 1},
        {"prompt": "other"},
    ],
)
def test_what_makes_another_answer_makes_another_key(server, cache, change):
    with Endpoint(server.url, "m", cache=cache) as endpoint:
        endpoint.answer([Call(prompt="a")])
        endpoint.answer([Call(**{"prompt": "a", **change})])
        endpoint.answer([Call(prompt="a"), Call(**{"prompt": "a", **change})])
    assert len(server.requests) == 2


def test_the_base_model_is_what_answers_are_kept_under(server, cache):
    with Endpoint(server.url, "deployment-1", base_model="m", cache=cache) as endpoint:
        endpoint.answer([Call(prompt="a")])
    with Endpoint("http://127.0.0.1:9/v1", "m", cache=cache) as endpoint:
        ((found,),) = endpoint.answer([Call(prompt="a")])
    assert isinstance(found, Answer)
    assert server.requests[0].body["model"] == "deployment-1"


def test_the_providers_n(server, cache):
    with Endpoint(server.url, "m", cache=cache, provider_n=True) as endpoint:
        endpoint.generate(["a"], n=2)
        found = endpoint.generate(["a"], n=5)
        usage = endpoint.usage["teacher"].spent
    assert [request.body.get("n") for request in server.requests] == [2, 3]
    assert len(set(texts(found)[0])) == 5
    # The prompt is paid once per call.
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (2, 20, 25)


def test_too_few_choices_are_failures(server):
    server.script = lambda request: React(kind="raw", body=b'{"choices": [{"text": "x"}]}')
    with Endpoint(server.url, "m", provider_n=True) as endpoint:
        ((first, second),) = endpoint.answer([Call(prompt="a", n=2)])
    assert isinstance(first, Answer)
    assert isinstance(second, Failure)
    assert "1 choices for n=2" in second.message


def test_cut_answers_are_failures_unless_allowed(server, cache):
    server.script = lambda request: React(
        finish_reason="content_filter" if request.prompt == "bad" else "length"
    )
    with Endpoint(server.url, "m", cache=cache) as endpoint:
        ((long,), (bad,)) = endpoint.answer([Call(prompt="long"), Call(prompt="bad")])
        assert isinstance(long, Failure)
        assert isinstance(bad, Failure)
        assert (long.kind, bad.kind) == ("length", "content_filter")
        assert "raise max_tokens" in long.message
        assert endpoint.failures == {"content_filter": 1, "length": 1}
        # Failures are not replayed; what is allowed is an answer.
        ((allowed,),) = endpoint.answer([Call(prompt="long", allow=("length",))])
        assert isinstance(allowed, Answer)
        assert endpoint.failures == {"content_filter": 1}
        assert len(server.requests) == 3
        assert endpoint.generate(["long"])[0][0].finish_reason == "length"
        assert len(server.requests) == 3
        with pytest.raises(AnswersFailed, match="1 of 1 samples failed") as stopped:
            endpoint.generate(["bad"])
        assert isinstance(stopped.value.results[0][0], Failure)


def test_usage_is_the_servers_or_estimated(server):
    server.script = lambda request: React(text="12345678", usage=False)
    with (
        Endpoint(server.url, "m") as plain,
        Endpoint(server.url, "m", tokenizer=Letters()) as exact,
    ):
        ((guess,),) = plain.answer([Call(prompt="four" * 3)])
        ((counted,),) = exact.answer([Call(prompt="four" * 3)])
    assert (guess.prompt_tokens, guess.completion_tokens, guess.estimated) == (3, 2, True)
    assert (counted.prompt_tokens, counted.completion_tokens) == (12, 8)


def test_dry_run_prices_without_sending(server, cache):
    prices = Prices(prompt=1.0, completion=10.0)
    call = Call(prompt="x" * 400, n=4, sampling=Sampling(max_tokens=100))
    with Endpoint(server.url, "m", cache=cache, prices=prices) as endpoint:
        before = endpoint.dry_run([call])
        assert not server.requests
        assert (before.samples, before.cached, before.expected.calls) == (4, 0, 4)
        assert before.expected.prompt_tokens == 400
        assert before.expected.completion_tokens == 200
        assert before.expected.usd == pytest.approx((400 + 2000) / 1e6)
        assert before.worst.completion_tokens == 400
        assert before.worst.prompt_tokens >= 4 * 400
        endpoint.answer([Call(prompt="x" * 400, n=3, sampling=Sampling(max_tokens=100))])
        after = endpoint.dry_run([call, call])
    assert (after.samples, after.cached, after.expected.calls) == (8, 7, 1)
    assert after.expected.completion_tokens == 5, "the mean answer so far"
    assert dict(after.lines())["calls to make"] == "1"


# ----------------------------------------------------------------------------- streaming, order


def test_stream_gives_results_as_they_finish(server):
    server.script = lambda request: React(delay=0.3 if request.prompt == "slow" else 0.0)
    calls = [Call(prompt="slow"), Call(prompt="quick", n=2)]
    with Endpoint(server.url, "m") as endpoint:
        found = [(result.position, result.index) for result in endpoint.stream(calls)]
        assert sorted(found[:2]) == [(1, 0), (1, 1)]
        assert found[2] == (0, 0)
        for _ in endpoint.stream([Call(prompt="quick", seed=1), Call(prompt="slow", seed=1)]):
            break  # leaving early cancels the rest
        assert texts(endpoint.generate(["again"])) == [["echo: again #0+0"]]


def test_async_callers_and_notebooks(server):
    with Endpoint(server.url, "m") as endpoint:

        async def main() -> None:
            found = [result async for result in endpoint.stream_async([Call(prompt="a", n=3)])]
            assert sorted(result.index for result in found) == [0, 1, 2]
            # A notebook has a running loop and calls plain functions.
            assert texts(endpoint.generate(["a"])) == [["echo: a #0+0"]]

        asyncio.run(main())


def test_threads_share_an_endpoint(server, cache):
    with Endpoint(server.url, "m", cache=cache, concurrency=4) as endpoint:
        found = {}

        def work(number: int) -> None:
            found[number] = texts(endpoint.generate([f"{number}-{i}" for i in range(10)]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found[3][9] == ["echo: 3-9 #0+0"]
    assert server.most_in_flight <= 4
    assert len(server.answered) == 40


def test_shared_prefixes_are_sent_close_together():
    heads = ["a" * 200, "b" * 200]
    given = [heads[0] + "1", heads[1] + "1", "short", heads[0] + "2", heads[1] + "2"]
    assert prefix_order(given) == [0, 3, 1, 4, 2]
    generator = random.Random(0)
    deep = [f"{'s' * 130}{'t' * 300 if i % 2 else 'u' * 300}{i}" for i in range(20)]
    order = prefix_order(deep)
    assert order == [*range(0, 20, 2), *range(1, 20, 2)]
    assert prefix_order([str(generator.random()) for _ in range(20)]) == list(range(20))


# ----------------------------------------------------------------------------- access, config


def test_secrets_stay_secret(server, cache, monkeypatch, tmp_path):
    key = "sk-very-secret-key"
    monkeypatch.setenv("THE_KEY", key)
    url = server.url.replace("http://", "http://name:password1@")
    server.script = lambda request: status(401, f"{request.headers} is not a key")
    with Endpoint(
        url,
        "m",
        api_key_env="THE_KEY",
        key_header="api-key",
        headers={"X-Other": "other-secret"},
        query={"api-version": "2024-10-21"},
        cache=cache,
    ) as endpoint:
        ((failure,),) = endpoint.answer([Call(prompt="a")])
        shown = repr(endpoint)
    assert isinstance(failure, Failure)
    assert "check the key (api_key_env)" in failure.message
    assert server.requests[0].headers["api-key"] == key
    assert server.requests[0].path == "/v1/completions?api-version=2024-10-21"
    everything = failure.message + shown + cache.read_bytes().decode("latin-1")
    for secret in (key, "other-secret", "password1"):
        assert secret not in everything
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    server.script = lambda request: React()
    with Endpoint(server.url, "m", api_key_file=file) as endpoint:
        endpoint.answer([Call(prompt="a")])
    assert server.requests[-1].headers["Authorization"] == "Bearer from-a-file"


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with (
        Endpoint(server.url, "m", api_key_env="NO_SUCH_KEY") as endpoint,
        pytest.raises(ValueError, match="environment variable NO_SUCH_KEY"),
    ):
        endpoint.generate(["a"])
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "must be like"),
        ({"base_url": "http://x/v1?key=1"}, "give what follows"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0"),
        ({"max_error_share": 0.0}, "max_error_share is 0"),
        ({"extra_body": {"stream": True}}, "extra_body: stream"),
        ({"api_key_env": "A", "api_key_file": Path("b")}, "both given"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"base_url": "http://127.0.0.1:9/v1", "model": "m", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"first_index": -1}, "first_index is -1"),
        ({"allow": "length"}, "allow is 'length'"),
        ({"via": "http"}, "via is 'http'"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_calls_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Call(prompt="a", **settings)


def test_a_config_opens_an_endpoint(server, cache):
    config = EndpointConfig(
        model="m",
        base_url=server.url,
        cache=cache,
        max_calls=1,
        prices=Prices(prompt=1, completion=2),
        role="judge",
    )
    with config.open() as endpoint:
        endpoint.generate(["a"])
        assert endpoint.usage["judge"].spent.usd == pytest.approx((10 + 2 * 5) / 1e6)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        EndpointConfig.model_validate({"model": "m", "pricse": None})
    assert EndpointConfig.model_validate_json(config.model_dump_json()) == config


def test_import_opens_no_connection_and_no_torch():
    code = "import phiforge.inference.endpoint, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_closed_endpoint_says_so(server):
    endpoint = Endpoint(server.url, "m")
    endpoint.generate(["a"])
    endpoint.close()
    endpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        endpoint.generate(["a"])


@pytest.mark.slow
def test_the_openai_client_reads_the_stub(server):
    """The stub speaks the API as the openai package knows it."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url, api_key="x") as client:
        reply = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], temperature=0
        )
    assert reply.choices[0].message.content == "echo: hi"
    assert isinstance(server.requests[0], Request)
    assert json.loads(json.dumps(server.requests[0].body))["model"] == "m"


# ----------------------------------------------------------------------- forbidden first tokens


def tokens(*ids: int, finish_reason: str = "length") -> React:
    """A reply of one choice with these token ids."""
    choice = {"index": 0, "text": "x" * len(ids), "finish_reason": finish_reason}
    choice |= {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}
    usage = {"prompt_tokens": 3, "completion_tokens": len(ids)}
    return React("raw", body=json.dumps({"choices": [choice], "usage": usage}).encode())


def banning(request: Request) -> React:
    """The first token is the lowest one allowed; 7 8 follow, or nothing after a 3."""
    if "logit_bias" not in request.body:
        return tokens(7, 8, finish_reason="stop")
    banned = {int(token) for token in request.body["logit_bias"]}
    first = next(token for token in range(1, 100) if token not in banned)
    return tokens(first, finish_reason="stop" if first == 3 else "length")


def ids_endpoint(server, **options) -> Endpoint:
    return Endpoint(server.url, "m", tokenizer=Letters(), returns_token_ids=True, **options)


def test_a_forbidden_first_token_is_asked_for_alone():
    counted: list[int] = []
    with StubServer(banning) as server, ids_endpoint(server) as endpoint:
        found = endpoint.generate(
            [[50, 51], [60, 61]],
            max_tokens=5,
            logprobs=True,
            forbidden_first=[[1], [1, 2, 2]],
            progress=counted.append,
        )
    assert [row[0].token_ids for row in found] == [(2, 7, 8), (3,)]
    assert found[0][0].logprobs == (-0.5, -0.5, -0.5)
    assert [row[0].finish_reason for row in found] == ["stop", "stop"]
    assert sum(counted) == 2
    first, second, later = (
        next(r.body for r in server.requests if r.body["prompt"] == prompt)
        for prompt in ([50, 51], [60, 61], [50, 51, 2])
    )
    assert len(server.requests) == 3
    assert (first["logit_bias"], first["max_tokens"]) == ({"1": -100}, 1)
    assert second["logit_bias"] == {"1": -100, "2": -100}
    assert "logit_bias" not in later
    assert later["max_tokens"] == 4
    assert later["seed"] != first["seed"], "the rest must be no sample of prompt and token"


def test_both_parts_are_kept_and_paid_once(cache):
    def ask() -> list[list[Completion]]:
        with StubServer(banning) as server, ids_endpoint(server, cache=cache) as endpoint:
            found = endpoint.generate([[50, 51]], n=2, max_tokens=5, forbidden_first=[[1]])
            asked.append(len(server.requests))
            spent.append(endpoint.usage["teacher"].spent.completion_tokens)
        return found

    asked: list[int] = []
    spent: list[int] = []
    assert ask() == ask()
    assert asked == [4, 0]
    assert spent == [6, 6]


def test_a_server_that_ignores_logit_bias_is_found_out_and_its_answers_forgotten(cache):
    with (
        StubServer(lambda request: tokens(1)) as server,
        ids_endpoint(server, cache=cache) as endpoint,
        pytest.raises(ValueError, match=r"127\.0\.0\.1.*drew token 1.*ignores .*logit_bias"),
    ):
        endpoint.generate([[50, 51]], max_tokens=5, forbidden_first=[[1]])
    with StubServer(banning) as server, ids_endpoint(server, cache=cache) as endpoint:
        found = endpoint.generate([[50, 51]], max_tokens=5, forbidden_first=[[1]])
    assert found[0][0].token_ids == (2, 7, 8)


def test_what_forbidden_first_needs(server):
    with Endpoint(server.url, "m") as endpoint, pytest.raises(ValueError, match="token ids: set"):
        endpoint.generate([[1]], forbidden_first=[[1]])
    with Endpoint(server.url, "m", returns_token_ids=True) as endpoint:
        with pytest.raises(ValueError, match=r"prompts\[0\].*give Endpoint a tokenizer"):
            endpoint.generate(["a"], forbidden_first=[[1]])
        with pytest.raises(ValueError, match="1 entries for 2 prompts"):
            endpoint.generate([[1], [2]], forbidden_first=[[1]])
        with pytest.raises(ValueError, match=r"stop is \['x'\]"):
            endpoint.generate([[1]], forbidden_first=[[1]], stop=["x"])
        with pytest.raises(ValueError, match="token id -1 is below 0"):
            endpoint.generate([[1]], forbidden_first=[[-1]])
    banned = {"logit_bias": {"5": -100}}
    with (
        Endpoint(server.url, "m", returns_token_ids=True, extra_body=banned) as endpoint,
        pytest.raises(ValueError, match="extra_body has a logit_bias"),
    ):
        endpoint.generate([[1]], forbidden_first=[[1]])
    assert not server.requests


def test_a_server_without_token_ids_is_refused():
    body = b'{"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}'
    with (
        StubServer(lambda request: React("raw", body=body)) as server,
        ids_endpoint(server) as endpoint,
        pytest.raises(ValueError, match="no token ids"),
    ):
        endpoint.generate([[50]], max_tokens=2, forbidden_first=[[1]])


def test_score_is_at_temperature_one(server):
    with (
        Endpoint(server.url, "m") as endpoint,
        pytest.raises(ValueError, match=r"temperature is 0\.5; .*scores at 1\.0 alone"),
    ):
        endpoint.score([[1]], [[2]], temperature=0.5)
