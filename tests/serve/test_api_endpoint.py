"""Our client and our server against each other: the engine's own answers come through both."""

import pytest
from served import NAME, SlowEngine, make_model, make_tokenizer, running

from phiforge.inference.endpoint import Endpoint
from phiforge.inference.endpoint.calls import sample_seed
from phiforge.inference.engine import Engine

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
