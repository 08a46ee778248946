"""Intervals, paired tests and corrections for multiple testing, on numpy alone.

Call `wilson(k, n)` for a proportion, `mcnemar(a, b)` for two models on the same problems,
`holm(p_values)` over a family of comparisons. Writes nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A confidence interval `low`..`high`, in the unit of the estimate."""

    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class PairedTest:
    """Second minus first on the same `n` problems: difference, its interval, two-sided p-value.

    `gained` counts problems where the second is better, `lost` where the first is.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    gained: int
    lost: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error and interval over `n` values in `clusters` clusters."""

    mean: float
    standard_error: float
    low: float
    high: float
    n: int
    clusters: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


# ------------------------------------------------------------------------------- proportions


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; never [0, 0] or [1, 1].

    `n` of 0 gives [0, 1]. Source: Wilson 1927; Newcombe 1998, Stat. Med. 17:857, method 3.
    """
    _check_count(successes, n)
    if n == 0:
        return Interval(0.0, 1.0)
    z = _normal_quantile(confidence)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the exact limits are 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(low, high)


def newcombe(
    successes_a: int, n_a: int, successes_b: int, n_b: int, confidence: float = 0.95
) -> Interval:
    """Interval of p_b - p_a for two independent samples: square-and-add of Wilson's limits.

    Source: Newcombe 1998, Stat. Med. 17:873, method 10. Both samples must be non-empty.
    """
    if n_a == 0 or n_b == 0:
        raise ValueError(f"newcombe: n_a={n_a}, n_b={n_b}; both samples need at least one item")
    share_a, share_b = successes_a / n_a, successes_b / n_b
    a, b = wilson(successes_a, n_a, confidence), wilson(successes_b, n_b, confidence)
    difference = share_b - share_a
    low = difference - math.hypot(share_b - b.low, a.high - share_a)
    high = difference + math.hypot(b.high - share_b, share_a - a.low)
    return Interval(max(low, -1.0), min(high, 1.0))


def binomial_tail(successes: int, n: int, probability: float = 0.5, side: str = "two") -> float:
    """Exact binomial probability of a result at least as extreme as `successes` of `n`.

    `side`: "greater" P(X >= k), "less" P(X <= k), "two" the sum of all outcomes that are no more
    likely than the one observed.
    """
    _check_count(successes, n)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"binomial_tail: probability={probability}, allowed 0..1")
    mass = _binomial_mass(n, probability)
    if side == "greater":
        total = mass[successes:].sum()
    elif side == "less":
        total = mass[: successes + 1].sum()
    elif side == "two":
        # The slack keeps outcomes of equal likelihood together in spite of rounding.
        total = mass[mass <= mass[successes] * (1 + 1e-9)].sum()
    else:
        raise ValueError(f"binomial_tail: side={side!r}, allowed 'greater', 'less', 'two'")
    return float(min(total, 1.0))


# ------------------------------------------------------------------------------ paired results


def fisher(successes_a: int, n_a: int, successes_b: int, n_b: int) -> float:
    """Fisher's exact test of two independent shares: the two-sided p-value.

    The probability, both totals given, of a table no likelier than the one seen.
    """
    _check_count(successes_a, n_a)
    _check_count(successes_b, n_b)
    total = successes_a + successes_b
    tables = range(max(0, total - n_b), min(total, n_a) + 1)
    ways = {k: math.comb(n_a, k) * math.comb(n_b, total - k) for k in tables}
    return sum(way for way in ways.values() if way <= ways[successes_a]) / math.comb(
        n_a + n_b, total
    )


def mcnemar(
    a_correct: Sequence[bool], b_correct: Sequence[bool], confidence: float = 0.95
) -> PairedTest:
    """Exact McNemar test of two models on the same problems, with an interval of the difference.

    The p-value is the exact two-sided binomial on the discordant problems; the interval is
    Newcombe's paired score interval (1998, Stat. Med. 17:2635, method 10).
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    _check_paired("mcnemar", a, b)
    both, lost = int((a & b).sum()), int((a & ~b).sum())
    gained, neither = int((~a & b).sum()), int((~a & ~b).sum())
    interval = _paired_interval(both, lost, gained, neither, confidence)
    return PairedTest(
        difference=(gained - lost) / len(a),
        low=interval.low,
        high=interval.high,
        p_value=binomial_tail(gained, gained + lost) if gained + lost else 1.0,
        n=len(a),
        gained=gained,
        lost=lost,
    )


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedTest:
    """Percentile bootstrap of mean(b) - mean(a) over problems, or over `clusters` of problems.

    For scores that are not 0/1 (several samples per problem, graded scores). Seeded: the same
    arguments give the same numbers. The p-value cannot fall below 2 / (resamples + 1).
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    _check_paired("paired_bootstrap", first, second)
    difference = second - first
    sums, counts = _cluster_sums(difference, clusters)
    draws = _bootstrap_means(sums, counts, resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    extreme = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return PairedTest(
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (extreme + 1) / (resamples + 1)),
        n=len(difference),
        gained=int((difference > 0).sum()),
        lost=int((difference < 0).sum()),
    )


def cluster_interval(
    values: ArrayLike, clusters: Sequence[object] | None = None, confidence: float = 0.95
) -> Mean:
    """Mean of `values` with a cluster-robust standard error and a t interval (clusters - 1 dof).

    Without `clusters` every value is its own cluster: the usual standard error of a mean. Source:
    Miller 2024, arXiv 2411.00640 §2.2, with the finite-cluster factor G / (G - 1).
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"cluster_interval: values of shape {data.shape}; needs a non-empty list")
    mean = float(data.mean())
    sums, _ = _cluster_sums(data - mean, clusters)
    groups = len(sums)
    if groups < 2:
        return Mean(mean, math.inf, -math.inf, math.inf, len(data), groups)
    error = math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(data)
    half = student_quantile(0.5 + confidence / 2, groups - 1) * error
    return Mean(mean, error, mean - half, mean + half, len(data), groups)


# ---------------------------------------------------------------------------- multiple testing


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (family-wise error), in the order given."""
    p, order = _sorted_p_values("holm", p_values)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _unsort(np.minimum(steps, 1.0), order)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini–Hochberg adjusted p-values (false discovery rate), in the order given."""
    p, order = _sorted_p_values("benjamini_hochberg", p_values)
    ranks = np.arange(1, len(p) + 1)
    steps = np.minimum.accumulate((p[order] * len(p) / ranks)[::-1])[::-1]
    return _unsort(np.minimum(steps, 1.0), order)


# -------------------------------------------------------------------------------- distributions


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with `degrees` degrees of freedom, to about 1e-9."""
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ValueError(
            f"student_quantile: probability={probability} (allowed 0..1), degrees={degrees} (>= 1)"
        )
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    if degrees > 2000:
        return NormalDist().inv_cdf(probability)
    # With t = sqrt(degrees) tan(angle) the density becomes cos(angle)^(degrees - 1), smooth on a
    # bounded range, so that Simpson's rule and bisection are enough.
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if 0.5 + scale * _simpson_cosine_power(angle, degrees - 1) < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _simpson_cosine_power(upper: float, power: int, panels: int = 512) -> float:
    values = np.cos(np.linspace(0.0, upper, 2 * panels + 1)) ** power
    total = values[0] + values[-1] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum()
    return float(total * upper / (6 * panels))


def _normal_quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence}, allowed between 0 and 1, for example 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _binomial_mass(n: int, probability: float) -> np.ndarray:
    if probability in (0.0, 1.0):
        mass = np.zeros(n + 1)
        mass[n if probability == 1.0 else 0] = 1.0
        return mass
    log_factorial = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    counts = np.arange(n + 1)
    logs = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.exp(logs + counts * math.log(probability) + (n - counts) * math.log1p(-probability))


def _paired_interval(
    both: int, first_only: int, second_only: int, neither: int, confidence: float
) -> Interval:
    n = both + first_only + second_only + neither
    share_a, share_b = (both + first_only) / n, (both + second_only) / n
    a = wilson(both + first_only, n, confidence)
    b = wilson(both + second_only, n, confidence)
    correlation = _corrected_phi(both, first_only, second_only, neither)
    below, above = (share_b - b.low, a.high - share_a), (b.high - share_b, share_a - a.low)
    low = share_b - share_a - _joined(*below, correlation)
    high = share_b - share_a + _joined(*above, correlation)
    return Interval(max(low, -1.0), min(high, 1.0))


def _joined(x: float, y: float, correlation: float) -> float:
    return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))


def _corrected_phi(both: int, first_only: int, second_only: int, neither: int) -> float:
    margins = (both + first_only) * (second_only + neither)
    margins *= (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - first_only * second_only
    if cross > 0:
        # Newcombe's continuity correction, for positive association only.
        cross = max(cross - (both + first_only + second_only + neither) / 2, 0)
    return cross / math.sqrt(margins)


def _cluster_sums(
    values: np.ndarray, clusters: Sequence[object] | None
) -> tuple[np.ndarray, np.ndarray]:
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"clusters has {len(clusters)} entries for {len(values)} values")
    position: dict[object, int] = {}
    index = np.array([position.setdefault(cluster, len(position)) for cluster in clusters])
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _bootstrap_means(
    sums: np.ndarray, counts: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    if resamples < 1:
        raise ValueError(f"paired_bootstrap: resamples={resamples}, allowed 1 and above")
    groups = len(sums)
    rows = max(1, 2_000_000 // groups)  # bounds memory to a few tens of megabytes
    means = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, groups, size=(min(rows, resamples - start), groups))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _check_count(successes: int, n: int) -> None:
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}; allowed 0 <= successes <= n")


def _check_paired(name: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"{name}: results of shapes {a.shape} and {b.shape}; needs two non-empty lists of "
            "equal length over the same problems in the same order"
        )


def _sorted_p_values(name: str, p_values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"{name}: p-values {list(p_values)}; allowed 0..1")
    return p, np.argsort(p, kind="stable")


def _unsort(values: np.ndarray, order: np.ndarray) -> list[float]:
    result = np.empty(len(values))
    result[order] = values
    return result.tolist()
