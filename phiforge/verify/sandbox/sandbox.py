"""Runs foreign Python programs contained: `with Sandbox() as sandbox: sandbox.run(task)`.

A task is {"kind": "program", "source": "print(1)"} or another kind of `jail/harness.py`. Nothing is
written outside of the run's own folder, which is gone when `run` returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import selectors
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phiforge.verify.sandbox import backends, interpreter
from phiforge.verify.sandbox.jail import clear, seccomp, start, supervise
from phiforge.verify.sandbox.layers import Layers
from phiforge.verify.sandbox.limits import Limits

Backend = Literal["auto", "native", "bubblewrap", "sandlock"]
Ended = Literal["exited", "signal", "timeout", "memory", "output", "disk"]

WITHOUT = ("namespaces", "landlock", "seccomp")
DEFAULT_LIMITS = Limits()
_ADVICE = (
    ": enable user namespaces or Landlock, install bubblewrap, or pass unsafe=True (--unsafe) "
    "where losing this machine's files is acceptable"
)
_START_SECONDS = 120.0  # preloaded modules may be large
_GRACE_SECONDS = 10.0  # beyond the wall limit, for the supervisor to clear up
_CHUNK = 65536
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "TZ": "UTC",
}


class SandboxUnavailable(RuntimeError):
    """Foreign code cannot be contained here; the message says which layer is missing, and why."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended and what it left; made by foreign code: to be shown, never obeyed."""

    ended: Ended
    returncode: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    report: Any  # the harness's JSON; None when the process ended before the harness did
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class Sandbox:
    """A server that contains one program per `run`; may be used from many threads at once."""

    def __init__(
        self,
        *,
        backend: Backend = "auto",
        warm: bool = True,
        preload: Sequence[str] = (),
        readable: Sequence[Path | str] = (),
        python: Path | None = None,
        without: Collection[str] = (),
        unsafe: bool = False,
    ) -> None:
        """Start the server and find out what this machine allows.

        Args:
            backend: who isolates; "auto" is our own layers, else bubblewrap, else sandlock.
            warm: run in a fork of the server in place of a new interpreter: the same isolation.
            preload: modules imported once for all warm runs.
            readable: files and folders that programs may read beside Python's own.
            python: interpreter that runs the programs; the running one by default.
            without: layers to leave out, to see what a poorer machine would do.
            unsafe: run even where files or network are not isolated.

        Raises:
            SandboxUnavailable: files or network cannot be isolated here.
            ValueError: an option that makes no sense.
        """
        self._refuse_other_systems()
        unknown = sorted(set(without) - set(WITHOUT))
        if unknown:
            raise ValueError(f"without: {', '.join(unknown)}; layers are {', '.join(WITHOUT)}")
        if backend not in ("auto", *backends.NAMES):
            raise ValueError(f"backend: {backend!r}; choose auto, {', '.join(backends.NAMES)}")
        if preload and backend in backends.NAMES[1:]:
            raise ValueError(f"preload: {backend} starts a new interpreter for every run")
        missing = [str(path) for path in readable if not Path(path).exists()]
        if missing:
            raise ValueError(f"readable: {', '.join(missing)} does not exist")
        self._backend: Backend = backend
        self._warm = warm
        self._preload = list(preload)
        self._without = sorted(set(without))
        self._unsafe = unsafe
        self._python = interpreter.describe(python)
        self._readable = [str(Path(path).absolute()) for path in readable]
        self._lock = threading.RLock()
        self.layers: Layers = self._start()

    @staticmethod
    def _refuse_other_systems() -> None:
        system, machine = platform.system(), platform.machine()
        if system != "Linux" or machine not in seccomp.MACHINES:
            wanted = " or ".join(seccomp.MACHINES)
            text = f"the sandbox needs Linux on {wanted}; this is {system} on {machine}"
            raise SandboxUnavailable(f"{text}. Run this stage in a Linux machine or container")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every run with it; a later `run` raises SandboxUnavailable."""
        with self._lock:
            self._channel.close()
            if self._owner == os.getpid():
                try:
                    self._server.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._server.kill()
                    self._server.wait()
                clear.remove(self._scratch)

    def __del__(self) -> None:
        if hasattr(self, "_scratch"):
            with contextlib.suppress(Exception):
                self.close()

    def _start(self) -> Layers:
        """Start the server of the first backend that isolates files and network here."""
        self._owner = os.getpid()
        names = backends.NAMES if self._backend == "auto" else (self._backend,)
        attempts = [(name, False) for name in names]
        if self._unsafe:
            attempts.append((names[0], True))
        refusals: dict[str, str] = {}
        for name, unsafe in attempts:
            try:
                layers = self._start_server(name, unsafe)
            except SandboxUnavailable as error:
                refusals[name] = str(error)
            else:
                refusals.pop(name, None)
                return replace(layers, missing={**layers.missing, **refusals})
        reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        advice = _ADVICE if "native" in names else ""
        raise SandboxUnavailable(f"{reasons}. Foreign code is not run{advice}")

    def _start_server(self, backend: str, unsafe: bool) -> Layers:
        jail_folder = str(Path(__file__).parent)
        readable = [*self._python.paths(), jail_folder, *self._readable]
        wrapper = None
        if backend != "native":
            wrapper, why = backends.find(backend, self._python, jail_folder, readable)
            if wrapper is None:
                raise SandboxUnavailable(why)
        # Programs of another user make their folders here: like /tmp, but nobody can list it.
        self._scratch = tempfile.mkdtemp(prefix="phiforge-sandbox-")
        os.chmod(self._scratch, 0o1733)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = supervise.interpreter_command(self._python.executable, jail_folder, "server")
        with theirs:
            self._server = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        settings = {
            "executable": self._python.executable,
            "jail_folder": jail_folder,
            "preload": self._preload if self._warm and not wrapper else [],
            "readable": readable,
            "scratch": self._scratch,
            "site": self._python.site,
            "warm": self._warm,
            "without": self._without,
            "wrapper": asdict(wrapper) if wrapper else None,
        }
        layers = self._greet(settings, backend, unsafe)
        if wrapper and self._preload:
            layers.missing["preload"] = f"{backend} starts a new interpreter for every run"
        return layers

    def _greet(self, settings: dict[str, Any], backend: str, unsafe: bool) -> Layers:
        try:
            self._channel.settimeout(_START_SECONDS)
            self._channel.send(json.dumps(settings).encode())
            answer: dict[str, Any] = json.loads(
                self._channel.recv(_CHUNK) or b'{"failed": "it ended"}'
            )
        except OSError as error:
            answer = {"failed": str(error)}
        self._channel.settimeout(None)
        if "failed" in answer:
            self.close()
            raise SandboxUnavailable(f"the sandbox server did not start: {answer['failed']}")
        layers = Layers(backend, **answer)
        if not layers.enough and not unsafe:
            self.close()
            raise SandboxUnavailable(_refusal(layers))
        if "file tree" in layers.active:  # it was built there, and is in use no more
            os.rmdir(self._scratch)
        return layers

    def run(self, task: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Run one task to its end, whatever that is; raises only SandboxUnavailable."""
        if self._owner != os.getpid():  # a fork of the process that made this sandbox
            with self._lock:
                if self._owner != os.getpid():
                    self.layers = self._start()
        raw = json.dumps({"limits": asdict(limits), "task": dict(task)}).encode()
        with contextlib.ExitStack() as stack:
            connection, pipes = self._request(stack)
            return _follow(connection, pipes, struct.pack("q", len(raw)) + raw, limits)

    def _request(self, stack: contextlib.ExitStack) -> tuple[socket.socket, list[int]]:
        """Send the server one end of a connection and of three pipes; returns the other ends."""
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        ends = [os.pipe() for _ in range(3)]
        for read, _ in ends:
            stack.callback(os.close, read)
        try:
            with theirs, self._lock:
                writes = [write for _, write in ends]
                socket.send_fds(self._channel, [b"run"], [theirs.fileno(), *writes])
        except OSError as error:
            raise SandboxUnavailable(f"the sandbox server is gone: {error}") from None
        finally:
            for _, write in ends:
                os.close(write)
        return ours, [read for read, _ in ends]

    def run_many(
        self,
        tasks: Iterable[Mapping[str, Any]],
        limits: Limits = DEFAULT_LIMITS,
        workers: int | None = None,
    ) -> Iterator[Outcome]:
        """Outcomes in the order of the tasks, `workers` at a time (one per core by default)."""
        count = workers or len(os.sched_getaffinity(0))
        if count < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        waiting: deque[Future[Outcome]] = deque()
        with ThreadPoolExecutor(count) as pool:
            for task in tasks:
                waiting.append(pool.submit(self.run, task, limits))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _refusal(layers: Layers) -> str:
    wanted = {"files": layers.isolates_files, "network": layers.isolates_network}
    lacking = " and ".join(name for name, there in wanted.items() if not there)
    reasons = "; ".join(f"{name}: {why}" for name, why in layers.missing.items())
    return f"{lacking} cannot be isolated here ({reasons})"


def _follow(connection: socket.socket, pipes: list[int], request: bytes, limits: Limits) -> Outcome:
    """Send the request, collect what comes, stop the run when it says too much."""
    deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
    caps = [limits.output_bytes, limits.output_bytes, start.REPORT_BYTES]
    collected = [bytearray() for _ in pipes]
    answer = bytearray()
    flooded = False
    connection.settimeout(_GRACE_SECONDS)
    try:
        connection.sendall(request)
    except OSError:
        raise SandboxUnavailable("the sandbox's supervisor ended before the run") from None
    with selectors.DefaultSelector() as selector:
        for i, pipe in enumerate(pipes):
            selector.register(pipe, selectors.EVENT_READ, i)
        selector.register(connection, selectors.EVENT_READ, None)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SandboxUnavailable("the sandbox's supervisor does not answer")
            for key, _ in ready:
                if key.data is None:
                    part = connection.recv(_CHUNK)
                    answer += part
                else:
                    part = os.read(pipes[key.data], _CHUNK)
                    place, cap = collected[key.data], caps[key.data]
                    flooded |= len(place) + len(part) > cap
                    place += part[: cap - len(place)]
                if not part:
                    selector.unregister(key.fileobj)
            if flooded:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
    return _outcome(answer, collected, flooded)


def _outcome(answer: bytearray, collected: list[bytearray], flooded: bool) -> Outcome:
    try:
        result = json.loads(answer)
    except ValueError:
        raise SandboxUnavailable("the sandbox's supervisor was killed during the run") from None
    if "failed" in result:
        raise SandboxUnavailable(f"the run could not be contained: {result['failed']}")
    ended = result["ended"]
    if flooded:
        ended = "output"
    elif ended in ("client", "killed"):
        raise SandboxUnavailable("the run was killed from outside")
    return Outcome(
        ended=ended,
        returncode=result.get("returncode"),
        signal=result.get("signal"),
        stdout=bytes(collected[0]),
        stderr=bytes(collected[1]),
        report=_parse_report(bytes(collected[2])),
        seconds=result["seconds"],
        cpu_seconds=result["cpu_seconds"],
        peak_bytes=result["peak_bytes"],
    )


def _parse_report(raw: bytes) -> Any:
    """The report as JSON; None if there is none or the program forged something unreadable."""
    try:
        return json.loads(raw) if raw else None
    except (ValueError, RecursionError):
        return None
