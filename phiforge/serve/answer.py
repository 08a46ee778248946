"""From a ticket's events to an answer: at once (`whole_answer`) or as a stream (`EventStream`).

`leaving(receive, ticket)` ends the ticket when its reader leaves. Nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phiforge.inference.interface import Completion
from phiforge.model.tokenizer import Tokenizer
from phiforge.serve.errors import ApiError, to_json
from phiforge.serve.shape import SCORED, ChoiceShape, Envelope, TokenScore
from phiforge.serve.ticket import (
    Cancelled,
    EngineFailed,
    Event,
    Full,
    Piece,
    Scores,
    Started,
    Stopping,
    Ticket,
)

PING_SECONDS = 15.0  # a stream that is silent for longer says so, lest a proxy cut it


class _Choices:
    """The choices of a call while their events come in."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer) -> None:
        call = envelope.call
        self.shapes = [ChoiceShape(call, tokenizer, i) for i in range(call.num_choices)]
        self.echoed: list[list[TokenScore]] = [[] for _ in self.shapes]
        self.num_generated = 0
        self._n = call.n

    def take_scores(self, event: Scores) -> None:
        """Keeps a prompt's scores for each of its choices."""
        for index in range(event.prompt * self._n, (event.prompt + 1) * self._n):
            shape = self.shapes[index]
            self.echoed[index] = shape.echo(event.logprobs, event.top_logprobs)


async def whole_answer(envelope: Envelope, ticket: Ticket, tokenizer: Tokenizer) -> dict[str, Any]:
    """Waits for every choice; raises what ended the ticket."""
    choices = _Choices(envelope, tokenizer)
    finished: dict[int, Completion] = {}
    while not ticket.ended:
        for event in await ticket.next_events():
            if isinstance(event, Scores):
                choices.take_scores(event)
            elif isinstance(event, Piece) and event.completion is not None:
                finished[event.choice] = event.completion
    told = [
        shape.whole(choices.echoed[index], finished.get(index, SCORED))
        for index, shape in enumerate(choices.shapes)
    ]
    return envelope.whole(told, sum(len(each.token_ids) for each in finished.values()))


async def stream_answer(
    envelope: Envelope, ticket: Ticket, tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    """The events, `data: [DONE]` the last; an error comes as an error object instead of it."""
    choices = _Choices(envelope, tokenizer)
    try:
        while not ticket.ended:
            events = await ticket.next_events(PING_SECONDS)
            told = [chunk for event in events for chunk in _chunks(event, choices)]
            if told:
                yield b"".join(_frame(envelope.chunk(chunk)) for chunk in told)
            elif not events:
                yield b": ping\n\n"
        if envelope.call.include_usage:
            yield _frame(envelope.last_chunk(choices.num_generated))
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _frame(as_api_error(error).body)


def _chunks(event: Event, choices: _Choices) -> Iterator[dict[str, Any]]:
    """What an event adds to the choices of a stream."""
    if isinstance(event, Scores):
        choices.take_scores(event)
    elif isinstance(event, Started):
        for index, shape in enumerate(choices.shapes):
            yield from shape.opening(choices.echoed[index])
    else:
        choices.num_generated += len(event.tokens)
        shape = choices.shapes[event.choice]
        yield from shape.piece(event.tokens)
        if event.completion is not None:
            yield shape.ending(event.completion.finish_reason)


class EventStream(Response):
    """An HTTP answer of server-sent events, given up as soon as its reader leaves.

    Not Starlette's StreamingResponse, which would not tell the ticket of a reader that has left
    before the first event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket) -> None:
        self._events, self._ticket = events, ticket
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with leaving(receive, self._ticket):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def leaving(receive: Receive, ticket: Ticket) -> AsyncIterator[None]:
    """Cancels the ticket when the client closes its connection meanwhile, or the body fails."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        ticket.cancel()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        wait = {"retry-after": str(error.retry_after_seconds)}
        return ApiError(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, Stopping):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, Cancelled):  # nobody hears it
        return ApiError(499, "the client closed the connection", code="cancelled")
    if isinstance(error, EngineFailed):
        log_failure(error.__cause__ or error)
        return ApiError(500, f"the engine failed: {error}", code="engine_failed")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_value")
    log_failure(error)
    return ApiError(500, "the server failed at this request; its log says where", code="internal")


def log_failure(error: BaseException) -> None:
    """Says on standard error where an error arose, without its message: it may hold a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    print(f"serve: {type(error).__name__}\n{where}", file=sys.stderr, flush=True)


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
