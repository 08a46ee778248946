"""A program that answers one line for each line: kept running, started again when it ends.

`with LineProcess(["python", "check.py"], seconds=60) as program: program.ask('{"a": 1}')`. Writes
nothing; the program runs with the rights of whoever started this one.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

_CHUNK = 65536
_MAX_ANSWER_BYTES = 1 << 20
_SHOWN = 300  # characters of the program's stderr in an error
_LEAVE_SECONDS = 2.0  # for the program to end by itself once its input is closed


class ProgramFailed(Exception):
    """The program did not answer this line; the next one goes to a new process."""


class _Ended(ProgramFailed):
    """It is gone, without an answer."""


class LineProcess:
    """One process, one question at a time; may be used from several threads."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the program. `environment` is added to this process's own.

        Raises ValueError when it cannot be started.
        """
        if not command:
            raise ValueError("the command is empty; give a program and its arguments")
        if not seconds > 0:
            raise ValueError(f"seconds is {seconds}; it must be above 0")
        self.command, self.seconds = list(command), seconds
        self._environment = {**os.environ, **(environment or {})}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        try:
            self._start()
        except OSError as error:
            self._errors.close()
            raise ValueError(f"cannot start {self.command[0]!r}: {error.strerror}") from None

    def __enter__(self) -> LineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the program's input; end it, and what it started, if it stays."""
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(OSError):
                    _pipe(self._process.stdin).close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LEAVE_SECONDS)
                self._stop()
            self._errors.close()

    def ask(self, line: str) -> str:
        """The program's next line. Raises ProgramFailed when there is none in time."""
        if "\n" in line:
            raise ValueError("a question is one line; encode its line breaks (JSON does)")
        with self._lock:
            if self._errors.closed:
                raise ProgramFailed("it is closed")
            try:
                return self._exchange(line.encode() + b"\n")
            except _Ended:
                # It may have ended before this question: nobody looked since the last one.
                return self._exchange(line.encode() + b"\n")

    def _start(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=self._environment,
            start_new_session=True,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(_pipe(pipe).fileno(), False)

    def _stop(self) -> None:
        """End the process and its group."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()

    def _exchange(self, question: bytes) -> str:
        """Ask the running process, or a new one; one that fails is ended."""
        if self._process is None:
            try:
                self._start()
            except OSError as error:
                raise ProgramFailed(f"it cannot be started again: {error.strerror}") from None
        try:
            return self._answer(question).decode(errors="replace")
        except BaseException:
            # What it still prints would be taken for the next question's answer.
            self._stop()
            raise

    def _answer(self, question: bytes) -> bytes:
        """Write the question and read the answer as either side is ready."""
        assert self._process is not None
        to, back = _pipe(self._process.stdin).fileno(), _pipe(self._process.stdout).fileno()
        waiting, answer = memoryview(question), bytearray()
        deadline = time.monotonic() + self.seconds
        with selectors.DefaultSelector() as selector:
            selector.register(to, selectors.EVENT_WRITE)
            selector.register(back, selectors.EVENT_READ)
            while b"\n" not in answer:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise ProgramFailed(f"no answer within {self.seconds:g} s")
                for key, _ in ready:
                    if key.fd == to:
                        waiting = waiting[self._write(to, waiting) :]
                        if not waiting:
                            selector.unregister(to)
                    else:
                        answer += self._read(back)
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise ProgramFailed(f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")
        if waiting:
            raise ProgramFailed("it answered before it had read the question")
        line, _, rest = bytes(answer).partition(b"\n")
        if rest:
            raise ProgramFailed(f"it printed more than one line: {rest[:80]!r}")
        return line

    def _write(self, to: int, waiting: memoryview) -> int:
        try:
            return os.write(to, waiting)
        except OSError:
            raise self._ended() from None

    def _read(self, back: int) -> bytes:
        part = os.read(back, _CHUNK)
        if not part:
            raise self._ended()
        return part

    def _ended(self) -> _Ended:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_SECONDS)
        code = self._process.returncode
        how = "it closed its output" if code is None else f"it ended with exit code {code}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()[-_SHOWN:]
        return _Ended(f"{how}{f': {said}' if said else ''}")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
