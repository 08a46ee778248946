"""Several runs side by side: the headline figures of each, with n and interval, as one table.

Call `compare([folder, ...])` or `phiforge compare runs/nano-s0 runs/nano-s1`; nothing is written.
A figure that a run lacks is "-"; figures come from manifests and evaluate/scores.json alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phiforge.core.progress import clock
from phiforge.core.store import read_manifest
from phiforge.core.usage import UsageError
from phiforge.stages import STAGES

Row = dict[str, Any]
Scores = dict[str, list[Row]]


def compare(folders: Sequence[str | Path]) -> list[dict[str, str]]:
    """One row per figure: {"figure": name, RUN: value, ...} with a column per run.

    Raises UsageError for a folder that is missing or has no finished evaluate stage.
    """
    runs = [Path(folder) for folder in folders]
    names = [run.name for run in runs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two of the runs are named {sorted(repeated)[0]}; names must differ")
    columns = [_figures(run) for run in runs]
    order = list(dict.fromkeys(key for column in columns for key in column))
    return [
        {"figure": key, **{n: c.get(key, "-") for n, c in zip(names, columns, strict=True)}}
        for key in order
    ]


def _figures(run: Path) -> dict[str, str]:
    if not run.is_dir():
        raise UsageError(f"{run}: no such run folder; check the path")
    manifest = read_manifest(run / "evaluate")
    if manifest is None:
        raise UsageError(f"{run}: stage evaluate is not finished; run the recipe to its end")
    scores: Scores = json.loads((run / "evaluate" / "scores.json").read_text(encoding="utf-8"))
    return {
        "clock, all stages": _clock(run),
        **_accuracy(scores),
        **_paired(scores),
        **_recall(scores),
        **_refusals(scores),
        **_bits(scores),
    }


def _clock(run: Path) -> str:
    manifests = [read_manifest(run / stage.name) for stage in STAGES]
    return clock(sum(manifest["seconds"] for manifest in manifests if manifest))


def _cell(row: Row) -> str:
    return (
        f"{100 * row['share']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}], n={row['n']}"
    )


def _cells(rows: list[Row], name: Callable[[Row], str]) -> dict[str, str]:
    return {name(row): _cell(row) for row in rows}


def _how(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"sampled at T={temperature:g}"


def _accuracy(scores: Scores) -> dict[str, str]:
    rows = [row for row in scores["accuracy"] if row["family"] == "all"]
    rows.sort(key=lambda row: row["temperature"])
    return _cells(rows, lambda r: f"solved %, {_how(r['temperature'])}: {r['checkpoint']}")


def _paired(scores: Scores) -> dict[str, str]:
    found = {}
    for row in scores["comparisons"]:
        if row["measure"] != "accuracy" or row["family"] != "all" or "dpo" not in row["second"]:
            continue
        low, high = 100 * row["low"], 100 * row["high"]
        name = f"{row['first']} → {row['second']}, points, {_how(row['temperature'])}"
        found[name] = (
            f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}], p={row['p_holm']:.1g}"
        )
    return found


def _recall(scores: Scores) -> dict[str, str]:
    names = {"needle": "recall of one pair", "recall": "recall among many pairs", "copy": "copying"}
    rows = sorted(scores["recall"], key=lambda r: (list(names).index(r["task"]), r["length"]))
    return _cells(rows, lambda r: f"{names[r['task']]} % at {r['length']:g}×: {r['checkpoint']}")


def _refusals(scores: Scores) -> dict[str, str]:
    rows = [row for row in scores["refusals"] if row["family"] == "all"]
    rows.sort(key=lambda row: row["asked"], reverse=True)
    return _cells(rows, lambda r: f"refused %, {r['asked']} questions: {r['checkpoint']}")


def _bits(scores: Scores) -> dict[str, str]:
    rows = sorted(scores["bits_per_byte"], key=lambda row: row["source"])
    return {
        f"bits per byte, {r['source']}: {r['checkpoint']}": f"{r['bits_per_byte']:.3f}"
        for r in rows
    }
