"""Runs the API on a model: `phiforge serve runs/nano-s0`, or `serve("runs/nano-s0", port=8000)`.

Serves until SIGTERM or Ctrl-C, then takes no more calls and gives running ones some seconds; a
second Ctrl-C ends them at once. Standard output tells the address; nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import uvicorn

from phiforge.core.usage import UsageError
from phiforge.model.folders import find_model
from phiforge.model.quantize import Format
from phiforge.serve.app import DEFAULT_MAX_QUEUE, create_app
from phiforge.serve.ticket import Stopping

DRAIN_SECONDS = 30.0
_CLOSE_SECONDS = 5.0  # to send the last frames after calls were ended


@dataclass(frozen=True)
class Serving:
    """What a server that is ready tells."""

    url: str
    model: str
    runner: str
    context: int
    rows: int
    pid: int


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    weights: str | None = None,
    rows: int = 256,
    max_queue: int = DEFAULT_MAX_QUEUE,
    api_key_env: str | None = None,
    api_key_file: Path | None = None,
    threads: int | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    as_json: bool = False,
) -> None:
    """Loads a run's last model, a model folder or a Hub name and serves it until told to stop.

    `port` 0 takes a free one. `weights`: fp32, bf16, int8, int4 (None: as the model is saved).
    Keys are the words of the environment variable, the lines of the file. Raises UsageError for
    what cannot be served as asked, before the model is loaded; ValueError for a bad folder.
    """
    import torch

    from phiforge.core.distributed import resolve_device
    from phiforge.inference.engine import Engine
    from phiforge.model.huggingface import resolve_folder

    if weights is not None and weights not in get_args(Format):
        raise UsageError(f"--weights is {weights!r}; allowed: {', '.join(get_args(Format))}")
    keys = read_keys(api_key_env, api_key_file)
    folder = find_model(model)
    try:
        resolve_folder(folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    listener = bind(host, port)
    with contextlib.closing(listener):
        if threads is not None:
            torch.set_num_threads(threads)
        engine = Engine.from_folder(
            folder,
            rows=rows,
            weights=cast(Format | None, weights),
            device=resolve_device("auto"),
        )
        name = model_name(folder)
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        if not keys and not _is_loopback(host):
            print(
                f"note: {host} can be reached from other machines and no API key is set "
                "(--api-key-env, --api-key-file)",
                file=sys.stderr,
            )
        app = create_app(
            engine,
            name,
            created=_created(folder),
            max_queue=max_queue,
            keys=keys,
            hosts=_local_names(host) if _is_loopback(host) else None,
        )
        told = Serving(address, name, engine.name, engine.context, rows, os.getpid())
        server = Server(app, drain_seconds, lambda: _tell(told, bool(keys), as_json))
        asyncio.run(server.run_until_stopped(listener))


class Server(uvicorn.Server):
    """uvicorn, with calls that end in order: none new, some seconds for the running ones, then
    an error as their last word."""

    def __init__(self, app: Any, drain_seconds: float, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(drain_seconds + _CLOSE_SECONDS) + 1,
        )
        super().__init__(config)
        self._api, self._drain_seconds, self._on_ready = app.state.api, drain_seconds, on_ready
        self._end: asyncio.TimerHandle | None = None

    async def run_until_stopped(self, listener: socket.socket) -> None:
        """Serves until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        await self.serve([listener])

    def stop(self) -> None:
        """Begins the end; called again, ends the running calls now. On the event loop."""
        api_loop = self._api.loop
        stopping = Stopping("the server is shutting down")
        if self.should_exit:
            api_loop.stop_all(stopping)
            return
        self.should_exit = api_loop.draining = True
        if api_loop.num_open:
            print(
                f"serve: finishing {api_loop.num_open} answers, at most {self._drain_seconds:g} s "
                "(again: at once)",
                file=sys.stderr,
                flush=True,
            )
        later = asyncio.get_running_loop().call_later
        self._end = later(self._drain_seconds, api_loop.stop_all, stopping)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._end is not None:
            self._end.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run_until_stopped`: uvicorn's way would end the process by them."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening; UsageError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another (port 0 takes "
            "a free one)"
        ) from None
    return listener


def read_keys(variable: str | None, file: Path | None) -> tuple[str, ...]:
    """API keys: the words of an environment variable, the lines of a file (# begins a comment).

    UsageError when one is named and holds none: a server that should be locked must not be open.
    """
    keys: list[str] = []
    if variable is not None:
        found = os.environ.get(variable, "").split()
        if not found:
            raise UsageError(f"--api-key-env: the variable {variable} is not set or empty")
        keys += found
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {file}: {error}") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UsageError(f"--api-key-file: {file} holds no key; write one a line")
        keys += found
    return tuple(keys)


def model_name(folder: str | Path) -> str:
    """What the API calls a model: its folder's name; RUN-STAGE for a run's; a Hub name as it is."""
    path = Path(folder)
    if not path.is_dir():
        return str(folder)
    path = path.resolve()
    if path.name != "model":
        return path.name
    return "-".join(part for part in (path.parent.parent.name, path.parent.name) if part)


def _created(folder: str | Path) -> int | None:
    config = Path(folder) / "config.json"
    return int(config.stat().st_mtime) if config.is_file() else None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _local_names(host: str) -> set[str]:
    return {host.lower(), "127.0.0.1", "localhost", "::1"}


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(told: Serving, locked: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(told), ensure_ascii=False), flush=True)
        return
    body = {"model": told.model, "messages": [{"role": "user", "content": "12+7=?"}]}
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = " -H 'Authorization: Bearer KEY'" if locked else ""
    print(f"{told.model} on {told.url}/v1  ({told.runner}, context {told.context} tokens)")
    print(f"try: curl {told.url}/v1/chat/completions{key} \\\n  -d {data}", flush=True)
