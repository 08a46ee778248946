"""The bisection alone: cut points, what it finds, what it must miss, and what it asks for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiforge.posttrain.pivotal.subdivide import Found, midpoint, subdivide


def bisect(p: list[float | None], logprobs: list[float], gap: float) -> tuple[Found, list[int]]:
    """Run `subdivide` against known values; returns what it found and the lengths it asked for."""
    search, asked = subdivide(logprobs, gap), []
    try:
        wanted = next(search)
        while True:
            asked += wanted
            wanted = search.send({length: p[length] for length in wanted})
    except StopIteration as stop:
        return stop.value, asked


@pytest.mark.parametrize(
    ("logprobs", "cut"),
    [
        ([-0.1, -3.0, -0.1], 2),
        ([-5.0, -0.1, -0.1, -0.1], 1),
        ([-0.1, -0.1, -0.1, -5.0], 3),
        ([-1.0, -1.0, -1.0, -1.0], 2),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 2),
        ([0.0, -2.0], 1),
    ],
)
def test_midpoint_is_half_of_the_surprisal_and_both_sides_have_tokens(
    logprobs: list[float], cut: int
) -> None:
    assert midpoint(logprobs) == cut


def test_finds_the_single_jump() -> None:
    found, asked = bisect([0.3, 0.3, 0.3, 0.9, 0.9, 1.0], [-1.0] * 5, 0.2)
    assert found.pivotal == (2,)
    assert sorted(asked) == sorted(set(asked))


def test_misses_two_jumps_that_cancel_inside_a_segment() -> None:
    found, asked = bisect([0.5, 0.9, 0.5, 1.0], [-1.0, -1.0, -1.0], 0.2)
    assert found.pivotal == (2,)
    assert 1 not in asked


def test_a_gap_that_is_met_up_to_rounding_counts() -> None:
    found, _ = bisect([0.5, 0.3], [-1.0], 0.2)
    assert found.pivotal == (0,)


def test_an_unknown_end_leaves_its_segments_alone() -> None:
    found, _ = bisect([0.0, None, 0.5, 1.0, 1.0], [-1.0] * 4, 0.2)
    assert found.undecided == ((0, 1), (1, 2))
    assert found.pivotal == (2,)


def test_an_empty_path_asks_for_nothing() -> None:
    assert bisect([0.5], [], 0.2) == (Found((), ()), [])


PATHS = st.lists(st.tuples(st.floats(0, 1), st.floats(-8, 0)), min_size=1, max_size=40)


@given(PATHS, st.floats(0.05, 0.9))
def test_what_is_found_is_pivotal_and_nothing_is_asked_twice(
    steps: list[tuple[float, float]], gap: float
) -> None:
    p = [0.5, *(value for value, _ in steps)]
    found, asked = bisect(p, [logprob for _, logprob in steps], gap)
    assert all(abs(p[i + 1] - p[i]) >= gap - 1e-9 for i in found.pivotal)
    assert len(asked) == len(set(asked))


@given(PATHS, st.floats(0.05, 0.9))
def test_a_monotone_path_gives_all_its_pivotal_tokens(
    steps: list[tuple[float, float]], gap: float
) -> None:
    p = sorted([0.0, *(value for value, _ in steps)])
    found, _ = bisect(p, [logprob for _, logprob in steps], gap)
    jumps = [i for i in range(len(steps)) if p[i + 1] - p[i] >= gap + 1e-6]
    assert set(jumps) <= set(found.pivotal)


def test_certain_tokens_cost_few_questions() -> None:
    logprobs = [math.log(0.999)] * 63 + [math.log(0.3)] + [math.log(0.999)] * 64
    p = [0.3] * 64 + [0.9] * 64 + [1.0]
    found, asked = bisect(p, logprobs, 0.2)
    assert found.pivotal == (63,)
    assert len(asked) <= 10
