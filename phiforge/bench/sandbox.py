"""Runs of tiny programs per second: our sandbox, others, and what the machine allows at most.

`run(Options())` measures and returns everything as one dictionary; `text(result)` prints it. Writes
into temporary folders that it removes.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phiforge.bench import environments
from phiforge.bench.figures import Spread, ratio, spread
from phiforge.bench.processor import FOREIGN_LIMIT, Watch, busy_seconds
from phiforge.bench.runners import BARE, FAILURES, FORK, Runner, open_runners
from phiforge.core.environment import code_version, environment
from phiforge.core.usage import UsageError

WARM_UP = -1
_PAUSE_SECONDS = 0.3  # before each turn: who works now is not one of us
_OURS = ("phiforge cold", "phiforge warm")
_THEIRS = ("bubblewrap alone", "sandlock alone", "rlimits alone")
_AIMS = {"phiforge cold": 20.0, "phiforge warm": 100.0}  # runs per second with 2 workers
_AIM_WORKERS = 2


@dataclass(frozen=True)
class Options:
    """What to measure: `workers` programs at a time; `peer_pythons` as in bench.environments."""

    workers: tuple[int, ...] = (1, 2)
    repeat: int = 5
    quick: bool = False
    peer_pythons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One contestant's turn in one round."""

    round: int
    runs: int
    seconds: float
    busy_seconds: float | None  # of all processors: also what the runs made others do
    others: float | None  # share of the processors that was taken just before
    wrong: int  # programs that did not print what they should

    @property
    def rate(self) -> float:
        return self.runs / self.seconds


def run(options: Options) -> dict[str, Any]:
    """Measure. Raises UsageError for options that make no sense."""
    if options.repeat < 1:
        raise UsageError(f"--repeat is {options.repeat}; it must be at least 1")
    for workers in options.workers:
        if workers < 1:
            raise UsageError(f"--workers is {workers}; it must be at least 1")
    for name in options.peer_pythons:
        if name != "sandlock":
            raise UsageError(f"--peer-python {name}: the only peer with a Python is sandlock")
    peer = environments.PEERS["sandlock"]
    python, remedy = environments.find(peer, options.peer_pythons)
    with _folder() as folder, ExitStack() as stack:
        runners, skipped = open_runners(stack, folder, python, remedy)
        for line in skipped:
            _say(line)
        works = [_work(runners, workers, options) for workers in options.workers]
    return {
        "task": "sandbox",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": environment(),
        "code": code_version(),
        "repeat": options.repeat,
        "quick": options.quick,
        "skipped": skipped,
        "about": {runner.label: runner.about for runner in runners},
        "works": works,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="phiforge-bench-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def programs(round: int, count: int) -> tuple[list[str], list[str]]:
    """Tiny programs, others in each round, and what each prints."""
    numbers = [1000 * (round + 2) + i for i in range(count)]
    return [f"print(sum(range({n})))" for n in numbers], [f"{n * (n - 1) // 2}\n" for n in numbers]


def _work(runners: list[Runner], workers: int, options: Options) -> dict[str, Any]:
    """A warm-up and the rounds; each round another contestant begins."""
    turns: dict[str, list[Turn]] = {runner.label: [] for runner in runners}
    failures: dict[str, str] = {}
    for round in range(WARM_UP, options.repeat):
        _say(f"{workers} at a time: round {round + 1} of {options.repeat}")
        first = max(round, 0) % len(runners)
        for runner in [*runners[first:], *runners[:first]]:
            if runner.label in failures:
                continue
            count = 6 if options.quick else runner.num_runs
            try:
                turns[runner.label].append(_turn(runner, workers, round, count))
            except FAILURES as error:
                failures[runner.label] = f"{type(error).__name__}: {error}"
                _say(f"{runner.label} failed: {failures[runner.label]}")
    return _summary(runners, workers, turns, failures)


def _turn(runner: Runner, workers: int, round: int, count: int) -> Turn:
    sources, expected = programs(round, count)
    watch = Watch()
    time.sleep(_PAUSE_SECONDS)
    others = watch.foreign_share(0.0)
    busy = busy_seconds()
    started = time.perf_counter()
    seconds, outputs = runner.run(sources, workers)
    elapsed, taken = time.perf_counter() - started, busy_seconds()
    if busy is not None:
        busy = taken - busy if taken is not None else None
    wrong = sum(a != b for a, b in zip(outputs, expected, strict=True)) if runner.prints else 0
    return Turn(round, count, elapsed if seconds is None else seconds, busy, others, wrong)


def _summary(
    runners: list[Runner], workers: int, turns: dict[str, list[Turn]], failures: dict[str, str]
) -> dict[str, Any]:
    rates = {
        label: {turn.round: turn.rate for turn in found if turn.round >= 0}
        for label, found in turns.items()
        if label not in failures
    }
    rows = [_row(runner, turns[runner.label], rates) for runner in runners if runner.label in rates]
    comparisons = [
        {"ours": ours, "peer": peer, **asdict(found)}
        for ours in _OURS
        for peer in _THEIRS
        if ours in rates and peer in rates and (found := ratio(rates[ours], rates[peer]))
    ]
    aims = [
        {"label": row["label"], "aim": _AIMS[row["label"]]}
        | {"reached": row["runs_per_second"]["median"] >= _AIMS[row["label"]]}
        for row in rows
        if row["label"] in _AIMS and workers == _AIM_WORKERS
    ]
    return {
        "workers": workers,
        "rows": rows,
        "comparisons": comparisons,
        "aims": aims,
        "failures": failures,
    }


def _row(runner: Runner, turns: list[Turn], rates: dict[str, dict[int, float]]) -> dict[str, Any]:
    own = rates[runner.label]
    measured = [turn for turn in turns if turn.round >= 0]
    cpu = [1e3 * t.busy_seconds / t.runs for t in measured if t.busy_seconds is not None]
    against = ratio(own, rates[runner.limit]) if runner.limit in rates else None
    return {
        "label": runner.label,
        "isolates": runner.isolates,
        "runs_per_second": asdict(spread(own.values())),
        "cpu_milliseconds": asdict(spread(cpu)) if cpu else None,
        "limit": runner.limit,
        "limit_share": asdict(against) if against else None,
        "others": max((t.others for t in measured if t.others is not None), default=None),
        "wrong": sum(turn.wrong for turn in turns),
        "rounds": [asdict(turn) for turn in turns],
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """What a person must look at: contestants that failed, programs that printed something else."""
    found = []
    for work in result["works"]:
        found += [f"{label} failed: {why}" for label, why in work["failures"].items()]
        for row in work["rows"]:
            if row["wrong"]:
                found.append(f"{row['label']}: {row['wrong']} programs gave a wrong answer")
    return found


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    machine = result["machine"]
    lines = [
        f"{result['date']}  {machine['processor']}, {machine['cores']} cores; "
        f"{result['repeat']} rounds; medians (smallest..largest)"
    ]
    for work in result["works"]:
        lines += ["", f"tiny programs, {work['workers']} at a time", *_table(work["rows"])]
        for found in work["comparisons"]:
            shown = _spread(found, 2)
            lines.append(f"  {found['ours']} / {found['peer']}: {shown}")
        for aim in work["aims"]:
            reached = "reached" if aim["reached"] else "missed"
            lines.append(f"  {aim['label']}: aim {aim['aim']:g} runs/s, {reached}")
        busy = [r["label"] for r in work["rows"] if (r["others"] or 0.0) > FOREIGN_LIMIT]
        if busy:
            lines.append(f"! others worked just before {', '.join(busy)}: measure again")
    lines += ["", f"limits: {BARE} for those that start one, {FORK} for those that fork"]
    lines += [f"! {what}" for what in wrong(result)]
    lines += result["skipped"]
    if result["quick"]:
        lines += ["--quick shows that the benchmark works; its figures mean nothing."]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    table = [["", "runs/s", "CPU ms/run", "of limit", "others", "isolates"]]
    for row in rows:
        cpu, share, others = row["cpu_milliseconds"], row["limit_share"], row["others"]
        table.append(
            [
                row["label"],
                _spread(row["runs_per_second"], 1),
                _spread(cpu, 1) if cpu else "-",
                f"{share['median']:.0%}" if share else "-",
                "-" if others is None else f"{others:.0%}",
                row["isolates"],
            ]
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
            + [line[-1]]
        ).rstrip()
        for line in table
    ]


def _spread(found: dict[str, float], digits: int) -> str:
    values = Spread(**{name: found[name] for name in ("median", "low", "high")})
    return f"{values.median:.{digits}f} ({values.low:.{digits}f}..{values.high:.{digits}f})"
