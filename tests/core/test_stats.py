"""Statistics against published tables and values worked out by hand."""

import math

import numpy as np
import pytest

from phiforge.core import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(successes: int, n: int, low: float, high: float) -> None:
    interval = stats.wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_ends() -> None:
    assert stats.wilson(0, 40).high > 0.05
    assert stats.wilson(40, 40).high == 1.0
    assert stats.wilson(40, 40).low == pytest.approx(1 - stats.wilson(0, 40).high)
    assert stats.wilson(0, 0) == stats.Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="successes=3, n=2"):
        stats.wilson(3, 2)
    with pytest.raises(ValueError, match="confidence=95"):
        stats.wilson(1, 2, confidence=95)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [  # Newcombe 1998, Stat. Med. 17:873, table II, method 10 (his difference is first - second)
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
    ],
)
def test_newcombe_published(
    a: tuple[int, int], b: tuple[int, int], low: float, high: float
) -> None:
    interval = stats.newcombe(*a, *b)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_binomial_tail_by_hand() -> None:
    # 20 coins: P(X <= 5) = 21700 / 2^20
    assert stats.binomial_tail(5, 20, side="less") == pytest.approx(21700 / 2**20, rel=1e-12)
    assert stats.binomial_tail(5, 20) == pytest.approx(2 * 21700 / 2**20, rel=1e-9)
    assert stats.binomial_tail(3, 3, 0.25, "greater") == pytest.approx(1 / 64)
    assert stats.binomial_tail(10, 20) == pytest.approx(1.0)
    assert stats.binomial_tail(0, 0) == 1.0
    assert stats.binomial_tail(2, 2, 1.0, "less") == 1.0
    assert 0 < stats.binomial_tail(5600, 10_000) < 1e-30
    with pytest.raises(ValueError, match="side='left'"):
        stats.binomial_tail(1, 2, side="left")


def _pairs(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [True] * lost + [False] * gained + [False] * neither
    b = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return a, b


def test_mcnemar_exact() -> None:
    test = stats.mcnemar(*_pairs(50, 5, 15, 30))
    assert test.p_value == pytest.approx(2 * 21700 / 2**20)
    assert (test.difference, test.n, test.gained, test.lost) == (0.1, 100, 15, 5)
    assert test.low < 0.1 < test.high
    reverse = stats.mcnemar(*reversed(_pairs(50, 5, 15, 30)))
    assert reverse.p_value == pytest.approx(test.p_value)
    assert (reverse.low, reverse.high) == pytest.approx((-test.high, -test.low))


def test_paired_interval_by_hand() -> None:
    # 36 / 12 / 2 / 0: phi = (0 - 24) / sqrt(48 * 2 * 38 * 12); shares 0.96 and 0.76, n = 50.
    test = stats.mcnemar(*_pairs(36, 2, 12, 0))
    phi = -24 / math.sqrt(48 * 2 * 38 * 12)
    first, second = stats.wilson(38, 50), stats.wilson(48, 50)
    x, y = 0.96 - second.low, first.high - 0.76
    assert test.low == pytest.approx(0.2 - math.sqrt(x * x - 2 * phi * x * y + y * y))
    assert (test.low, test.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_mcnemar_without_difference() -> None:
    same = stats.mcnemar([True, False, True], [True, False, True])
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="equal length"):
        stats.mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="non-empty"):
        stats.mcnemar([], [])


def test_paired_bootstrap_is_seeded_and_agrees_with_normal_theory() -> None:
    generator = np.random.default_rng(5)
    a = generator.random(400)
    b = a + generator.normal(0.1, 0.5, 400)
    test = stats.paired_bootstrap(a, b, seed=3)
    assert test == stats.paired_bootstrap(a, b, seed=3)
    assert test != stats.paired_bootstrap(a, b, seed=4)
    exact = stats.cluster_interval(b - a)
    assert test.low == pytest.approx(exact.low, abs=0.01)
    assert test.high == pytest.approx(exact.high, abs=0.01)
    assert test.p_value < 0.01


def test_bootstrap_over_clusters_is_wider() -> None:
    a = np.zeros(200)
    b = np.repeat(np.random.default_rng(0).normal(0, 1, 10), 20)
    clusters = np.repeat(np.arange(10), 20).tolist()
    alone, grouped = (
        stats.paired_bootstrap(a, b, clusters=c, resamples=2000) for c in (None, clusters)
    )
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_cluster_interval_by_hand() -> None:
    # Residual sums by cluster: -1, 0, 1 (mean 0.5, n 6): sqrt(3/2 * 2) / 6
    result = stats.cluster_interval([0, 0, 0, 1, 1, 1], ["x", "x", "y", "y", "z", "z"])
    assert result.standard_error == pytest.approx(math.sqrt(3) / 6)
    assert result.high - 0.5 == pytest.approx(4.302653 * math.sqrt(3) / 6, rel=1e-6)
    assert (result.n, result.clusters) == (6, 3)
    single = stats.cluster_interval([1.0, 2.0, 4.0])
    assert single.standard_error == pytest.approx(np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    assert stats.cluster_interval([1.0, 2.0], ["x", "x"]).high == math.inf


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [(0.975, 1, 12.7062047), (0.975, 10, 2.2281389), (0.95, 5, 2.0150484), (0.025, 30, -2.0422725)],
)
def test_student_quantile_tables(probability: float, degrees: int, value: float) -> None:
    assert stats.student_quantile(probability, degrees) == pytest.approx(value, abs=1e-6)


def test_student_quantile_joins_the_normal() -> None:
    assert stats.student_quantile(0.975, 2000) == pytest.approx(
        stats.student_quantile(0.975, 2001), abs=2e-3
    )


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []
    with pytest.raises(ValueError, match=r"allowed 0\.\.1"):
        stats.holm([0.1, math.nan])


def test_benjamini_hochberg_published() -> None:
    # Benjamini and Hochberg 1995, section 3.2: 15 p-values, four rejected at 0.05
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240]
    p += [0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    adjusted = stats.benjamini_hochberg(p)
    assert sum(value <= 0.05 for value in adjusted) == 4
    assert adjusted[0] == pytest.approx(0.0015)
    assert sum(value <= 0.05 for value in stats.holm(p)) == 3
    assert stats.benjamini_hochberg(p[::-1]) == adjusted[::-1]
