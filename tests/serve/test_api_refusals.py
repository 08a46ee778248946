"""What the API refuses: fields, sizes, keys, hosts, other sites' pages; and what it says then."""

import json
from pathlib import Path

import httpx
import openai
import pytest
from served import CONTEXT, NAME, make_model, make_tokenizer, running

from phiforge.inference.engine import Engine
from phiforge.serve.app import MAX_BODY_BYTES
from phiforge.serve.body import ChatBody, CompletionBody, TokenizeBody

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def engine():
    tokenizer = make_tokenizer()
    return Engine(make_model(tokenizer), tokenizer, rows=4)


@pytest.fixture(scope="module")
def served(engine):
    with running(engine, max_queue=12) as found:
        yield found


COMPLETIONS = [  # (fields, param, what the message says)
    ({"prompt": None}, "prompt", "give a text"),
    ({"prompt": ""}, "prompt", "prompt is empty"),
    ({"prompt": []}, "prompt", "give a text"),
    ({"prompt": [[]]}, "prompt", "prompt is empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt[1] is empty"),
    ({"prompt": ["a", [1]]}, "prompt", "give a text"),
    ({"prompt": [1, True]}, "prompt", "give a text"),
    ({"prompt": {"a": 1}}, "prompt", "give a text"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": [9999]}, "prompt", "token id 9999 at place 0 is unknown"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [10**30]}, "prompt", "is unknown"),
    ({"prompt": [5] * CONTEXT}, "prompt", f"has {CONTEXT} tokens; the model's context is"),
    ({"max_tokens": 0}, "max_tokens", "asks for nothing without echo"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5"),
    ({"max_tokens": True}, "max_tokens", "max_tokens is True"),
    ({"temperature": -0.1}, "temperature", "temperature is -0.1"),
    ({"temperature": 1e9}, "temperature", "temperature"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"top_p": 1.1}, "top_p", "top_p is 1.1"),
    ({"top_k": -3}, "top_k", "top_k is -3"),
    ({"min_p": 2}, "min_p", "min_p is 2"),
    ({"n": 0}, "n", "n is 0"),
    ({"n": 129}, "n", "n is 129"),
    ({"n": 17}, "n", "takes 16 at a time"),
    ({"stop": ""}, "stop[0]", "stop[0]"),
    ({"stop": ["a", 1]}, "stop[1]", "stop[1]"),
    ({"stop": ["a"] * 17}, "stop", "stop"),
    ({"stop": ["\udc00"]}, "stop[0]", "surrogate"),
    ({"seed": 0.5}, "seed", "seed is 0.5"),
    ({"seed": 2**70}, "seed", "seed is"),
    ({"logprobs": True}, "logprobs", "logprobs is True"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21"),
    ({"echo": "yes"}, "echo", "echo is 'yes'"),
    ({"stream": 1}, "stream", "stream is 1"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"messages": MESSAGES}, "messages", "unknown field"),
    ({"best_of": 3}, "best_of", "best_of is 3, which this server does not do"),
    ({"suffix": "x"}, "suffix", "suffix"),
    ({"presence_penalty": 0.5}, "presence_penalty", "it takes null or 0"),
    ({"frequency_penalty": -1}, "frequency_penalty", "frequency_penalty is -1"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "token 5 has 1; this server takes -100 alone"),
    ({"logit_bias": {"a": -100}}, "logit_bias", "'a' is no token id"),
    ({"logit_bias": {"5": -100, "1" * 5000: -100}}, "logit_bias", "is no token id"),
    ({"logit_bias": [5]}, "logit_bias", "give an object"),
    ({"logit_bias": {"40000": -100}}, "logit_bias", "token id 40000 at place 0 is unknown"),
    ({"logit_bias": {str(i): -100 for i in range(390)}}, "logit_bias", "forbids every token"),
]
CHATS = [
    ({"messages": []}, "messages", "messages"),
    ({"messages": "hi"}, "messages", "messages is 'hi'"),
    ({"messages": ["hi"]}, "messages[0]", "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is None"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
        "'image_url'; this server takes text alone",
    ),
    ({"messages": [MESSAGES[0] | {"name": "Ann"}]}, "messages[0].name", "does not do"),
    ({"messages": [MESSAGES[0] | {"x": 1}]}, "messages[0].x", "unknown field"),
    ({"messages": [{"role": "user", "content": "words " * 400}]}, "messages", "context is"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "is 0"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "two names of one limit"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ({"logprobs": 2}, "logprobs", "logprobs is 2"),
    ({"tools": [{"type": "function"}]}, "tools", "does not do"),
    ({"logit_bias": {"5": -100}}, "logit_bias", "does not do"),
    ({"response_format": {"type": "json_object"}}, "response_format", "does not do"),
    ({"echo": True}, "echo", "unknown field"),
    ({"prompt": "x"}, "prompt", "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "said"), COMPLETIONS)
def test_a_bad_completion_names_its_field(served, fields, param, said):
    check(served, "/v1/completions", {"model": NAME, "prompt": "a"} | fields, param, said)


@pytest.mark.parametrize(("fields", "param", "said"), CHATS)
def test_a_bad_chat_names_its_field(served, fields, param, said):
    check(
        served, "/v1/chat/completions", {"model": NAME, "messages": MESSAGES} | fields, param, said
    )


def check(served, path, body, param, said):
    for stream in ({}, {"stream": True}) if "stream" not in body else ({},):
        if stream and "stream_options" in body:
            continue
        answer = httpx.post(served.url + path, content=json.dumps(body | stream), timeout=30)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert said in error["message"]
        assert error["code"]
        assert "x-request-id" in answer.headers


def test_fields_that_ask_for_nothing_are_taken(served):
    nothing = {
        "best_of": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "suffix": None,
        "user": "somebody",
        "n": None,
        "stop": None,
        "stream": None,
        "temperature": None,
        "logprobs": None,
    }
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    assert served.post("/v1/completions", body | nothing).status_code == 200
    chat = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False}
    said = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
    }
    body = {"model": NAME, "messages": [*MESSAGES, said, parts], "max_tokens": 1, "seed": 0}
    answer = served.post("/v1/chat/completions", body | chat).json()
    same = [*MESSAGES, {"role": "assistant", "content": "yes"}, *MESSAGES]
    expected = served.post("/v1/chat/completions", body | {"messages": same}).json()
    assert answer["choices"] == expected["choices"]
    assert answer["usage"] == expected["usage"]


def test_a_developer_is_the_system(served):
    first, second = (
        served.post("/tokenize", {"messages": [{"role": role, "content": "x"}, *MESSAGES]}).json()
        for role in ("system", "developer")
    )
    assert first == second


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b'{"a": NaN}'])
def test_a_body_that_is_no_object(served, raw):
    answer = httpx.post(f"{served.url}/v1/completions", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_over_long_prompts_have_their_code(served):
    body = {"model": NAME, "prompt": [5] * 500, "max_tokens": 1}
    error = served.post("/v1/completions", body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "500" in error["message"]
    assert str(CONTEXT) in error["message"]
    body = {"model": NAME, "prompt": [5] * CONTEXT, "max_tokens": 0, "echo": True}
    assert served.post("/v1/completions", body).status_code == 200, "scoring needs no room"


def test_a_huge_body_is_refused(served):
    answer = httpx.post(f"{served.url}/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


def test_unknown_places(served):
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("OPTIONS", "/v1/completions", 405),
    ):
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == "unknown_url"


def test_the_openai_package_gets_its_error_classes(served):
    create = served.client.completions.create
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        create(model=NAME, prompt="a", presence_penalty=1)
    with pytest.raises(openai.BadRequestError, match="unknown field 'guided_json'"):
        create(model=NAME, prompt="a", extra_body={"guided_json": {}})
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_refused_calls_leave_nothing_behind(served):
    assert served.api.loop.num_open == 0


# ------------------------------------------------------------------------------- who may come in


def test_keys(engine):
    with running(engine, keys=("first key", "second")) as served:
        for key, status in (("first key", 200), ("second", 200), ("third", 401)):
            answer = httpx.get(
                f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code == status
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        basic = httpx.get(f"{served.url}/v1/models", headers={"authorization": "Basic second"})
        assert basic.status_code == 401
        assert httpx.get(f"{served.url}/v1/nothing").status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert httpx.get(f"{served.url}/ready").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.client.models.list()


def test_other_sites_pages_are_refused(engine):
    with running(engine, hosts={"127.0.0.1", "localhost"}) as served:
        url, own = f"{served.url}/v1/models", served.url.removeprefix("http://")
        for headers, status in (
            ({"origin": "https://elsewhere.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": served.url}, 200),
            ({"host": "elsewhere.example:8000"}, 403),
            ({"host": "localhost:1"}, 200),
            ({"host": own}, 200),
            ({"host": "[::bad"}, 403),
        ):
            answer = httpx.get(url, headers=headers)
            assert answer.status_code == status, headers
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_request_ids_are_echoed(served):
    url = f"{served.url}/health"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert httpx.get(url, headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    assert httpx.get(url).headers["x-request-id"].startswith("req_")


def test_every_field_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    for cls in (CompletionBody, ChatBody, TokenizeBody):
        missing = [name for name in cls.model_fields if f"`{name}`" not in page]
        assert not missing, f"docs/serve.md lacks {missing} of {cls.__name__}"
