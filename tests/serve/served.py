"""A tiny model behind the API, in this process: `with running(engine) as served: ...`."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import openai
import torch

from phiforge.inference.engine import Engine
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer, train_tokenizer
from phiforge.serve.app import create_app
from phiforge.serve.server import Server, bind

NAME = "tiny"
CONTEXT = 128


def make_tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words to learn from, words and words"] * 3, 390, num_dummies=2)


def make_model(tokenizer: Tokenizer) -> Phi:
    """Random weights, large enough that answers differ by their prompts."""
    config = PhiConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = Phi(config).initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


class SlowEngine(Engine):
    """An engine whose steps take a while, so that a test can act between them."""

    seconds = 0.02

    def step(self) -> bool:
        time.sleep(self.seconds)
        return super().step()


@dataclass
class Served:
    """A server that runs, and ways to ask it."""

    url: str
    engine: Engine
    api: Any
    server: Server
    loop: asyncio.AbstractEventLoop

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def stop(self) -> None:
        """What a signal does."""
        self.loop.call_soon_threadsafe(self.server.stop)

    def wait_idle(self) -> None:
        """Waits until no call is open."""
        deadline = time.monotonic() + 20
        while self.api.loop.num_open:
            assert time.monotonic() < deadline, "calls do not end"
            time.sleep(0.01)


@contextmanager
def running(engine: Engine, drain_seconds: float = 5.0, **options: Any) -> Iterator[Served]:
    """The API on a free port of 127.0.0.1, in a thread; stopped at the end."""
    app = create_app(engine, NAME, **options)
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(app, drain_seconds, ready.set)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        served = Served(url, engine, app.state.api, server, loops[0])
        yield served
    finally:
        loops[0].call_soon_threadsafe(server.stop)
        thread.join(20)
        assert not thread.is_alive()
