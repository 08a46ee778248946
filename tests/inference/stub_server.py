"""A scripted OpenAI-compatible server on 127.0.0.1: it answers, refuses, hangs, breaks, on demand.

In a test: `with StubServer(script) as server: ... server.url, server.requests`. Alone, as a process
for measurements: `python stub_server.py --latency 0.05` prints its port and runs until stdin ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["answer", "raw", "hang", "disconnect", "truncate"]


@dataclass(frozen=True)
class Request:
    """What arrived: the how-many-th (from 0), where, with which headers, the parsed body."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The prompt as text: the last message, the text, or the token ids."""
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body["prompt"])


@dataclass(frozen=True)
class React:
    """What to do with a request; the default answers "echo: PROMPT" with usage."""

    kind: Kind = "answer"
    delay: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    body: bytes = b""
    finish_reason: str = "stop"
    usage: bool = True


Script = Callable[[Request], React]


def status(code: int, message: str = "no", **headers: str) -> React:
    """An error with OpenAI's body."""
    body = json.dumps({"error": {"message": message}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return React("raw", status=code, body=body, headers=named)


class StubServer:
    """Runs in a thread of this process; `requests` are all that came, `answered` those paid."""

    def __init__(self, script: Script = lambda request: React()):
        self.script = script
        self.requests: list[Request] = []
        self.answered: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self.url = ""

    def __enter__(self) -> StubServer:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def prompts(self) -> list[str]:
        """The prompts of the answered requests, sorted."""
        return sorted(request.prompt for request in self.answered)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; requests one after the other."""

    def __init__(self, server: StubServer):
        self.server = server
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        plain = dict(line.split(": ", 1) for line in lines[1:])
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        path = lines[0].split()[1]
        server = self.server
        request = Request(len(server.requests), path, plain, json.loads(rest[:length]))
        server.requests.append(request)
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        react = server.script(request)
        if react.kind != "hang":
            asyncio.get_running_loop().call_later(react.delay, self.react, request, react)

    def react(self, request: Request, react: React) -> None:
        self.server.in_flight -= 1
        if react.kind == "disconnect":
            self.transport.abort()
            return
        body = answer(request, react) if react.kind in ("answer", "truncate") else react.body
        if react.kind == "answer":
            self.server.answered.append(request)
        lines = [f"HTTP/1.1 {react.status} X", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in react.headers.items()]
        whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        if react.kind == "truncate":
            self.transport.write(whole[:-20])
            self.transport.close()
            return
        self.transport.write(whole)


def answer(request: Request, react: React) -> bytes:
    """The reply's body, for chat and completions, with n choices, logprobs and echo."""
    body = request.body
    text = f"echo: {request.prompt}" if react.text is None else react.text
    seed = body.get("seed", 0)
    choices = []
    for index in range(body.get("n", 1)):
        varied = (
            text if body.get("temperature", 1) == 0 or react.text else f"{text} #{seed}+{index}"
        )
        choice: dict[str, Any] = {"index": index, "finish_reason": react.finish_reason}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": varied}
        elif body.get("echo"):
            ids = [*body["prompt"], 7]
            values = [None, *(-token / 100 for token in ids[1:])]
            choice |= {"text": "x", "logprobs": {"tokens": [], "token_logprobs": values}}
        else:
            choice["text"] = varied
            if body.get("return_token_ids"):
                choice["token_ids"] = [1, 2, 3]
            if body.get("logprobs"):
                choice["logprobs"] = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25]}
        choices.append(choice)
    reply: dict[str, Any] = {"id": "x", "object": "completion", "choices": choices}
    if react.usage:
        number = len(choices)
        reply["usage"] = {"prompt_tokens": 10, "completion_tokens": 5 * number}
    return json.dumps(reply).encode()


# ------------------------------------------------------------- alone, lean, for measurements


class _Lean(asyncio.Protocol):
    """Every request gets the same bytes after a fixed time; bodies are not read."""

    def __init__(self, latency: float, reply: bytes):
        self.latency, self.reply, self.buffer = latency, reply, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        begin = self.buffer.lower().find(b"content-length:", 0, end) + 15
        length = int(self.buffer[begin : self.buffer.find(b"\r", begin)])
        if len(self.buffer) >= end + 4 + length:
            self.buffer = self.buffer[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.latency, self.transport.write, self.reply)


async def _serve_alone(latency: float) -> None:
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "42"},
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub"}
    body = json.dumps({**reply, "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    whole = head.encode() + b"\r\n\r\n" + body
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Lean(latency, whole), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds per request")
    asyncio.run(_serve_alone(parser.parse_args().latency))
