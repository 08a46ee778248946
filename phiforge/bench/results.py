"""A group's rounds as one dictionary, ready for JSON: rows, comparisons, checks, limits, samples.

`summarize(group, played)` computes every figure that is printed. Nothing is written.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from phiforge.bench.figures import (
    Sample,
    Spread,
    agreement,
    best_limits,
    loss_difference,
    rates,
    ratio,
    spread,
)
from phiforge.bench.plan import LIMIT, OURS, PEAK, Comparison, Entrant, Group, Work
from phiforge.bench.processor import FOREIGN_LIMIT
from phiforge.bench.roofline import DECODE_FORMULA, decode_flops, decode_limit
from phiforge.bench.rounds import Played
from phiforge.train.cost import FLOPS_FORMULA, flops_per_token

# Largest relative difference of the first losses from the reference's: fp32 differs by the order of
# sums, bf16 by its 8 bits, which a training step does not add up.
LOSS_TOLERANCE = {"fp32": 0.005, "bf16": 0.03}
_FIRST_LOSSES = 5


def summarize(group: Group, played: Played) -> dict[str, Any]:
    """Figures of all works of a group; see docs/bench.md for what each means."""
    limits = best_limits(played.limits) if played.limits else None
    formula = FLOPS_FORMULA if group.task == "train" else DECODE_FORMULA
    return {
        "name": group.name,
        "title": group.title,
        "task": group.task,
        "device": group.device,
        "parameters": group.config.num_parameters,
        "flops_formula": formula,
        "limits": limits,
        "limits_by_round": played.limits,
        "versions": played.about,
        "failures": played.failures,
        "works": [_work(group, work, played, limits) for work in group.works],
        "peak_flops": group.peak_flops,
    }


def wrong(summary: dict[str, Any]) -> list[str]:
    """What a person must look at: failed contestants, tokens or losses that differ."""
    found = [f"{label} failed {what}" for label, what in summary["failures"].items()]
    for work in summary["works"]:
        found += work["differs"]
    return found


def _work(
    group: Group, work: Work, played: Played, limits: dict[str, Any] | None
) -> dict[str, Any]:
    entrants = [entrant for entrant in group.entrants if entrant.takes(work.name)]
    samples = {
        entrant.label: [
            s for s in played.samples if s.label == entrant.label and s.work == work.name
        ]
        for entrant in entrants
    }
    measured = {label: rates(found) for label, found in samples.items()}
    standing = [e for e in entrants if e.label not in played.failures and measured[e.label]]
    baseline = next((e.label for e in standing if e.program == OURS), None)
    reference = samples.get(group.reference or "", [])
    rows = [
        _row(group, work, entrant, samples[entrant.label], limits, measured, baseline)
        | _sameness(entrant, reference, samples[entrant.label])
        for entrant in standing
    ]
    return {
        "name": work.name,
        "title": work.title,
        "baseline": baseline,
        "rows": rows,
        "comparisons": [
            compared
            for comparison in group.comparisons
            if comparison.work == work.name
            and (compared := _compare(comparison, measured, rows)) is not None
        ],
        "differs": _differences(group, work, rows),
        "busy": _busy(rows),
    }


def _row(
    group: Group,
    work: Work,
    entrant: Entrant,
    samples: list[Sample],
    limits: dict[str, Any] | None,
    measured: dict[str, dict[int, float]],
    baseline: str | None,
) -> dict[str, Any]:
    rate = spread(measured[entrant.label].values())
    against = ratio(measured[baseline], measured[entrant.label]) if baseline else None
    shares = [s.foreign_share for s in samples if s.foreign_share is not None and s.round >= 0]
    return {
        "label": entrant.label,
        "tokens_per_second": rate.median,
        "low": rate.low,
        "high": rate.high,
        "ours_over_this": asdict(against) if against else None,
        **_limit(group, work, entrant, rate, limits),
        "peak_bytes": max(s.peak_bytes for s in samples if s.round >= 0),
        "foreign_share": max(shares, default=None),
        "rounds": [_round(s) for s in samples],
    }


def _round(sample: Sample) -> dict[str, Any]:
    kept = asdict(sample)
    for name in ("work", "label", "token_ids"):
        del kept[name]
    return kept


def _limit(
    group: Group, work: Work, entrant: Entrant, rate: Spread, limits: dict[str, Any] | None
) -> dict[str, Any]:
    """GFLOP/s by the formula, and the share of what the machine allows."""
    if group.task == "train":
        token_flops = flops_per_token(group.config, work.context)
    else:
        token_flops = decode_flops(group.config, work.context)
    flops = token_flops * rate.median
    found: dict[str, Any] = {"gigaflops_per_second": flops / 1e9}
    if group.peak_flops is not None:
        found["peak_share"] = flops / group.peak_flops
    if limits is None:
        return found
    peak = limits["flops_per_second"][entrant.dtype]
    if group.task == "train":
        return {**found, "limit_share": flops / peak, "limit": "matmul"}
    limit = decode_limit(
        group.config,
        work.rows,
        work.context,
        entrant.format,
        limits["bytes_per_second"],
        peak,
    )
    share = rate.median / limit.tokens_per_second
    return {**found, "limit_share": share, "limit": limit.bound}


def _sameness(entrant: Entrant, reference: list[Sample], samples: list[Sample]) -> dict[str, Any]:
    """How far tokens (worst round) or first losses are those of the reference."""
    theirs = {sample.round: sample for sample in samples}
    shares = [
        agreement(mine.token_ids, theirs[mine.round].token_ids or [])
        for mine in reference
        if mine.token_ids and mine.round in theirs
    ]
    if shares:
        return {"same_tokens": min(shares)}
    mine, own = _first_losses(reference), _first_losses(samples)
    return {"loss_difference": loss_difference(mine, own)} if mine and own else {}


def _first_losses(samples: list[Sample]) -> list[float]:
    """Losses of the first steps, the warm-up's included."""
    in_order = sorted(samples, key=lambda sample: sample.round)
    return [loss for sample in in_order for loss in sample.losses or ()][:_FIRST_LOSSES]


def _differences(group: Group, work: Work, rows: list[dict[str, Any]]) -> list[str]:
    """Contestants that had to give the reference's tokens or losses and did not."""
    found = []
    dtypes = {entrant.label: entrant.dtype for entrant in group.entrants}
    for row in rows:
        if row["label"] not in group.must_equal:
            continue
        where = f"{work.name}: {row['label']}"
        if row.get("same_tokens", 1.0) < 1.0:
            share = row["same_tokens"]
            found.append(f"{where} gives other greedy tokens than {group.reference} ({share:.1%})")
        allowed = max(
            LOSS_TOLERANCE[dtypes[row["label"]]], LOSS_TOLERANCE[dtypes[group.reference or ""]]
        )
        difference = row.get("loss_difference")
        if difference is not None and not difference <= allowed:
            found.append(
                f"{where}: the first losses differ from {group.reference}'s by {difference:.2%}, "
                f"more than {allowed:.1%}"
            )
    return found


def _compare(
    comparison: Comparison, measured: dict[str, dict[int, float]], rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """A comparison both of whose sides were measured."""
    by_label = {row["label"]: row for row in rows}
    ours = by_label.get(comparison.ours)
    if ours is None:
        return None
    said = {"ours": comparison.ours, "peer": comparison.peer, "bar": comparison.bar}
    if comparison.peer in _SHARES:
        share = ours.get(_SHARES[comparison.peer])
        if share is None:
            return None
        found = Spread(share, *(share * ours[k] / ours["tokens_per_second"] for k in _ENDS))
    elif comparison.peer in by_label:
        found = ratio(measured[comparison.ours], measured[comparison.peer])
        assert found is not None
    else:
        return None
    reached = None if comparison.bar is None else found.median >= comparison.bar
    return {**said, **asdict(found), "reached": reached}


_ENDS = ("low", "high")
_SHARES = {LIMIT: "limit_share", PEAK: "peak_share"}


def _busy(rows: list[dict[str, Any]]) -> list[str]:
    """Contestants next to whom something else ran."""
    return [
        row["label"]
        for row in rows
        if row["foreign_share"] is not None and row["foreign_share"] > FOREIGN_LIMIT
    ]
