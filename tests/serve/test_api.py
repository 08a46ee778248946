"""The API as the `openai` package sees it, and its answers as the engine gives them."""

import math

import openai
import pytest
from served import CONTEXT, NAME, make_model, make_tokenizer, running

from phiforge.inference.engine import Engine

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a few words"}]
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
)


@pytest.fixture(scope="module")
def served():
    tokenizer = make_tokenizer()
    with running(Engine(make_model(tokenizer), tokenizer, rows=8)) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served.client


def ask(client, prompt="a few words", **settings):
    own = {name: settings.pop(name) for name in ("top_k", "min_p") if name in settings}
    own["return_token_ids"] = True
    return client.completions.create(model=NAME, prompt=prompt, extra_body=own, **settings)


# ---------------------------------------------------------------------------------- the models


def test_models(client):
    models = list(client.models.list())
    assert [model.id for model in models] == [NAME]
    assert models[0].owned_by == "phiforge"
    assert models[0].max_model_len == CONTEXT
    assert client.models.retrieve(NAME) == models[0]
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'tiny'"):
        client.models.retrieve("other")


# ------------------------------------------------------------------------- the engine's answers


@pytest.mark.parametrize("settings", SETTINGS)
def test_completions_are_the_engines(served, client, settings):
    answer = ask(client, n=3, seed=7, max_tokens=20, logprobs=0, **settings)
    expected = served.engine.generate(
        ["a few words"], n=3, seed=7, max_tokens=20, logprobs=True, **settings
    )[0]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, wanted in zip(answer.choices, expected, strict=True):
        assert choice.text == wanted.text
        assert tuple(choice.token_ids) == wanted.token_ids
        assert tuple(choice.logprobs.token_logprobs) == wanted.logprobs
        assert choice.finish_reason == wanted.finish_reason
        assert choice.logprobs.top_logprobs is None
    prompt_ids = served.engine.tokenizer.encode("a few words")
    assert answer.choices[0].prompt_token_ids == prompt_ids
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == sum(len(wanted.token_ids) for wanted in expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")


@pytest.mark.parametrize("settings", SETTINGS)
def test_chats_are_the_engines(served, client, settings):
    settings = dict(settings)
    own = {name: settings.pop(name) for name in ("top_k", "min_p") if name in settings}
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, n=2, seed=1, max_tokens=20, extra_body=own, **settings
    )
    expected = served.engine.generate([CHAT], n=2, seed=1, max_tokens=20, **settings, **own)[0]
    assert [choice.message.content for choice in answer.choices] == [w.text for w in expected]
    assert [choice.finish_reason for choice in answer.choices] == [
        wanted.finish_reason for wanted in expected
    ]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.usage.prompt_tokens == len(
        served.engine.tokenizer.encode_chat(CHAT, add_generation_prompt=True)
    )
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint.startswith("fp_")


def test_prompts_may_be_texts_or_ids_one_or_many(served, client):
    texts = ["a few words", "to learn"]
    ids = [served.engine.tokenizer.encode(text) for text in texts]
    expected = served.engine.generate(texts, n=2, seed=3, max_tokens=6)
    wanted = [completion.token_ids for each in expected for completion in each]
    for prompt in (texts, ids):
        answer = ask(client, prompt=prompt, n=2, seed=3, max_tokens=6)
        assert [tuple(choice.token_ids) for choice in answer.choices] == wanted
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    for prompt in (texts[0], ids[0], [texts[0]], [ids[0]]):
        answer = ask(client, prompt=prompt, n=2, seed=3, max_tokens=6)
        assert [tuple(choice.token_ids) for choice in answer.choices] == wanted[:2]


def test_without_a_seed_answers_differ(client):
    assert ask(client, max_tokens=30).choices[0].text != ask(client, max_tokens=30).choices[0].text


def test_stop_strings(served, client):
    choice = ask(client, seed=2, max_tokens=40, logprobs=0).choices[0]
    whole = choice.text
    words = [name for name in choice.logprobs.tokens if name.isalnum() and len(name) > 1]
    stop = min(words, key=whole.index)
    for given in (stop, [stop, "never"]):
        choice = ask(client, seed=2, max_tokens=40, stop=given).choices[0]
        expected = served.engine.generate(["a few words"], seed=2, max_tokens=40, stop=[stop])[0][0]
        assert choice.text == expected.text == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"
    chat = client.chat.completions.create(
        model=NAME, messages=CHAT, seed=2, max_tokens=40, stop=stop
    )
    assert stop not in chat.choices[0].message.content


def test_lengths(served, client):
    assert len(ask(client, seed=1).choices[0].token_ids) <= 16, "OpenAI's default"
    ids = [5] * (CONTEXT - 3)
    choice = ask(client, prompt=ids, seed=1, max_tokens=50).choices[0]
    assert choice.token_ids == list(
        served.engine.generate([ids], seed=1, max_tokens=50)[0][0].token_ids
    )
    assert len(choice.token_ids) <= 3
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=NAME, messages=CHAT, seed=1, temperature=0, **{name: 2}
        )
        assert answer.usage.completion_tokens <= 2


# ----------------------------------------------------------------------------- log-probabilities


def test_echo_scores_the_prompt_as_the_engine_does(served, client):
    ids = served.engine.tokenizer.encode("a few words to learn")
    expected = served.engine.score([ids[:1]], [ids[1:]])[0]
    for prompt in ("a few words to learn", ids):
        answer = ask(client, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        choice = answer.choices[0]
        assert choice.text == "a few words to learn"
        assert choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs == [None, *expected]
        assert "".join(choice.logprobs.tokens) == choice.text
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert choice.text[offset : offset + len(token)] == token
        assert answer.usage.completion_tokens == 0


def test_echo_then_an_answer(served, client):
    """How lm-evaluation-harness asks: the prompt's scores, and one token more."""
    prompts = ["a few words", "to learn from"]
    answer = ask(client, prompts, max_tokens=3, echo=True, logprobs=2, seed=4, n=2)
    drawn = served.engine.generate(prompts, n=2, max_tokens=3, seed=4, logprobs=True)
    for place, choice in enumerate(answer.choices):
        prompt, wanted = prompts[place // 2], drawn[place // 2][place % 2]
        ids = served.engine.tokenizer.encode(prompt)
        assert choice.text == prompt + wanted.text
        scores = served.engine.score([ids[:1]], [ids[1:]])[0]
        assert choice.logprobs.token_logprobs == [None, *scores, *wanted.logprobs]
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.text_offset[len(ids)] == len(prompt)


def test_echo_without_logprobs(served, client):
    choice = ask(client, max_tokens=2, echo=True, seed=0).choices[0]
    expected = served.engine.generate(["a few words"], max_tokens=2)[0][0]
    assert choice.text == "a few words" + expected.text
    assert choice.logprobs is None


def test_top_logprobs_hold_the_likeliest_tokens(served, client):
    choice = ask(client, temperature=0, max_tokens=8, logprobs=3).choices[0]
    for chosen, top in zip(
        choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 4
        assert max(top.values()) == chosen, "greedy: no token is likelier"
        assert sum(math.exp(value) for value in top.values()) <= 1.0001


def test_chat_logprobs(served, client):
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, seed=5, max_tokens=12, logprobs=True, top_logprobs=2
    )
    expected = served.engine.generate([CHAT], seed=5, max_tokens=12, logprobs=True)[0][0]
    content = answer.choices[0].logprobs.content
    assert tuple(entry.logprob for entry in content) == expected.logprobs
    tokenizer = served.engine.tokenizer
    for entry, token_id in zip(content, expected.token_ids, strict=True):
        assert bytes(entry.bytes) == tokenizer.token_bytes(token_id)
        assert len(entry.top_logprobs) == 2
        first, second = (each.logprob for each in entry.top_logprobs)
        assert first >= second
        assert first >= entry.logprob
    plain = client.chat.completions.create(
        model=NAME, messages=CHAT, seed=5, max_tokens=12, logprobs=True
    )
    assert all(entry.top_logprobs == [] for entry in plain.choices[0].logprobs.content)
    without = client.chat.completions.create(model=NAME, messages=CHAT, seed=5, max_tokens=12)
    assert without.choices[0].logprobs is None


# ------------------------------------------------------------------------------------- streaming


def test_streamed_completions_are_the_whole_ones(client):
    settings = {"n": 3, "seed": 9, "max_tokens": 25, "logprobs": 2}
    whole = ask(client, **settings)
    texts, logprobs = [""] * 3, [[], [], []]
    offsets, tokens, ids, reasons = [[], [], []], [[], [], []], [[], [], []], [None] * 3
    usage = None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **settings):
        assert usage is None, "usage is the last chunk"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                logprobs[choice.index] += choice.logprobs.token_logprobs
                offsets[choice.index] += choice.logprobs.text_offset
                tokens[choice.index] += choice.logprobs.tokens
            ids[choice.index] += getattr(choice, "token_ids", None) or []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert ids == [choice.token_ids for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_streamed_chats_are_the_whole_ones(client):
    settings = {"model": NAME, "messages": CHAT, "n": 2, "seed": 9, "max_tokens": 25}
    settings |= {"logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**settings)
    texts, reasons, contents = ["", ""], [None, None], [[], []]
    roles = []
    for chunk in client.chat.completions.create(stream=True, **settings):
        assert chunk.object == "chat.completion.chunk"
        assert chunk.usage is None
        (choice,) = chunk.choices
        if choice.delta.role:
            roles.append((choice.index, choice.delta.role))
        texts[choice.index] += choice.delta.content or ""
        contents[choice.index] += choice.logprobs.content if choice.logprobs else []
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert roles == [(0, "assistant"), (1, "assistant")]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert contents == [choice.logprobs.content for choice in whole.choices]


def test_a_streamed_echo_comes_first(served, client):
    chunks = list(ask(client, echo=True, logprobs=1, max_tokens=4, seed=1, stream=True))
    whole = ask(client, echo=True, logprobs=1, max_tokens=4, seed=1).choices[0]
    assert chunks[0].choices[0].text == "a few words"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    together = [value for each in logprobs if each for value in each.token_logprobs]
    assert together == whole.logprobs.token_logprobs
    scored = list(ask(client, echo=True, logprobs=1, max_tokens=0, stream=True))
    assert [chunk.choices[0].finish_reason for chunk in scored] == [None, "length"]


# ------------------------------------------------------------------------------------ tokenizing


def test_tokenize(served):
    tokenizer = served.engine.tokenizer
    found = served.post("/tokenize", {"prompt": "a few words", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("a few words")
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == CONTEXT
    assert "".join(found["token_strs"]) == "a few words"
    found = served.post("/tokenize", {"messages": CHAT}).json()
    assert found["tokens"] == tokenizer.encode_chat(CHAT, add_generation_prompt=True)
    body = {"messages": CHAT, "add_generation_prompt": False}
    assert served.post("/tokenize", body).json()["tokens"] == tokenizer.encode_chat(CHAT)
