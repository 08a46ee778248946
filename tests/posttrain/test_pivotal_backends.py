"""One search over three backends: our engine, a model of `transformers`, our own server.

Same fp32 weights, same tokens: the sampler is one. Over HTTP each sample has a seed of its own and
a forbidden first token is drawn in a call of its own, so the server is held to our engine asked in
that way.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from phiforge.core.records import Problem
from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal import exact
from phiforge.posttrain.pivotal.exact import ExactWorld

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
for room in ("serve", "inference"):
    sys.path.append(str(Path(__file__).parents[1] / room))

SETTINGS = {"n_filter": 32, "n_rollouts": 24, "paths_per_question": 1, "seed": 3}
METHODS = ("paper", "balanced")


@dataclass
class Case:
    """Weights at rest, and what to ask of them."""

    engine: Any
    folder: Path
    tokenizer: Any
    problems: list[Problem]
    max_tokens: int

    @staticmethod
    def oracle(problem: Problem, response: str) -> bool:
        """Success: the response has the letter in it."""
        return str(problem.answer) in response


def exact_case(folder: Path) -> Case:
    """The checkpoint whose p is known: what follows depends on the last token alone."""
    from phiforge.inference.engine import Engine

    world: ExactWorld = exact.build(folder, 18, steps=12, levels=5)
    engine = Engine.from_folder(folder, rows=128)
    problems = world.problems(0.2, 0.8)[:2]
    assert len(problems) == 2
    return Case(engine, folder, engine.tokenizer, problems, world.max_tokens)


def attentive_case(folder: Path) -> Case:
    """Random weights, where every token counts for what follows."""
    from plain_loop import make_model
    from served import make_tokenizer

    from phiforge.inference.engine import Engine
    from phiforge.model.huggingface import save

    tokenizer = make_tokenizer()
    model = make_model(vocab_size=tokenizer.vocab_size)
    save(model, tokenizer, folder, dtype="float32")
    prompts = ("a few words", "to learn from")
    problems = [Problem(id=text, prompt=text, answer="e") for text in prompts]
    return Case(Engine(model, tokenizer, rows=128), folder, tokenizer, problems, 16)


@pytest.fixture(scope="module", params=[exact_case, attentive_case], ids=["exact", "attentive"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return request.param(tmp_path_factory.mktemp("world") / "model")


@pytest.fixture(scope="module")
def endpoint(case: Case) -> Iterator[Any]:
    """Our client at our server, on the case's weights."""
    from served import NAME, running

    from phiforge.inference.endpoint import Endpoint

    with (
        running(case.engine, max_queue=4096) as served,
        Endpoint(
            f"{served.url}/v1", NAME, tokenizer=case.tokenizer, returns_token_ids=True
        ) as found,
    ):
        yield found


class AsServed:
    """An engine that seeds samples, and draws forbidden first tokens, as the client does."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.num_bans = 0

    def generate(
        self,
        prompts: Any,
        *,
        n: Any,
        max_tokens: Any,
        seed: int,
        first_index: Any,
        forbidden_first: Any = None,
        **settings: Any,
    ) -> Any:
        bans = forbidden_first or [()] * len(prompts)
        each = zip(prompts, n, max_tokens, first_index, bans, strict=True)
        return [
            self.one([prompt], count, seed, first, [ban], max_tokens=length, **settings)[0]
            for prompt, count, length, first, ban in each
        ]

    def one(
        self,
        prompts: Any,
        n: int,
        seed: int,
        first_index: int,
        forbidden_first: Any,
        **settings: Any,
    ) -> Any:
        if not any(forbidden_first):
            return self.seeded(prompts, n, first_index, seed, **settings)
        self.num_bans += len(prompts)
        bans = {"forbidden_first": forbidden_first}
        firsts = self.seeded(prompts, n, first_index, seed, **settings | bans | {"max_tokens": 1})
        return [
            [
                self.continued(prompt, first, first_index + place, seed, settings)
                for place, first in enumerate(row)
            ]
            for prompt, row in zip(prompts, firsts, strict=True)
        ]

    def continued(self, prompt: Any, first: Any, index: int, seed: int, settings: Any) -> Any:
        from phiforge.inference.endpoint.first_token import later_seed

        left = settings["max_tokens"] - 1
        if first.finish_reason == "stop" or not left:
            return first
        ids = [*prompt, *first.token_ids]
        ((rest,),) = self.seeded(
            [ids], 1, index, later_seed(seed), **settings | {"max_tokens": left}
        )
        return replace(rest, token_ids=first.token_ids + rest.token_ids)

    def seeded(self, prompts: Any, n: int, first_index: int, seed: int, **settings: Any) -> Any:
        from phiforge.inference.endpoint.calls import sample_seed

        columns = [
            self.engine.generate(prompts, seed=sample_seed(seed, index), **settings)
            for index in range(first_index, first_index + n)
        ]
        return [[column[place][0] for column in columns] for place in range(len(prompts))]


def found(case: Case, engine: Any, method: str) -> tuple[Any, ...]:
    """Everything a search tells, log-probabilities to four places."""
    search = pivotal.search(
        engine,
        case.problems,
        case.oracle,
        method=method,
        gap=0.15,
        max_tokens=case.max_tokens,
        band=(0.05, 0.95),
        **SETTINGS,
    )
    questions = [
        (
            question.status,
            question.root,
            [(path.token_ids, path.success, path.pivotal) for path in question.paths],
            [[round(x, 4) for x in path.logprobs] for path in question.paths],
            [
                (token.position, token.token_id, token.p_before, token.p_after, token.delta)
                for token in question.tokens
            ],
        )
        for question in search.questions()
    ]
    assert {status for status, *_ in questions} == {"searched"}
    spent = search.num_filter_tokens, search.num_search_tokens, search.num_confirm_tokens
    return questions, spent


@pytest.mark.parametrize("method", METHODS)
def test_a_transformers_model_finds_what_our_engine_finds(case: Case, method: str) -> None:
    from phiforge.inference.transformers import TransformersModel

    theirs = TransformersModel.from_folder(case.folder, dtype="float32", rows=128)
    expected = found(case, case.engine, method)
    assert found(case, theirs, method) == expected
    assert any(tokens for *_, tokens in expected[0]), "there is something to find"


@pytest.mark.parametrize("method", METHODS)
def test_our_server_finds_what_our_engine_finds(case: Case, endpoint: Any, method: str) -> None:
    asked = AsServed(case.engine)
    expected = found(case, asked, method)
    assert found(case, endpoint, method) == expected
    assert (asked.num_bans > 0) == (method != "paper"), "detours forbid the path's own token"
