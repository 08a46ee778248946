"""One contestant: a process that prepares once, runs when asked, and otherwise sleeps on its pipe.

`with Contestant(label, command, environment, log) as c: c.ask({"do": "run", ...}, seconds)`; a
crash, a hang or a refusal raises ContestantFailed. Its standard error goes to the file `log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

_LAST_LINES = 3
_GRACE_SECONDS = 5.0


class ContestantFailed(RuntimeError):
    """A contestant crashed, gave no answer in time, or said that it cannot."""


class Contestant:
    """A process behind two pipes, started at once; `close` ends it and whatever it started."""

    def __init__(
        self, label: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.label, self.log = label, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,  # so that its own children can be ended with it
            )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises ContestantFailed, and ends the process, when it dies, says an error, answers
        something else than JSON, or takes longer than `timeout_seconds`.
        """
        self.send(request)
        return self.receive(timeout_seconds)

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request; `receive` fetches its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed(self._how_it_ended()) from None

    def receive(self, timeout_seconds: float) -> dict[str, Any]:
        """The reply to the request sent last; raises as `ask` does."""
        line = self._read_line(timeout_seconds)
        try:
            reply = json.loads(line)
        except ValueError:
            raise self._failed(f"answered something else than JSON: {line[:80]!r}") from None
        if "error" in reply:
            raise self._failed(reply["error"])
        return reply

    def close(self) -> None:
        """Close the pipes; a process that does not end by itself then is killed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                    pipe.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def _read_line(self, timeout_seconds: float) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        end = time.monotonic() + timeout_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise self._failed(f"gave no answer within {timeout_seconds:g} s")
                piece = os.read(file, 1 << 16)
                if not piece:
                    raise self._failed(self._how_it_ended())
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code < 0:
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        said = " | ".join([line for line in lines if line][-_LAST_LINES:])
        return f"ended with exit code {code}" + (f": {said}" if said else "")

    def _failed(self, what: str) -> ContestantFailed:
        self._kill()
        return ContestantFailed(what)

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
