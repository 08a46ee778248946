"""The faults: each function arms one in the process that calls it, before the command starts.

Call `kill_at("pretrain", 7)`. Operations are what makes a change durable (fsync, rename, replace);
they are counted per stage, in the same order in every run. Nothing is written, except by counting.
"""

import ctypes
import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_OPERATIONS = ("replace", "rename", "fsync")


def _before_each_operation(act: Callable[[str, int], None]) -> None:
    """Call act(stage, number) before each durable operation of a stage."""
    from phiforge.core.store import Run

    counts: Counter[str] = Counter()
    running: list[str] = []

    def patched(original):
        def call(*args, **kwargs):
            if running:
                counts[running[-1]] += 1
                act(running[-1], counts[running[-1]])
            return original(*args, **kwargs)

        return call

    make = Run._make

    def made(self, request, function, inputs):
        running.append(request.stage)
        try:
            return make(self, request, function, inputs)
        finally:
            running.pop()

    Run._make = made
    for name in _OPERATIONS:
        setattr(os, name, patched(getattr(os, name)))


def count_operations(file: str) -> None:
    """Keep the number of durable operations of each stage in `file`, as JSON."""
    seen: Counter[str] = Counter()

    def count(stage: str, number: int) -> None:
        seen[stage] = number
        Path(file).write_text(json.dumps(seen))

    _before_each_operation(count)


def kill_at(stage: str, operation: int) -> None:
    """kill -9 just before a durable operation of a stage."""
    _signal_at(stage, operation, signal.SIGKILL)


def interrupt_at(stage: str, operation: int) -> None:
    """Ctrl-C just before a durable operation of a stage."""
    _signal_at(stage, operation, signal.SIGINT)


def _signal_at(stage: str, operation: int, number: int) -> None:
    def act(at: str, count: int) -> None:
        if (at, count) == (stage, operation):
            os.kill(os.getpid(), number)

    _before_each_operation(act)


def pause_at(stage: str, operation: int, file: str) -> None:
    """Make `file` and sleep, at most two minutes, before a durable operation of a stage."""

    def act(at: str, count: int) -> None:
        if (at, count) == (stage, operation):
            Path(file).touch()
            time.sleep(120)

    _before_each_operation(act)


def judge_by_length() -> None:
    """Call every answer of even length right, so that an untrained model has pivotal tokens."""
    import phiforge.verify.answers

    phiforge.verify.answers.is_correct = lambda problem, response: len(response) % 2 == 0


def limit_file_size(num_bytes: int) -> None:
    """No file may grow beyond this: writes fail as they do on a full disk (EFBIG)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def obey_permissions() -> None:
    """Give up root's right to pass over file permissions; no change for an ordinary user."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0 and libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset: cannot give up capabilities")
