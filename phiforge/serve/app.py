"""The API: OpenAI's calls on one engine, as a FastAPI application.

`create_app(engine, "name")` for any ASGI server; `phiforge serve FOLDER` runs it. Answers are made
on the engine's one thread (serve/loop.py). Nothing is written; prompts are in no log.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from phiforge import __version__
from phiforge.serve.answer import (
    EventStream,
    as_api_error,
    leaving,
    stream_answer,
    whole_answer,
)
from phiforge.serve.body import ChatBody, CompletionBody, TokenizeBody, parse
from phiforge.serve.call import Call, chat_call, completion_call, tokenize_ids
from phiforge.serve.errors import ApiError, json_response
from phiforge.serve.gate import Gate
from phiforge.serve.loop import EngineLoop
from phiforge.serve.shape import Envelope
from phiforge.serve.ticket import ToScore

MAX_BODY_BYTES = 16 * 2**20
DEFAULT_MAX_QUEUE = 1024  # samples


class Api:
    """What the calls share: the engine, its loop, the model's name."""

    def __init__(self, engine: Any, name: str, created: int, max_queue: int) -> None:
        self.engine, self.name, self.created = engine, name, created
        self.tokenizer = engine.tokenizer
        self.loop = EngineLoop(engine, max_queue)
        made_by = f"{__version__} {engine.name} {engine.mode}"
        self.fingerprint = "fp_" + hashlib.blake2b(made_by.encode(), digest_size=5).hexdigest()

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parse(CompletionBody, await _read(request))
        self._check_model(body.model)
        call = await asyncio.to_thread(completion_call, body, self.tokenizer, self.engine.context)
        return await self._answer(request, call, "cmpl-")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parse(ChatBody, await _read(request))
        self._check_model(body.model)
        call = await asyncio.to_thread(chat_call, body, self.tokenizer, self.engine.context)
        return await self._answer(request, call, "chatcmpl-")

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = parse(TokenizeBody, await _read(request))
        if body.model is not None:
            self._check_model(body.model)
        ids = await asyncio.to_thread(tokenize_ids, body, self.tokenizer)
        texts = [self.tokenizer.decode([token], skip_special=False) for token in ids]
        told = {"count": len(ids), "max_model_len": self.engine.context, "tokens": list(ids)}
        return json_response(told | {"token_strs": texts if body.return_token_strs else None})

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._check_model(request.path_params["name"])
        return json_response(self._model())

    async def health(self, _: Request) -> Response:
        """GET /health: the process and its engine thread are alive."""
        if not self.loop.alive:
            raise ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: new calls are taken."""
        if self.loop.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return await self.health(request)

    def _model(self) -> dict[str, Any]:
        told = {"id": self.name, "object": "model", "created": self.created}
        return told | {"owned_by": "phiforge", "max_model_len": self.engine.context}

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _answer(self, request: Request, call: Call, prefix: str) -> Response:
        self._check_size(call)
        to_score = [ToScore(prompt.token_ids, call.num_top or 0) for prompt in call.scored]
        ticket = self.loop.open(call.requests, to_score, call.stream)
        identity = prefix + secrets.token_hex(12)
        envelope = Envelope(call, identity, int(time.time()), self.name, self.fingerprint)
        if not call.stream:
            async with leaving(request.receive, ticket):
                return json_response(await whole_answer(envelope, ticket, self.tokenizer))
        try:
            await ticket.anything()  # what the engine refuses at once has a status of its own
        except BaseException:
            ticket.cancel()
            raise
        return EventStream(stream_answer(envelope, ticket, self.tokenizer), ticket)

    def _check_size(self, call: Call) -> None:
        wanted, most = call.num_choices + len(call.scored), self.loop.max_samples
        if wanted > most:
            raise ApiError(
                400,
                f"{len(call.prompts)} prompts with n = {call.n} make {wanted} samples (an echo's "
                f"log-probabilities count as one); this server takes {most} at a time",
                param="n" if call.n > 1 else "prompt",
                code="too_many_samples",
            )


def create_app(
    engine: Any,
    name: str,
    *,
    created: int | None = None,
    max_queue: int = DEFAULT_MAX_QUEUE,
    keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application; its EngineLoop is `app.state.api.loop`, started and ended with it.

    `keys`: who sends none of them as a bearer token is refused (empty: nobody is). `hosts`: names
    the Host header may have (None: any), which keeps web pages from reaching a local server by
    a name of their own. `max_queue`: samples that may wait beyond the engine's rows.
    """
    api = Api(engine, name, int(time.time()) if created is None else created, max_queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        api.loop.start()
        yield
        await api.loop.close()

    # FastAPI's own pages load scripts from elsewhere; docs/serve.md describes the calls.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.api = api
    for method, path, call in (
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/tokenize", api.tokenize),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
    ):
        app.router.add_route(path, _told(call), methods=[method])
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Gate, keys=keys, hosts=hosts)
    return app


def _told(call: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """The call with its errors as error objects."""

    async def answer(request: Request) -> Response:
        try:
            return await call(request)
        except Exception as error:
            return as_api_error(error).response()

    return answer


async def _refused(request: Request, error: Any) -> Response:
    """404 and 405 of the router, an HTTPException."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(
        error.status_code, message, code="unknown_url", headers=error.headers
    ).response()


async def _read(request: Request) -> bytes:
    """The body, at most MAX_BODY_BYTES of it."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="too_large")
        parts.append(part)
    return b"".join(parts)
