"""The search on scripted models whose p(success) is known exactly."""

import random
from collections import Counter
from typing import Any

import pytest
from pivotal_world import (
    CANCEL,
    FORK,
    NO,
    START,
    STOP,
    YES,
    Chain,
    ScriptedEngine,
    ScriptedTokenizer,
    oracle,
    problems,
)

from phiforge.core.records import Problem
from phiforge.posttrain import pivotal
from phiforge.verify.answers import OracleError

EXACT: dict[str, Any] = {"method": "paper", "n_filter": 16, "n_rollouts": 16, "max_tokens": 12}


def search(engine: ScriptedEngine, count: int = 1, **arguments: Any) -> pivotal.Search:
    return pivotal.search(engine, problems(count), oracle, **EXACT | arguments)


def found(tokens: Any) -> set[tuple[tuple[int, ...], int, float]]:
    return {(tuple(t.prefix_token_ids[2:]), t.token_id, round(t.delta, 9)) for t in tokens}


def test_exact_tokens_of_the_forked_chain() -> None:
    engine = ScriptedEngine(FORK, strata=16)
    tokens = list(search(engine, paths_per_question=1, path_choice="natural"))
    assert found(tokens) == {((), 10, 0.25), ((10, 12, 13), YES, 0.25)}
    tokens = list(search(engine, paths_per_question=16))
    assert found(tokens) == {
        ((), 10, 0.25),
        ((), 11, -0.25),
        ((10, 12, 13), YES, 0.25),
        ((10, 12, 13), NO, -0.75),
        ((11, 14), YES, 0.75),
        ((11, 14), NO, -0.25),
    }
    for token in tokens:
        last = token.prefix_token_ids[-1]
        assert token.p_before == FORK.p(last)
        assert token.p_after == FORK.p(token.token_id)
        assert token.interval[0] < token.delta < token.interval[1]
        assert token.prompt_token_ids == [50, START]
        assert token.n_before == 16


def test_every_position_of_a_path_agrees_with_the_chain() -> None:
    run = search(ScriptedEngine(FORK, strata=16), gap=0.01)
    (question,) = run.questions()
    for path in question.paths:
        ids = [START, *path.token_ids]
        for i, estimate in enumerate(path.estimates):
            assert estimate is None or estimate.p == FORK.p(ids[i]) or ids[i] == STOP
        assert path.estimates[-1] is not None
        assert path.estimates[-1].exact


def random_tree(rng: random.Random) -> Chain:
    """Three levels of choices in quarters, so that 64 strata hit every share exactly."""
    law: dict[int, list[tuple[int, float]]] = {}
    names = iter(range(200, 400))

    def grow(token: int, depth: int) -> None:
        shares = rng.choice([[1.0], [0.5, 0.5], [0.75, 0.25], [0.5, 0.25, 0.25]])
        if depth == 2:
            shares = shares[:1] if len(shares) == 1 else [0.75, 0.25]
            law[token] = list(zip(rng.sample([YES, NO], len(shares)), shares, strict=True))
            return
        law[token] = [(next(names), share) for share in shares]
        for following, _ in law[token]:
            grow(following, depth + 1)

    grow(START, 0)
    return Chain(law)


def reference(chain: Chain, path: list[int], logprobs: list[float], gap: float) -> set[int]:
    """Fig. 4 as it is written: recursive, on exact p."""
    p = [chain.p(token) for token in [START, *path]]

    def segments(start: int, stop: int) -> list[tuple[int, int]]:
        if stop - start <= 1 or abs(p[stop] - p[start]) < gap:
            return [(start, stop)]
        half = sum(logprobs[start:stop]) / 2
        cut = start + 1
        while cut < stop - 1 and sum(logprobs[start:cut]) > half:
            cut += 1
        return segments(start, cut) + segments(cut, stop)

    p[-1] = float(YES in path)
    parts = segments(0, len(path))
    return {a for a, b in parts if b - a == 1 and abs(p[b] - p[a]) >= gap}


def test_on_random_trees_it_finds_what_figure_4_finds() -> None:
    rng, compared = random.Random(0), 0
    for _ in range(40):
        chain = random_tree(rng)
        engine = ScriptedEngine(chain, strata=64)
        arguments: dict[str, Any] = {
            "method": "paper",
            "n_filter": 64,
            "n_rollouts": 64,
            "gap": 0.125,
        }
        (question,) = search(engine, paths_per_question=20, **arguments).questions()
        for path in question.paths:
            expected = reference(chain, path.token_ids, path.logprobs, 0.125)
            assert set(path.pivotal) == expected
            compared += len(expected)
    assert compared > 100


def test_two_jumps_that_cancel_are_missed() -> None:
    engine = ScriptedEngine(CANCEL, strata=64)
    run = search(engine, n_filter=64, n_rollouts=64, paths_per_question=64, path_choice="natural")
    (question,) = run.questions()
    path = next(p for p in question.paths if p.token_ids[:3] == [20, 22, YES])
    assert CANCEL.p(20) - CANCEL.p(START) == CANCEL.p(20) - CANCEL.p(22) == 0.25
    assert path.pivotal == [2]
    assert path.estimates[1] is None or path.estimates[1].p == 0.75


def test_each_prefix_is_estimated_once_whatever_the_number_of_paths() -> None:
    engine = ScriptedEngine(FORK)
    list(search(engine, 5, paths_per_question=6, n_rollouts=24))
    assert engine.drawn
    assert max(Counter(engine.drawn).values()) == 1


def test_more_rollouts_than_the_filter_drew_continue_at_the_next_index() -> None:
    engine = ScriptedEngine(FORK, strata=48)
    (question,) = search(engine, n_filter=16, n_rollouts=48, band=(0, 1)).questions()
    root = (50, START)
    assert sorted(i for prompt, i in engine.drawn if prompt == root) == list(range(48))
    places = [(c, c.prompts.index(root)) for c in engine.calls if root in c.prompts]
    asked = [(c.first_index[place], c.n[place]) for c, place in places]
    assert asked == [(0, 16), (16, 32)]
    assert question.root is not None
    assert question.root.n == 48


def test_questions_outside_the_band_cost_their_filter_alone() -> None:
    sure = Chain({START: [(YES, 1.0)]})
    run = search(ScriptedEngine(sure, strata=16), 3)
    assert [q.status for q in run.questions()] == ["above band"] * 3
    assert run.num_search_tokens == 0
    assert run.num_filter_tokens == 3 * 16 * 2


@pytest.mark.parametrize(("share", "status"), [(0.1875, "below band"), (0.25, "searched")])
def test_the_band_is_closed(share: float, status: str) -> None:
    chain = Chain({START: [(YES, share), (NO, 1 - share)]})
    run = search(ScriptedEngine(chain, strata=16), band=(0.25, 0.75))
    assert [q.status for q in run.questions()] == [status]


def test_a_finished_prefix_costs_nothing() -> None:
    engine = ScriptedEngine(FORK)
    run = search(engine, 8, paths_per_question=8, gap=0.01)
    questions = list(run.questions())
    assert all(STOP not in prompt for prompt, _ in engine.drawn)
    for path in (p for q in questions for p in q.paths):
        last = path.estimates[-1]
        assert last is not None
        assert last.exact
        assert last.p == path.success


def test_a_path_cut_by_the_limit_is_finished_and_continuations_stay_within_it() -> None:
    engine = ScriptedEngine(FORK, strata=16)
    run = search(engine, max_tokens=4, gap=0.01)
    (question,) = run.questions()
    assert all(len(path.token_ids) <= 4 for path in question.paths)
    rollouts = question.ledger.rollouts
    assert max(len(prefix) + len(r.token_ids) for prefix in rollouts for r in rollouts[prefix]) == 4
    assert max(max(call.max_tokens) for call in engine.calls) == 4


def test_characters_split_over_tokens_survive() -> None:
    halves = {10: "é".encode()[:1], 12: "é".encode()[1:]}
    engine = ScriptedEngine(FORK, strata=16, tokenizer=ScriptedTokenizer(halves))
    heard: list[str] = []

    def listen(problem: Problem, response: str) -> bool:
        heard.append(response)
        return oracle(problem, response)

    run = pivotal.search(engine, problems(1), listen, **EXACT)
    (question,) = run.questions()
    assert {tuple(t.prefix_token_ids) for t in question.tokens} >= {(50, START)}
    assert any(t.token_id == 10 for t in question.tokens)
    assert {text for text in heard if text.startswith("é")}
    assert not any("\ufffd" in text for text in heard)
    assert all(pair.prompt_token_ids for pair in question.pairs)


def test_the_oracle_sees_path_and_continuation_without_the_prompt() -> None:
    heard: set[str] = set()

    def listen(problem: Problem, response: str) -> bool:
        heard.add(response)
        return oracle(problem, response)

    list(pivotal.search(ScriptedEngine(FORK, strata=16), problems(1), listen, **EXACT))
    assert heard == {"<10><12><13>Y", "<10><12><13>N", "<11><14>Y", "<11><14>N"}


def test_unscored_rollouts_reduce_n_and_are_never_wrong() -> None:
    def moody(problem: Problem, response: str) -> bool:
        if "<11>" in response:
            raise OracleError("no judge")
        return oracle(problem, response)

    run = pivotal.search(ScriptedEngine(FORK, strata=16), problems(1), moody, **EXACT)
    (question,) = run.questions()
    assert question.root == pivotal.Estimate(8, 6)
    assert run.num_unscored == 8


def test_a_question_without_any_scored_rollout_is_left_out() -> None:
    def broken(problem: Problem, response: str) -> bool:
        raise OracleError("no judge")

    run = pivotal.search(ScriptedEngine(FORK, strata=16), problems(2), broken, **EXACT)
    assert [q.status for q in run.questions()] == ["unscored", "unscored"]


def test_other_errors_of_an_oracle_are_not_hidden() -> None:
    def defect(problem: Problem, response: str) -> bool:
        raise KeyError("answer")

    with pytest.raises(KeyError):
        list(pivotal.search(ScriptedEngine(FORK), problems(1), defect, **EXACT))


def everything(run: pivotal.Search) -> list[Any]:
    return [(q.status, q.root, q.paths, q.tokens, q.pairs, q.ledger) for q in run.questions()]


@pytest.mark.parametrize(("flight", "per_call"), [(1, 16), (3, 100), (64, 4096)])
def test_results_do_not_depend_on_batching(flight: int, per_call: int) -> None:
    reference = everything(search(ScriptedEngine(FORK), 12, seed=3))
    run = search(
        ScriptedEngine(FORK), 12, seed=3, questions_in_flight=flight, rollouts_per_call=per_call
    )
    assert everything(run) == reference


def test_one_round_of_many_questions_is_one_call() -> None:
    engine = ScriptedEngine(FORK, strata=16)
    list(search(engine, 10))
    assert len(engine.calls[0].prompts) == 10
    assert [p[0] for p in engine.calls[0].prompts] == list(range(50, 60))
    assert len(engine.calls) <= 5


def test_the_seed_matters() -> None:
    one, two = (everything(search(ScriptedEngine(FORK), 4, seed=s)) for s in (1, 2))
    assert one != two


@pytest.mark.parametrize("flight", [1, 4, 32])
def test_the_budget_is_spent_in_question_order(flight: int) -> None:
    whole = search(ScriptedEngine(FORK), 12)
    costs = [sum(q.ledger.num_tokens.values()) for q in whole.questions()]
    budget = sum(costs[:4]) + 1
    run = search(ScriptedEngine(FORK), 12, budget_tokens=budget, questions_in_flight=flight)
    assert [q.problem.id for q in run.questions()] == ["q0", "q1", "q2", "q3", "q4"]
    assert run.num_tokens == sum(costs[:5])


def test_pairs_stop_at_their_number() -> None:
    whole = [p for q in search(ScriptedEngine(FORK), 12).questions() for p in q.pairs]
    run = search(ScriptedEngine(FORK), 12, max_pairs=3)
    assert [p for q in run.questions() for p in q.pairs] == whole[:3]
    assert run.num_questions < 12


def test_iterating_goes_on_where_it_stopped() -> None:
    run = search(ScriptedEngine(FORK, strata=16), 4)
    first = next(iter(run))
    rest = list(run)
    assert first.problem_id == "q0"
    assert {t.problem_id for t in rest} >= {"q1", "q2", "q3"}
    assert run.num_filter_tokens > 0
    assert run.num_confirm_tokens == run.num_pair_tokens == 0


def test_what_is_asked_wrongly_is_refused() -> None:
    engine = ScriptedEngine(FORK)
    with pytest.raises(ValueError, match="allowed: paper, fast, balanced, thorough"):
        pivotal.search(engine, problems(1), oracle, method="quick")
    with pytest.raises(ValueError, match="gap is 0"):
        pivotal.search(engine, problems(1), oracle, gap=0)
    with pytest.raises(ValueError, match="rollouts_per_call is 0"):
        pivotal.search(engine, problems(1), oracle, rollouts_per_call=0)
    with pytest.raises(ValueError, match="ids must differ"):
        pivotal.search(engine, problems(1) * 2, oracle)
    empty = [Problem(id="none", prompt=[], answer="Y")]
    with pytest.raises(ValueError, match="empty prompt"):
        list(pivotal.search(engine, empty, oracle))


def test_text_and_chat_prompts_are_encoded_by_the_tokenizer() -> None:
    law = {1000 + ord("a"): FORK.law[START]} | dict(FORK.law)
    engine = ScriptedEngine(Chain(law), strata=16)
    asked = [
        Problem(id="text", prompt="a", answer="Y"),
        Problem(id="chat", prompt=[{"role": "user", "content": "a"}], answer="Y"),
    ]
    text, chat = pivotal.search(engine, asked, oracle, **EXACT).questions()
    assert text.prompt_token_ids == [1097]
    assert chat.prompt_token_ids == [900, 1097, START]
