"""What our endpoint client adds to a server's time: 1,000 calls, 64 in flight, a server of 50 ms.

Run: python bench/endpoint_overhead.py [--calls 1000] [--in-flight 64] [--latency 0.05] [--rounds 5]
Prints per client the median wall and CPU seconds and the share of the ideal; clients interleave,
each run in a process of its own, the stub server in another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STUB = Path(__file__).parents[1] / "tests" / "inference" / "stub_server.py"
CLIENTS = ("streams", "phiforge", "openai")
SAYS = {
    "streams": "raw asyncio streams, answers parsed, nothing else: the floor",
    "phiforge": "phiforge Endpoint with replay cache and ledger on disk",
    "openai": "openai AsyncOpenAI, 64 tasks",
}


def prompts(number: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"What is {i} times 7?"}] for i in range(number)]


def ask_phiforge(port: int, number: int, in_flight: int) -> int:
    from phiforge.inference.endpoint import Endpoint

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.sqlite"
        url = f"http://127.0.0.1:{port}/v1"
        with Endpoint(url, "stub", concurrency=in_flight, cache=cache) as endpoint:
            begin()
            answers = endpoint.generate(prompts(number), max_tokens=16)
            end()
            kept = endpoint.usage["teacher"].spent.calls
    assert kept == number
    return sum(row[0].text == "42" for row in answers)


async def ask_openai(port: int, number: int, in_flight: int) -> int:
    from openai import AsyncOpenAI

    work = list(enumerate(prompts(number)))
    url = f"http://127.0.0.1:{port}/v1"
    found = 0
    async with AsyncOpenAI(base_url=url, api_key="none") as client:

        async def worker() -> None:
            nonlocal found
            while work:
                index, messages = work.pop()
                reply = await client.chat.completions.create(
                    model="stub", messages=messages, max_tokens=16, temperature=1.0, seed=index
                )
                found += reply.choices[0].message.content == "42"

        begin()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        end()
    return found


async def ask_streams(port: int, number: int, in_flight: int) -> int:
    work = list(enumerate(prompts(number)))
    found = 0

    async def worker() -> None:
        nonlocal found
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while work:
            index, messages = work.pop()
            fields = {"model": "stub", "messages": messages, "max_tokens": 16, "seed": index}
            body = json.dumps(fields).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            at = answer.lower().index(b"content-length:") + 15
            length = int(answer[at : answer.index(b"\r", at)])
            reply = json.loads(await reader.readexactly(length))
            found += reply["choices"][0]["message"]["content"] == "42"
        writer.close()

    begin()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    end()
    return found


_clock: list[float] = []


def begin() -> None:
    _clock[:] = [time.perf_counter(), time.process_time()]


def end() -> None:
    wall, cpu = time.perf_counter() - _clock[0], time.process_time() - _clock[1]
    _clock[:] = [wall, cpu]


def one_run(client: str, port: int, number: int, in_flight: int) -> None:
    """In a process of its own: prints wall and CPU seconds."""
    if client == "phiforge":
        good = ask_phiforge(port, number, in_flight)
    elif client == "openai":
        good = asyncio.run(ask_openai(port, number, in_flight))
    else:
        good = asyncio.run(ask_streams(port, number, in_flight))
    assert good == number, f"{good} of {number} answers"
    print(json.dumps(_clock))


def measure(arguments: argparse.Namespace) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {client: [] for client in arguments.clients}
    command = [sys.executable, str(STUB), "--latency", str(arguments.latency)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        port = server.stdout.readline().strip()
        for _ in range(arguments.rounds):
            for client in arguments.clients:
                run = [sys.executable, __file__, "--one", client, "--port", port]
                run += ["--calls", str(arguments.calls), "--in-flight", str(arguments.in_flight)]
                done = subprocess.run(run, capture_output=True, text=True, timeout=120)
                if done.returncode != 0:
                    sys.exit(f"{client}: {done.stderr}")
                found[client].append(json.loads(done.stdout))
        server.stdin.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", nargs="+", default=CLIENTS, choices=CLIENTS)
    parser.add_argument("--one", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_run(arguments.one, arguments.port, arguments.calls, arguments.in_flight)
        return
    ideal = arguments.calls / arguments.in_flight * arguments.latency
    found = measure(arguments)
    print(
        f"{arguments.calls} calls, {arguments.in_flight} in flight, server {arguments.latency:g} s:"
        f" ideal {ideal:.2f} s; median of {arguments.rounds} (range)"
    )
    for client, runs in found.items():
        walls, cpus = zip(*runs, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(
            f"{client:<9} {wall:5.2f} s ({min(walls):.2f} to {max(walls):.2f})  "
            f"{ideal / wall:4.0%} of ideal  client CPU {cpu:.2f} s   {SAYS[client]}"
        )


if __name__ == "__main__":
    main()
