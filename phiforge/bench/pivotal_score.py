"""Scores a pivotal-token search against the truth: precision, recall, bias, coverage, cost.

`judge(question, truth, gap)` gives a question's tokens, ready for JSON; `figures(rows, gap)` all
numbers with intervals. Whole questions are resampled: tokens of one question are no independent
draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from phiforge.core.stats import wilson
from phiforge.posttrain.pivotal import QuestionResult
from phiforge.posttrain.pivotal.subdivide import reaches

PURPOSES = ("filter", "search", "confirm", "pair")
RESAMPLES = 4000


@dataclass(frozen=True)
class Effect:
    """What a token does to p(success), and the 95% bounds within which that is known."""

    delta: float
    low: float
    high: float


# The effect of (prompt and path before the token, token); None: known to be below the gap.
Truth = Callable[[Sequence[int], int], Effect | None]


def judge(question: QuestionResult, truth: Truth, gap: float) -> list[dict[str, Any]]:
    """The tokens of the searched paths that are pivotal or were found, each once.

    `true` is the token's effect (None: below the gap), `found` what the search says of it (None:
    missed).
    """
    found = {(*t.prefix_token_ids, t.token_id): t for t in question.tokens}
    judged: dict[tuple[int, ...], dict[str, Any]] = {}
    for number, path in enumerate(question.paths):
        for position, token_id in enumerate(path.token_ids):
            prefix = (*question.prompt_token_ids, *path.token_ids[:position])
            effect, said = truth(prefix, token_id), found.get((*prefix, token_id))
            if said is None and (effect is None or not reaches(effect.delta, gap)):
                continue
            row = {
                "path": number,
                "position": position,
                "token_id": token_id,
                "probability": math.exp(path.logprobs[position]),
                "true": asdict(effect) if effect else None,
                "found": asdict(Effect(said.delta, *said.interval)) if said else None,
            }
            judged.setdefault((*prefix, token_id), row)
    assert found.keys() <= judged.keys(), "a search reports tokens of its paths alone"
    return list(judged.values())


def figures(rows: Sequence[Mapping[str, Any]], gap: float, *, clear: bool = False) -> dict:
    """All figures of a method over `rows`, one per searched question (and seed).

    A found token is right when its true |delta| is at least `gap`, and its sign the true one.
    `clear` leaves out tokens whose true delta is not known to be on one side of the gap. Shares
    have the wider end of Wilson's interval and of the bootstrap over questions, which says nothing
    at 0 and 1; other intervals are the bootstrap's. None stands for what has no value.
    """
    names = sorted({row["question"] for row in rows})
    table = {name: np.zeros(len(_COLUMNS)) for name in names}
    for row in rows:
        table[row["question"]] += _counts(row, gap, clear)
    counts = np.array([table[name] for name in names]).reshape(len(names), len(_COLUMNS))
    total = dict(zip(_COLUMNS, counts.sum(axis=0).tolist(), strict=True))
    drawn = _resampled(counts)
    result: dict[str, Any] = {"questions": len(names)}
    result |= {n: int(total[n]) for n in ("true", "found", "right")}
    for name, (top, bottom) in _SHARES.items():
        result[name] = _ratio(total[top], total[bottom])
        result[f"{name}_interval"] = _share_interval(total, drawn, top, bottom)
    for name, (top, bottom) in _MEANS.items():
        result[name] = _ratio(total[top], total[bottom])
        result[f"{name}_interval"] = _quantiles(drawn[top], drawn[bottom])
    result |= {f"{n}_tokens": int(total[n]) for n in PURPOSES}
    return result


_COLUMNS = (
    *("true", "found", "right", "excess", "known", "covered"),
    *PURPOSES,
    *("spent", "all"),
)
_SHARES = {
    "precision": ("right", "found"),
    "recall": ("right", "true"),
    "coverage": ("covered", "known"),
}
_MEANS = {
    "bias": ("excess", "known"),
    "tokens_per_right": ("spent", "right"),
    "all_tokens_per_right": ("all", "right"),
}


def _counts(row: Mapping[str, Any], gap: float, clear: bool) -> np.ndarray:
    count = dict.fromkeys(_COLUMNS, 0.0)
    for token in row["tokens"]:
        kind, true, found = _kind(token["true"], gap, clear), token["true"], token["found"]
        if kind == "borderline":
            continue
        count["true"] += kind == "pivotal"
        if found is None:
            continue
        count["found"] += 1
        if true is None:
            continue
        count["right"] += kind == "pivotal" and true["delta"] * found["delta"] > 0
        count["known"] += 1
        count["excess"] += abs(found["delta"]) - abs(true["delta"])
        # A closed form is off by rounding, and an interval may end at the value itself.
        count["covered"] += found["low"] - 1e-9 <= true["delta"] <= found["high"] + 1e-9
    count |= {name: row["tokens_drawn"][name] for name in PURPOSES}
    count["spent"] = count["search"] + count["confirm"]
    count["all"] = sum(count[name] for name in PURPOSES)
    return np.array([count[name] for name in _COLUMNS])


def _kind(
    true: Mapping[str, float] | None, gap: float, clear: bool
) -> Literal["pivotal", "below", "borderline"]:
    if true is None:
        return "below"
    if not clear:
        return "pivotal" if reaches(true["delta"], gap) else "below"
    low, high = true["low"], true["high"]
    if (low > 0 and reaches(low, gap)) or (high < 0 and reaches(high, gap)):
        return "pivotal"
    return "borderline" if reaches(low, gap) or reaches(high, gap) else "below"


def _resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over as many questions drawn with replacement, RESAMPLES times."""
    number = len(counts)
    if not number:
        return {name: np.zeros(0) for name in _COLUMNS}
    generator = np.random.default_rng(0)
    weights = generator.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    return dict(zip(_COLUMNS, (weights @ counts).T, strict=True))


def _ratio(top: float, bottom: float) -> float | None:
    return top / bottom if bottom else None


def _quantiles(top: np.ndarray, bottom: np.ndarray) -> list[float | None]:
    """2.5% and 97.5% of the ratio; a bound that nothing was found in is open (None)."""
    if not bottom.any():
        return [None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(bottom > 0, top / bottom, np.where(top > 0, np.inf, np.nan))
    ratios = ratios[~np.isnan(ratios)]
    ends = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return [float(x) if np.isfinite(x) else None for x in ends]


def _share_interval(
    total: Mapping[str, float], drawn: Mapping[str, np.ndarray], top: str, bottom: str
) -> list[float | None]:
    if not total[bottom]:
        return [None, None]
    simple = wilson(round(total[top]), round(total[bottom]))
    low, high = _quantiles(drawn[top], drawn[bottom])
    return [
        simple.low if low is None else min(simple.low, low),
        simple.high if high is None else max(simple.high, high),
    ]
