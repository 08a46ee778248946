"""The adaptive search: its estimator against closed forms, freshness of what confirms."""

import math
from typing import Any

import numpy as np
import pytest
from pivotal_world import CANCEL, FORK, START, STOP, Chain, ScriptedEngine, oracle, problems

from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal.adaptive import Confirmed, partners
from phiforge.posttrain.pivotal.branches import Branches
from phiforge.posttrain.pivotal.estimates import Estimate, Ledger, Request, Rollout
from phiforge.posttrain.pivotal.search import DETOURS
from phiforge.posttrain.pivotal.walk import Walk

METHODS = ("fast", "balanced", "thorough")


def search(engine: ScriptedEngine, count: int, **arguments: Any) -> pivotal.Search:
    settings = {"method": "balanced", "n_filter": 32, "max_tokens": 12} | arguments
    return pivotal.search(engine, problems(count), oracle, **settings)


def everything(run: pivotal.Search) -> list[Any]:
    return [(q.status, q.root, q.paths, q.tokens, q.pairs, q.ledger) for q in run.questions()]


def test_p_along_the_path_is_the_linear_formula() -> None:
    """With very many rollouts the estimate is p_i = pi_i p_(i+1) + (1 - pi_i) q_i, all along."""
    pi = np.array([0.5, 0.99, 0.9, 0.6, 0.999, 0.3])
    q = np.array([0.2, 0.1, 0.5, 0.9, 0.4, 0.7])
    p = np.empty(7)
    p[6] = 1.0
    for i in range(5, -1, -1):
        p[i] = pi[i] * p[i + 1] + (1 - pi[i]) * q[i]
    branches = Branches([math.log(x) for x in pi], True, gap=0.2)
    assert [int(branches.starts[c]) for c in branches.candidates] == [0, 3, 5]
    reach = np.concatenate([[1.0], np.cumprod(pi)])
    for place in range(6):  # rollouts of the bare prompt, in their exact proportions
        num = round(1e6 * reach[place] * (1 - pi[place]))
        for success, share in ((True, q[place]), (False, 1 - q[place])):
            for _ in range(round(num * share / 1000)):
                branches.add(0, place, success)
    assert branches.p_along() == pytest.approx(list(p), abs=0.01)
    _, effects, _ = branches.probabilities(prior=0.2)
    assert list(effects) == pytest.approx([p[i + 1] - p[i] for i in (0, 3, 5)], abs=0.01)


def test_without_rollouts_leaving_the_path_changes_nothing() -> None:
    branches = Branches([math.log(0.5), math.log(0.9)], False, gap=0.2)
    assert branches.p_along() == pytest.approx([0.0, 0.0, 0.0], abs=0.2)
    assert branches.p_along()[-1] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_finds_the_fork_with_the_right_sign(method: str) -> None:
    found = list(search(ScriptedEngine(FORK), 12, method=method))
    at_start = [t for t in found if t.prefix_token_ids[-1] == START]
    assert len(at_start) >= 14  # 24 paths pass there; in both worlds p moves by 1/4
    for token in at_start:
        assert (token.delta > 0) == (token.token_id == 10)
        assert token.p_before == pytest.approx(token.p_after - token.delta)
        assert token.n_after == token.n_off
        assert token.p_value is not None
        assert token.interval[0] <= token.delta <= token.interval[1]


def test_opposite_moves_that_cancel_are_seen_too() -> None:
    """Bisection alone is blind to them: p is the same at both ends of the segment."""
    tokens = {t.token_id for t in search(ScriptedEngine(CANCEL), 24, method="thorough")}
    assert {20, 22} <= tokens


def test_a_sure_token_is_never_pivotal() -> None:
    for token in search(ScriptedEngine(FORK), 12, method="thorough"):
        assert math.exp(token.logprob) <= 1 - 0.2 + 1e-9


def test_confirming_rollouts_took_no_part_in_the_search() -> None:
    engine = ScriptedEngine(FORK)
    for question in search(engine, 8).questions():
        used: set[tuple[Any, ...]] = set()
        fresh: set[tuple[Any, ...]] = set()
        for request, rollouts in question.ledger.history:
            span = range(request.first_index, request.first_index + len(rollouts))
            keys = {(request.prefix, request.forbidden, i) for i in span}
            assert not keys & used
            assert not keys & fresh
            (used if request.purpose in ("filter", "search") else fresh).update(keys)
        for token in question.tokens:
            prefix = tuple(token.prefix_token_ids[2:])
            confirming = [k for k in fresh if k[:2] == (prefix, token.token_id)]
            assert len(confirming) == token.n_off


def test_detours_avoid_the_path_and_have_their_own_randomness() -> None:
    engine = ScriptedEngine(FORK)
    detours = 0
    for question in search(engine, 4).questions():
        for request, rollouts in question.ledger.history:
            if request.forbidden is not None:
                detours += len(rollouts)
                assert all(r.token_ids[0] != request.forbidden for r in rollouts)
    assert detours
    assert any(max(call.first_index) >= DETOURS for call in engine.calls)


@pytest.mark.parametrize(("flight", "calls"), [(1, 16), (3, 100), (64, 4096)])
def test_results_do_not_depend_on_batching(flight: int, calls: int) -> None:
    reference = everything(search(ScriptedEngine(FORK), 8, seed=3))
    run = search(
        ScriptedEngine(FORK), 8, seed=3, questions_in_flight=flight, rollouts_per_call=calls
    )
    assert everything(run) == reference


def test_pairs_are_verified_and_their_sides_differ() -> None:
    run = search(ScriptedEngine(FORK), 24)
    pairs = [p for q in run.questions() for p in q.pairs]
    assert len(pairs) >= 12
    for pair in pairs:
        assert pair.metadata["interval"][0] > 0
        assert pair.metadata["delta"] >= 0.2
        assert pair.metadata["n_chosen"] >= 12
        assert pair.metadata["n_rejected"] >= 12
        assert pair.chosen_token_ids != pair.rejected_token_ids
        if pair.prompt_token_ids and pair.prompt_token_ids[-1] == START:
            assert (pair.chosen_token_ids, pair.rejected_token_ids) == ([10], [11])
    assert len({p.id for p in pairs}) == len(pairs)


def test_every_token_generated_is_counted_once() -> None:
    run = search(ScriptedEngine(FORK), 8)
    generated = sum(
        len(r.token_ids) for q in run.questions() for _, rs in q.ledger.history for r in rs
    )
    assert run.num_tokens == generated
    assert min(run.num_filter_tokens, run.num_search_tokens, run.num_confirm_tokens) > 0


def test_given_paths_are_searched_in_place_of_sampled_ones() -> None:
    engine = ScriptedEngine(FORK)
    path = [10, 12, 13, 1, STOP]
    run = search(engine, 2, paths={"q0": [path]})
    first, second = run.questions()
    assert [p.token_ids for p in first.paths] == [path]
    assert first.paths[0].success
    assert len(second.paths) == 2


def test_an_answer_that_always_succeeds_or_fails_is_left_alone() -> None:
    sure = Chain({START: [(10, 0.5), (11, 0.5)], 10: [(1, 1.0)], 11: [(1, 1.0)]})
    (question,) = search(ScriptedEngine(sure), 1, band=(0, 1)).questions()
    assert question.tokens == []
    assert question.ledger.num_tokens["confirm"] == 0


def test_a_partner_at_the_length_limit_needs_no_rollout() -> None:
    """Nothing can follow a counterpart that is the last token that fits: its p is known."""
    ledger = Ledger()
    walk = Walk(Rollout((10, 1), True, (0.0, math.log(0.5))), None, gap=0.2)
    detours = [Rollout((2,), False)] * 4
    ledger.add(Request((10,), 0, 4, "search", forbidden=1), detours)
    found = Confirmed(1, 0.5, Estimate(1, 1, exact=True), Estimate(4, 0), num_before=4)
    settings = pivotal.Settings(method="balanced", max_tokens=2)
    coroutine = partners(walk, found, ledger, settings, stop_ids=())
    with pytest.raises(StopIteration) as stop:
        next(coroutine)
    assert stop.value.value == (2, Estimate(1, 0, exact=True))
