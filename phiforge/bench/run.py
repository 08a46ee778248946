"""Runs a benchmark: finds peers, writes models, plays the rounds, collects the figures.

`run(Options(task="engine"))` returns everything as one dictionary; `table.text(result)` prints it.
Writes into a temporary folder of the user's cache (up to 2 GB), which it removes.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phiforge.bench import engine_plan, train_plan
from phiforge.bench.contestant import Contestant
from phiforge.bench.engine_plan import Setting
from phiforge.bench.environments import PEERS, cache_folder, check_name, choose, find
from phiforge.bench.plan import OURS, Entrant, Group, Task
from phiforge.bench.results import summarize
from phiforge.bench.rounds import LIMITS, play
from phiforge.core.distributed import num_cores
from phiforge.core.environment import code_version, environment
from phiforge.core.usage import UsageError

SIZES = {
    "engine": ("nano", "pts", "small-100m", "phi-4-layers"),
    "train": ("nano", "small-100m", "phi-4-layers"),
}
_MODULES = {OURS: "phiforge.bench.ours", LIMITS: "phiforge.bench.limits"}


@dataclass(frozen=True)
class Options:
    """What to measure. No sizes: all this machine can; no peers: all whose environment exists."""

    task: Task
    sizes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    peer_pythons: Mapping[str, str] = field(default_factory=dict)
    repeat: int = 5
    threads: int = 0  # 0 = one per core
    quick: bool = False
    timeout_seconds: float = 600.0


def run(options: Options) -> dict[str, Any]:
    """Measure, and return figures, samples, versions and settings.

    Raises UsageError for unknown sizes or peers, RuntimeError when the limits cannot be measured.
    A contestant that fails is named in the result; the others go on.
    """
    _check(options)
    gpu_bytes = _gpu_bytes()
    sizes = _sizes(options, gpu_bytes)
    peers, skipped = _find_peers(options)
    threads = options.threads or num_cores()
    kernels, why = _kernels(options.task)
    if why:
        skipped.append(f"native kernels: skipped, {why}")
    make = engine_plan.groups if options.task == "engine" else train_plan.groups
    summaries = []
    with _folder() as folder:
        setting = Setting(folder, threads, peers, kernels, gpu_bytes)
        for group in make(sizes, options.quick, setting):
            say(group.title)
            starter = _Starter(group, folder, threads, peers)
            played = play(group, starter.start, options.repeat, options.timeout_seconds, say)
            summaries.append(summarize(group, played))
    return {
        "task": options.task,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": environment(),
        "code": code_version(),
        "threads": threads,
        "repeat": options.repeat,
        "quick": options.quick,
        "environment": {**_thread_settings(threads), **_wait_settings()},
        "skipped": skipped,
        "groups": summaries,
    }


def say(line: str) -> None:
    """Progress, to standard error."""
    print(line, file=sys.stderr, flush=True)


def _check(options: Options) -> None:
    for size in options.sizes:
        if size not in SIZES[options.task]:
            allowed = ", ".join(SIZES[options.task])
            raise UsageError(f"--size {size!r}: choose one of {allowed}")
    for name in options.peer_pythons:
        check_name(name)
    if options.repeat < 1:
        raise UsageError(f"--repeat is {options.repeat}; it must be at least 1")
    if options.threads < 0:
        raise UsageError(f"--threads is {options.threads}; it must be at least 1 (0 = every core)")


def _sizes(options: Options, gpu_bytes: int) -> Sequence[str]:
    if "phi-4-layers" in options.sizes and not gpu_bytes:
        raise UsageError("--size phi-4-layers needs a GPU, and torch sees none")
    return options.sizes or tuple(
        s for s in SIZES[options.task] if s != "phi-4-layers" or gpu_bytes
    )


def _find_peers(options: Options) -> tuple[dict[str, Path], list[str]]:
    """Pythons of the peers that are there, and a line for each that is not."""
    found, skipped = {}, []
    for peer in choose(list(options.peers), options.task):
        python, remedy = find(peer, options.peer_pythons)
        if python is None:
            skipped.append(remedy)
            say(remedy)
        else:
            found[peer.name] = python
    return found, skipped


def _kernels(task: Task) -> tuple[tuple[Literal["native", "torch"], ...], str | None]:
    """Which kernels of ours can run, and why one kind cannot."""
    import torch  # noqa: F401 - first, so that the kernels share its threads

    from phiforge.core.native.build import unavailable

    why = unavailable("decoder" if task == "engine" else "training")
    return (("native", "torch"), None) if why is None else (("torch",), why)


def _gpu_bytes() -> int:
    import torch

    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(0).total_memory


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for models and logs that is gone afterwards."""
    parent = cache_folder()
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=parent) as folder, _stoppable():
        yield Path(folder)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Take a request to terminate as Ctrl-C, so that processes are ended and files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Starter:
    """Starts the processes of a group, each with the same threads."""

    def __init__(self, group: Group, folder: Path, threads: int, peers: Mapping[str, Path]) -> None:
        self.group, self.folder, self.threads, self.peers = group, folder, threads, peers

    def start(self, entrant: Entrant | None) -> Contestant:
        """The process of an entrant, or of the limits."""
        label = entrant.label if entrant else LIMITS
        program = entrant.program if entrant else LIMITS
        name = "".join(c if c.isalnum() else "-" for c in f"{self.group.name}-{label}")
        return Contestant(
            label, self._command(program), self._environment(), self.folder / f"{name}.log"
        )

    def _command(self, program: str) -> list[str]:
        if program in _MODULES:
            return [sys.executable, "-m", _MODULES[program]]
        # No user site and no PYTHONPATH: what runs is what the peer's environment holds.
        return [str(self.peers[program]), "-s", "-E", str(PEERS[program].script)]

    def _environment(self) -> dict[str, str]:
        given = {**os.environ, **_thread_settings(self.threads)}
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            given.pop(name, None)  # the defaults spin for milliseconds, then sleep
        given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if self.group.device == "cpu":
            given["CUDA_VISIBLE_DEVICES"] = ""
        return given


def _thread_settings(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _wait_settings() -> dict[str, str]:
    return {"OMP_WAIT_POLICY": "library default: threads spin for milliseconds, then sleep"}
