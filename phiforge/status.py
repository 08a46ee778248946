"""What a run folder holds: one row per stage with its state, clock and main numbers.

Call `stage_rows(folder)`; nothing is written.
"""

import json
import time
from pathlib import Path
from typing import Any

from phiforge.core.progress import clock, short
from phiforge.core.store import check_outputs, read_manifest
from phiforge.stages import STAGES


def stage_rows(folder: Path, verify: bool = False) -> list[dict[str, Any]]:
    """A row per stage that the folder has or whose work has begun; `verify` checks hashes."""
    rows = []
    for stage in STAGES:
        finished, partial = folder / stage.name, folder / f"{stage.name}.partial"
        if finished.exists():
            rows.append(_finished(finished, verify))
        elif partial.exists():
            rows.append({"stage": stage.name, "state": "unfinished", **_last_line(partial)})
    return rows


def _finished(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return {"stage": folder.name, "state": "empty", "clock": "", "facts": ""}
        check_outputs(folder, manifest, hashes=verify)
    except ValueError as error:
        return {"stage": folder.name, "state": "damaged", "clock": "", "facts": str(error)}
    seconds = manifest.get("seconds", 0)
    return {
        "stage": folder.name,
        "state": "done",
        "clock": clock(seconds),
        "seconds": seconds,
        "facts": facts(manifest["metrics"]),
    }


def facts(metrics: dict[str, Any], most: int = 5) -> str:
    """The first few plain numbers of a stage's metrics as one line."""
    plain = {k: v for k, v in metrics.items() if isinstance(v, int | float | str)}
    return "  ".join(f"{key} {short(value)}" for key, value in list(plain.items())[:most])


def _last_line(partial: Path) -> dict[str, Any]:
    log = partial / "metrics.jsonl"
    if not log.exists():
        return {"clock": "", "facts": "no numbers yet"}
    age = time.time() - log.stat().st_mtime
    lines = log.read_text(encoding="utf-8").splitlines()
    try:
        row = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        row = {}
    return {"clock": "", "facts": f"{facts(row)}  (last line {clock(age)} ago)"}
