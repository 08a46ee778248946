"""From samples to figures: medians, ratios paired by round with their spread, shares of the limit.

`rates(samples)` per round, `spread(values)`, `ratio(ours, theirs)`. Pure arithmetic.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One run of one contestant in one round; round -1 is the warm-up, which no figure uses."""

    work: str
    round: int
    label: str
    seconds: float
    tokens: int
    cpu_seconds: float
    foreign_share: float | None
    peak_bytes: int
    token_ids: list[list[int]] | None = None
    losses: list[float] | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest. Raises ValueError for none."""
    found = sorted(values)
    if not found:
        raise ValueError("spread: no values")
    return Spread(statistics.median(found), found[0], found[-1])


def rates(samples: Iterable[Sample]) -> dict[int, float]:
    """Tokens per second of each measured round."""
    return {sample.round: sample.rate for sample in samples if sample.round >= 0}


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """ours / theirs, round by round: what moves both in a round cancels. None without a round."""
    shared = sorted(ours.keys() & theirs.keys())
    return spread(ours[r] / theirs[r] for r in shared) if shared else None


def agreement(reference: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Share of the reference's tokens before each row's first difference; 1 = the same tokens."""
    same = total = 0
    for number, row in enumerate(reference):
        theirs = other[number] if number < len(other) else []
        total += len(row)
        for mine, its in zip(row, theirs, strict=False):
            if mine != its:
                break
            same += 1
    return same / total if total else 1.0


def loss_difference(reference: Sequence[float], other: Sequence[float]) -> float | None:
    """Largest relative difference of the first losses; None without any."""
    pairs = list(zip(reference, other, strict=False))
    return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def best_limits(replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The limits of a run: the best of its rounds, which is what the machine was able to do."""
    dtypes = replies[0]["matmul"]
    return {
        "bytes_per_second": max(reply["bytes_per_second"] for reply in replies),
        "flops_per_second": {
            dtype: max(reply["matmul"][dtype]["flops_per_second"] for reply in replies)
            for dtype in dtypes
        },
    }
