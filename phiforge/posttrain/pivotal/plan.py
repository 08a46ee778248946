"""What a search will cost and yield, from a pilot on its first questions.

`forecast(pilot, num_questions)` gives, for each quantity, the expected total and a 95% interval;
`compare(forecast, metrics)` says how a finished search came out. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phiforge.core.stats import student_quantile
from phiforge.posttrain.pivotal.results import QuestionResult

QUANTITIES = (
    "questions_in_band",
    "paths",
    "pivotal_tokens",
    "pairs",
    "filter_tokens",
    "search_tokens",
    "confirm_tokens",
    "pair_tokens",
    "tokens",
    "seconds",
)


@dataclass(frozen=True)
class Expected:
    """A total over all questions: what the pilot had, plus its mean for the rest."""

    total: float
    low: float
    high: float


def observe(question: QuestionResult, seconds: float = 0.0) -> dict[str, float]:
    """What one question cost and gave."""
    tokens = {f"{name}_tokens": n for name, n in question.ledger.num_tokens.items()}
    return {
        "questions_in_band": float(question.status == "searched"),
        "paths": len(question.paths),
        "pivotal_tokens": len(question.tokens),
        "pairs": len(question.pairs),
        **tokens,
        "tokens": sum(tokens.values()),
        "seconds": seconds,
    }


def forecast(
    pilot: Sequence[Mapping[str, float]], num_questions: int, confidence: float = 0.95
) -> dict[str, Expected]:
    """Totals of `num_questions` questions of which `pilot` are known; t prediction intervals.

    The pilot's questions must be drawn like the others (the first ones of a shuffled list are).
    Raises ValueError for a pilot of fewer than two questions, or of more than there are.
    """
    known = len(pilot)
    if not 2 <= known <= num_questions:
        raise ValueError(
            f"pilot: {known} questions; it needs at least 2 and at most all {num_questions}"
        )
    rest = num_questions - known
    quantile = student_quantile(0.5 + confidence / 2, known - 1)
    expected = {}
    for name in QUANTITIES:
        values = [row[name] for row in pilot]
        mean = sum(values) / known
        variance = sum((v - mean) ** 2 for v in values) / (known - 1)
        half = quantile * math.sqrt(variance * (rest + rest**2 / known))
        total = num_questions * mean
        expected[name] = Expected(total, max(sum(values), total - half), total + half)
    return expected


def compare(expected: Mapping[str, Expected], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each quantity that `metrics` has: forecast, interval, what came, whether inside."""
    came = dict(metrics)
    purposes = [f"{name}_tokens" for name in ("filter", "search", "confirm", "pair")]
    came["tokens"] = sum(came.get(name, 0) for name in purposes)
    rows = []
    for name, value in expected.items():
        if name in came:
            inside = value.low <= came[name] <= value.high
            rows.append({"quantity": name, **asdict(value), "came": came[name], "inside": inside})
    return rows
