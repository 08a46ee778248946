"""The figures as text: one table per work, comparisons below it, and what to be careful about.

`print(text(result))` of what `bench.run.run` returns. Nothing is written.
"""

from __future__ import annotations

from typing import Any

from phiforge.bench.processor import FOREIGN_LIMIT
from phiforge.bench.results import wrong


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    machine = result["machine"]
    lines = [
        f"{result['date']}  {machine['processor']}, {machine['cores']} cores; "
        f"{result['threads']} threads, {result['repeat']} rounds"
    ]
    for summary in result["groups"]:
        lines += ["", summary["title"], *_limits(summary)]
        for work in summary["works"]:
            lines += ["", f"{work['title']}", *_table(summary, work), *_below(work)]
        lines += [f"FLOPs: {summary['flops_formula']}"]
        if summary["peak_flops"]:
            lines += [
                f"the chip's stated peak: {summary['peak_flops'] / 1e12:,.0f} TFLOP/s in bf16"
            ]
        lines += [f"! {what}" for what in wrong(summary)]
    lines += ["", *result["skipped"]] if result["skipped"] else []
    if result["quick"]:
        lines += ["", "--quick shows that the benchmark works; its figures mean nothing."]
    return "\n".join(lines)


def _limits(summary: dict[str, Any]) -> list[str]:
    limits = summary["limits"]
    if limits is None:
        return []
    rates = ", ".join(
        f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in limits["flops_per_second"].items()
    )
    return [
        f"limits in this run: memory read {limits['bytes_per_second'] / 1e9:,.1f} GB/s; matrix "
        f"products of these shapes {rates} GFLOP/s"
    ]


def _table(summary: dict[str, Any], work: dict[str, Any]) -> list[str]:
    """Aligned columns, the numbers flush right."""
    same = "loss off" if summary["task"] == "train" else "tokens"
    header = ["", "tok/s", "ours / this", "GFLOP/s", "of limit", "peak MB", same, "others"]
    rows = [header, *(_cells(row, work["baseline"]) for row in work["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _cells(row: dict[str, Any], baseline: str | None) -> list[str]:
    against = row["ours_over_this"]
    ratio = "1" if row["label"] == baseline else "-"
    if against and row["label"] != baseline:
        ratio = _spread(against)
    share, foreign = row.get("limit_share"), row["foreign_share"]
    if (same := row.get("same_tokens")) is not None:
        alike = "same" if same == 1.0 else f"{same:.0%}"
    else:
        off = row.get("loss_difference")
        alike = "-" if off is None else f"{off:.2%}"
    return [
        row["label"],
        f"{row['tokens_per_second']:,.1f}",
        ratio,
        f"{row['gigaflops_per_second']:,.1f}",
        "-" if share is None else f"{share:.0%} {row['limit']}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
        alike,
        "-" if foreign is None else f"{foreign:.0%}",
    ]


def _spread(found: dict[str, float]) -> str:
    digits = 2 if found["median"] < 100 else 0
    numbers = [f"{found[name]:.{digits}f}" for name in ("median", "low", "high")]
    return f"{numbers[0]} ({numbers[1]}..{numbers[2]})"


def _below(work: dict[str, Any]) -> list[str]:
    lines = []
    for found in work["comparisons"]:
        line = f"  {found['ours']} / {found['peer']}: {_spread(found)}"
        if found["bar"] is not None:
            line += f", aim {found['bar']:g}: {'reached' if found['reached'] else 'missed'}"
        lines.append(line)
    if work["busy"]:
        lines.append(
            f"! others took more than {FOREIGN_LIMIT:.0%} of the processors beside "
            f"{', '.join(work['busy'])}: measure again on a quiet machine"
        )
    return lines
