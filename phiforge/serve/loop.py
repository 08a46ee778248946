"""One thread that drives the engine for every open call, and hands tokens to asyncio.

`loop.open(requests, to_score)` on the event loop gives a `Ticket` (serve/ticket.py), whose events
come as the engine makes them; cancelling it frees its rows at the engine's next step.
Nothing is written.

All engine calls happen on the engine's thread, in turn: commands that came in, one prompt to
score, one step for all samples. Only events cross over, one wake-up of asyncio a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from phiforge.inference.interface import Request
from phiforge.serve.ticket import (
    EngineFailed,
    Event,
    Full,
    Piece,
    Scores,
    ServedStream,
    Started,
    Stopping,
    Ticket,
    TopLogprobs,
    ToScore,
)


class ServedEngine(Protocol):
    """What the loop needs of an engine."""

    rows: int

    def submit(self, request: Request) -> ServedStream: ...
    def step(self) -> bool: ...
    def score_top(
        self, token_ids: Sequence[int], num_top: int
    ) -> tuple[list[float], list[TopLogprobs]]: ...


@dataclass
class _Sample:
    ticket: Ticket
    choice: int
    stream: ServedStream


@dataclass
class _Work:
    """What the engine's thread has before it."""

    samples: list[_Sample] = field(default_factory=list)
    scores: deque[tuple[Ticket, int]] = field(default_factory=deque)


class EngineLoop:
    """Shares one engine among calls: at most `engine.rows` + `max_queue` samples are open."""

    def __init__(self, engine: ServedEngine, max_queue: int) -> None:
        self._engine = engine
        self.max_samples = engine.rows + max_queue
        self.draining = False
        self._open: set[Ticket] = set()
        self._inbox: SimpleQueue[tuple[Callable[[Ticket], None], Ticket] | None] = SimpleQueue()
        self._work = _Work()
        self._thread = threading.Thread(target=self._run, name="phiforge-engine", daemon=True)
        self._events: list[tuple[Ticket, Event | Exception | None]] = []

    # on the event loop --------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine's thread; events go to the running event loop."""
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Samples and prompts to score that are not done."""
        return sum(ticket.num_left for ticket in self._open)

    def open(self, requests: Sequence[Request], to_score: Sequence[ToScore]) -> Ticket:
        """Takes a call in. Raises Full, Stopping, or EngineFailed when the thread has ended."""
        if self.draining:
            raise Stopping("the server is shutting down; ask another, or this one later")
        if not self.alive:
            raise EngineFailed("the engine has stopped; restart the server")
        ticket = Ticket(requests, to_score, lambda it: self._inbox.put((self._drop, it)))
        if self.num_open + ticket.num_left > self.max_samples:
            raise Full(
                f"{self.num_open} samples are running or waiting and this call asks for "
                f"{ticket.num_left} more; the server takes {self.max_samples}: try again later"
            )
        self._open.add(ticket)
        self._inbox.put((self._admit, ticket))
        return ticket

    def stop_all(self, error: Exception) -> None:
        """Ends every open call with an error."""
        for ticket in list(self._open):
            ticket.stop(error)

    async def close(self) -> None:
        """Ends every open call, then the thread."""
        self.draining = True
        self.stop_all(Stopping("the server is shutting down"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _deliver(self, events: list[tuple[Ticket, Event | Exception | None]]) -> None:
        for ticket, event in events:
            if event is not None:
                ticket.receive(event)
            if event is None or isinstance(event, Exception) or ticket.num_left == 0:
                self._open.discard(ticket)

    # on the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._score_one()
                self._step()
                self._flush()
        except BaseException as error:
            self._asyncio.call_soon_threadsafe(self.stop_all, _told(error))
            raise

    def _take_commands(self) -> bool:
        """Obeys what came in; waits for something when there is no work. False: the end."""
        while True:
            idle = not self._work.samples and not self._work.scores and not self._events
            if not idle and self._inbox.empty():
                return True
            command = self._inbox.get()
            if command is None:
                return False
            do, ticket = command
            do(ticket)

    def _admit(self, ticket: Ticket) -> None:
        """Scores come first, so that a stream can tell its prompts' before its answers'."""
        if ticket.to_score:
            self._work.scores.extend((ticket, index) for index in range(len(ticket.to_score)))
        else:
            self._submit(ticket)

    def _submit(self, ticket: Ticket) -> None:
        streams: list[ServedStream] = []
        try:
            for request in ticket.requests:
                streams.append(self._engine.submit(request))
        except Exception as error:
            for stream in streams:
                stream.cancel()
            self._events.append((ticket, _told(error)))
            return
        self._work.samples += [_Sample(ticket, i, stream) for i, stream in enumerate(streams)]
        self._events.append((ticket, Started()))

    def _drop(self, ticket: Ticket) -> None:
        self._forget(ticket)
        if not self._work.samples:
            with contextlib.suppress(Exception):  # nothing is left that could fail
                self._engine.step()  # the cancelled rows' memory comes back at a step
        self._events.append((ticket, None))

    def _forget(self, ticket: Ticket) -> None:
        """Cancels what is left of a call."""
        for sample in self._work.samples:
            if sample.ticket is ticket:
                sample.stream.cancel()
        self._work.samples = [s for s in self._work.samples if s.ticket is not ticket]
        self._work.scores = deque(s for s in self._work.scores if s[0] is not ticket)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        self._forget(ticket)
        self._events.append((ticket, _told(error)))

    def _score_one(self) -> None:
        """Scores one prompt, so that steps of others come between a call's prompts."""
        if not self._work.scores:
            return
        ticket, index = self._work.scores.popleft()
        wanted = ticket.to_score[index]
        try:
            logprobs, top_logprobs = self._engine.score_top(wanted.token_ids, wanted.num_top)
        except Exception as error:
            self._fail(ticket, error)
            return
        self._events.append((ticket, Scores(index, logprobs, top_logprobs)))
        if index == len(ticket.to_score) - 1:
            self._submit(ticket)

    def _step(self) -> None:
        if not self._work.samples:
            return
        try:
            busy = self._engine.step()
        except Exception as error:  # not one request's fault: the engine tells those apart itself
            for ticket in {sample.ticket for sample in self._work.samples}:
                self._fail(ticket, error)
            return
        self._collect()
        if not busy and self._work.samples:
            stuck = RuntimeError("the engine has no work, but a sample has not ended")
            for ticket in {sample.ticket for sample in self._work.samples}:
                self._fail(ticket, stuck)

    def _collect(self) -> None:
        """Turns what the step made into events."""
        left, failed = [], {}
        for sample in self._work.samples:
            stream = sample.stream
            done, error = stream.done, stream.error
            if error is not None:
                failed[sample.ticket] = error
                continue
            tokens = tuple(stream.take())
            if tokens or done:
                completion = stream.completion if done else None
                self._events.append((sample.ticket, Piece(sample.choice, tokens, completion)))
            if not done:
                left.append(sample)
        self._work.samples = left
        for ticket, error in failed.items():
            self._fail(ticket, error)

    def _flush(self) -> None:
        """Hands the events over; an event loop that has closed needs none."""
        events, self._events = self._events, []
        if events:
            with contextlib.suppress(RuntimeError):
                self._asyncio.call_soon_threadsafe(self._deliver, events)


def _told(error: BaseException) -> Exception:
    """The user's mistakes as they are; anything else as the engine's failure."""
    if isinstance(error, ValueError):
        return error
    failure = EngineFailed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
