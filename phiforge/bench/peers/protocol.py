"""The contestant's end of the pipe: one JSON line in, one JSON line out, nothing else on stdout.

`serve(prepare, run)` answers {"do": "prepare"} and {"do": "run"} until the pipe closes. It writes
to the standard output it was started with; whatever libraries print goes to standard error.

Standard library alone: this file also runs inside peers' environments, on their Python.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
Reply = dict[str, Any]


def serve(prepare: Callable[[Request], Any], run: Callable[[Any, Request], Reply]) -> None:
    """Answer requests: `prepare(request)` gives the state that each `run(state, request)` gets.

    `run` measures its own seconds, so that JSON and pipes cost nothing. An exception becomes
    {"error": ...} and ends the process: its state is no longer to be trusted.
    """
    channel = Channel()
    try:
        settings = next(channel, None)
        if settings is not None:
            answer_runs(channel, prepare(settings), run)
    except Exception as error:
        channel.fail(error)


def answer_runs(channel: "Channel", state: Any, run: Callable[[Any, Request], Reply]) -> None:
    """Say that `state` is ready (with `state.about`), then answer runs until the pipe closes."""
    gc.collect()
    channel.answer({"about": getattr(state, "about", {})})
    for request in channel:
        channel.answer(measured(lambda asked=request: run(state, asked)))


class Channel:
    """Requests come in as an iterator; each is answered once."""

    def __init__(self) -> None:
        die_with_parent()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what anybody prints from now on is no answer

    def __iter__(self) -> "Channel":
        return self

    def __next__(self) -> Request:
        line = sys.stdin.readline()  # blocks: a contestant that waits takes no processor time
        if not line:
            raise StopIteration
        return json.loads(line)

    def answer(self, reply: Reply) -> None:
        """Send one reply."""
        self._out.write(json.dumps(reply) + "\n")
        self._out.flush()

    def fail(self, error: BaseException) -> None:
        """Send what went wrong, and end."""
        traceback.print_exception(type(error), error, error.__traceback__)
        self.answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def die_with_parent() -> None:
    """Let the system end this process when the benchmark is killed in the middle of a run (Linux;
    elsewhere it ends when the run is over and the pipe is found closed)."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def measured(run: Callable[[], Reply]) -> Reply:
    """A run's reply with this process's processor seconds and peak memory during it."""
    reset_peak()
    started = time.process_time()
    reply = run()
    reply["cpu_seconds"] = time.process_time() - started
    reply.setdefault("peak_bytes", peak_bytes())
    return reply


def reset_peak() -> None:
    """Let the peak of resident memory count from now, where the system allows it (Linux)."""
    # Where it is refused the peak counts from the start of the process, loading included.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes, since `reset_peak` where that worked."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
