"""Our client and our server against each other: the engine's own answers come through both."""

import pytest
from served import NAME, SlowEngine, make_model, make_tokenizer, running

from phiforge.inference.endpoint import Endpoint
from phiforge.inference.endpoint.calls import sample_seed
from phiforge.inference.endpoint.first_token import later_seed
from phiforge.inference.engine import Engine
from phiforge.inference.engine.constrain import Constraint
from phiforge.inference.interface import Completion, prompt_token_ids

PROMPTS = ["a few words", [5, 6, 7], [{"role": "user", "content": "to learn"}]]
SETTINGS = {"max_tokens": 20, "logprobs": True, "temperature": 0.8, "top_k": 50}


@pytest.fixture(scope="module")
def served():
    tokenizer = make_tokenizer()
    with running(Engine(make_model(tokenizer), tokenizer, rows=8)) as found:
        yield found


@pytest.fixture
def endpoint(served):
    with Endpoint(
        f"{served.url}/v1", NAME, tokenizer=served.engine.tokenizer, returns_token_ids=True
    ) as found:
        yield found


def test_generate_is_the_engines(served, endpoint):
    found = endpoint.generate(PROMPTS, n=3, seed=5, **SETTINGS)
    for index in range(3):
        expected = served.engine.generate(PROMPTS, seed=sample_seed(5, index), **SETTINGS)
        assert [completions[index] for completions in found] == [each[0] for each in expected]
    assert sample_seed(5, 0) == 5


def test_samples_asked_for_in_one_call_are_the_engines(served):
    with Endpoint(
        f"{served.url}/v1",
        NAME,
        tokenizer=served.engine.tokenizer,
        returns_token_ids=True,
        provider_n=True,
    ) as endpoint:
        found = endpoint.generate(PROMPTS, n=4, seed=5, **SETTINGS)
    assert found == served.engine.generate(PROMPTS, n=4, seed=5, **SETTINGS)


def test_forbidden_tokens_are_drawn_nowhere(served):
    plain = served.engine.generate(["a few words"], temperature=0.0, max_tokens=12)[0][0]
    banned = frozenset(plain.token_ids)
    body = {
        "model": NAME,
        "prompt": "a few words",
        "max_tokens": 12,
        "temperature": 0,
        "return_token_ids": True,
        "logit_bias": {str(token): -100 for token in banned},
    }
    choice = served.post("/v1/completions", body).json()["choices"][0]
    mask = Constraint(banned, allowed=False, first_only=False)
    expected = served.engine.generate(["a few words"], temperature=0.0, max_tokens=12, masks=[mask])
    assert choice["token_ids"] == list(expected[0][0].token_ids)
    assert not banned & set(choice["token_ids"])


def test_a_forbidden_first_token_is_the_engines_and_later_ones_are_free(served, endpoint):
    """Sample i begins as the engine's under the ban, and goes on as the engine's of prompt and
    token, under another seed."""
    engine, prompts = served.engine, [*PROMPTS, [5, 6, 7]]
    likely = [c[0].token_ids[0] for c in engine.generate(prompts, temperature=0.0, max_tokens=1)]
    banned = [{token, 9} for token in likely[:-1]] + [set()]
    counted: list[int] = []
    found = endpoint.generate(
        prompts,
        n=2,
        first_index=3,
        seed=5,
        forbidden_first=banned,
        progress=counted.append,
        **SETTINGS,
    )
    assert sum(counted) == 8
    assert found[-1] == endpoint.generate(prompts[-1:], n=2, first_index=3, seed=5, **SETTINGS)[0]
    more_free = 0
    for prompt, ban, row in zip(prompts[:-1], banned, found, strict=False):
        for index, completion in zip((3, 4), row, strict=True):
            assert completion == two_parts(engine, prompt, ban, 5, index)
            assert completion.token_ids[0] not in ban
            more_free += bool(ban & set(completion.token_ids))
    assert more_free, "later tokens are free"


def two_parts(engine, prompt, ban, seed, index):
    """What the endpoint promises, on the engine."""
    first = engine.generate(
        [prompt],
        seed=sample_seed(seed, index),
        forbidden_first=[ban],
        **{**SETTINGS, "max_tokens": 1},
    )[0][0]
    ids = [*prompt_token_ids(engine.tokenizer, prompt), *first.token_ids]
    later = {**SETTINGS, "max_tokens": SETTINGS["max_tokens"] - 1}
    if first.finish_reason == "stop":
        return first
    rest = engine.generate([ids], seed=sample_seed(later_seed(seed), index), **later)[0][0]
    ids = first.token_ids + rest.token_ids
    assert first.logprobs is not None
    assert rest.logprobs is not None
    ended = rest.finish_reason == "stop"
    text = engine.tokenizer.decode(ids[:-1] if ended else ids)
    return Completion(text, ids, first.logprobs + rest.logprobs, rest.finish_reason)


def test_score_is_the_engines(served, endpoint):
    completions = [[8, 9, 10], [], [11]]
    assert endpoint.score(PROMPTS, completions) == served.engine.score(PROMPTS, completions)


def test_a_client_that_asks_for_too_much_at_once_gets_every_answer(served):
    tokenizer = served.engine.tokenizer
    slow = SlowEngine(served.engine.model, tokenizer, rows=2)
    prompts = [[5 + i, 6] for i in range(10)]
    expected = slow.generate(prompts, max_tokens=4)
    with (
        running(slow, max_queue=2, keys=("secret",)) as busy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TEST_KEY", "secret")
        with Endpoint(
            f"{busy.url}/v1",
            NAME,
            tokenizer=tokenizer,
            returns_token_ids=True,
            api_key_env="TEST_KEY",
            concurrency=10,
        ) as endpoint:
            assert endpoint.generate(prompts, max_tokens=4) == expected
