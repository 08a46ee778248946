"""Pairs: which tokens are set against each other, and what a pair record holds."""

from typing import Any

import pytest
from pivotal_world import FORK, START, STOP, ScriptedEngine, oracle, problems

from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal.estimates import Estimate, Ledger, Request, Rollout
from phiforge.posttrain.pivotal.pairs import best_against_worst

GROUPS = {7: Estimate(10, 9), 8: Estimate(10, 1), 9: Estimate(2, 2), STOP: Estimate(10, 0)}


def test_best_against_worst() -> None:
    assert best_against_worst(GROUPS, 0.5, 0.2, 3, {STOP}) == (7, 8)


def test_rare_tokens_count_when_the_least_count_allows_them() -> None:
    assert best_against_worst(GROUPS, 0.5, 0.2, 2, {STOP}) == (9, 8)


@pytest.mark.parametrize(
    ("groups", "p_before"),
    [
        ({7: Estimate(10, 9)}, 0.5),
        ({7: Estimate(10, 6), 8: Estimate(10, 5)}, 0.55),
        ({7: Estimate(10, 9), 8: Estimate(10, 5)}, 0.4),
        ({7: Estimate(10, 5), 8: Estimate(10, 1)}, 0.6),
        ({7: Estimate(10, 5), 8: Estimate(10, 5)}, 0.5),
    ],
    ids=["one token", "too close", "none lowers p", "none raises p", "equal"],
)
def test_no_pair(groups: dict[int, Estimate], p_before: float) -> None:
    assert best_against_worst(groups, p_before, 0.2, 3) is None


def test_equal_rates_go_to_the_larger_group() -> None:
    groups = {3: Estimate(4, 4), 5: Estimate(9, 9), 6: Estimate(5, 0), 4: Estimate(5, 0)}
    assert best_against_worst(groups, 0.5, 0.2, 3) == (5, 4)


def test_first_tokens_pool_the_rollouts_of_the_longer_prefix() -> None:
    ledger = Ledger()
    drawn = [((7, 1), True), ((7, 2), False), ((8,), False), ((8,), None)]
    ledger.add(Request((), 0, 4), [Rollout(ids, success) for ids, success in drawn])
    ledger.add(Request((7,), 0, 2), [Rollout((1,), True), Rollout((1,), True)])
    assert ledger.first_tokens(()) == {7: Estimate(4, 3), 8: Estimate(1, 0)}


def test_a_pair_holds_one_token_a_side_and_its_counts() -> None:
    arguments: dict[str, Any] = {
        "method": "paper",
        "n_filter": 16,
        "n_rollouts": 16,
        "max_tokens": 12,
    }
    run = pivotal.search(
        ScriptedEngine(FORK, strata=16), problems(1, family="forks"), oracle, **arguments
    )
    (question,) = run.questions()
    pair = next(p for p in question.pairs if p.prompt_token_ids == [50, START])
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == ([10], [11])
    assert (pair.chosen, pair.rejected) == ("<10>", "<11>")
    assert pair.prompt == f"<50><{START}>"
    assert pair.metadata["p_chosen"] == 0.75
    assert pair.metadata["p_rejected"] == 0.25
    assert pair.metadata["delta"] == 0.5
    assert pair.metadata["interval"][0] > 0
    assert pair.metadata["family"] == "forks"
    assert pair.metadata["source"] == "pivotal"
    assert len({p.id for p in question.pairs}) == len(question.pairs)
    sides = [ids for p in question.pairs for ids in (p.chosen_token_ids, p.rejected_token_ids)]
    assert all(ids is not None and len(ids) == 1 and ids != [STOP] for ids in sides)


def test_all_prefixes_give_at_least_the_pivotal_pairs_for_no_more_tokens() -> None:
    arguments: dict[str, Any] = {
        "method": "paper",
        "n_filter": 32,
        "n_rollouts": 32,
        "max_tokens": 12,
        "gap": 0.3,
    }
    runs = [
        pivotal.search(ScriptedEngine(FORK), problems(8), oracle, pairs_from=source, **arguments)
        for source in ("pivotal", "all_prefixes")
    ]
    few, many = ([p for q in run.questions() for p in q.pairs] for run in runs)
    assert runs[0].num_tokens == runs[1].num_tokens
    assert len(many) > len(few) > 0
    assert {tuple(p.prompt_token_ids or ()) for p in few} <= {
        tuple(p.prompt_token_ids or ()) for p in many
    }
    assert {p.metadata["source"] for p in many} == {"pivotal", "prefix"}


def test_the_pair_gap_may_be_larger_than_the_gap() -> None:
    arguments: dict[str, Any] = {
        "method": "paper",
        "n_filter": 32,
        "n_rollouts": 32,
        "max_tokens": 12,
    }
    run = pivotal.search(ScriptedEngine(FORK), problems(8), oracle, pair_gap=0.6, **arguments)
    pairs = [p for q in run.questions() for p in q.pairs]
    assert pairs
    assert all(p.metadata["delta"] >= 0.6 for p in pairs)


def test_newcombe_interval_of_a_known_example() -> None:
    """Newcombe 1998, table II, example (a): 56/70 - 48/80 gives [0.0524, 0.3339]."""
    low, high = pivotal.difference_interval(Estimate(80, 48), Estimate(70, 56))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_an_exact_end_adds_no_width() -> None:
    low, high = pivotal.difference_interval(Estimate(1, 0, True), Estimate(1, 1, True))
    assert (low, high) == (1.0, 1.0)
