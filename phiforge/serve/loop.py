"""One thread that drives the engine for every open call, and hands tokens to asyncio.

`loop.open(requests, to_score, in_pieces)` on the event loop gives a `Ticket` (serve/ticket.py),
whose events come as the engine makes them; cancelling it frees its rows at the engine's next step.
Nothing is written.

All engine calls happen on the engine's thread, in turn: commands that came in, then one step for
all samples. Only events cross over, one wake-up of asyncio a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    ToScore,
)


class ServedEngine(Protocol):
    """What the loop needs of an engine."""

    rows: int

    def submit(self, request: Request) -> ServedStream: ...
    def step(self) -> bool: ...
    def submit_score(
        self, prompt: Sequence[int], completion: Sequence[int], top_logprobs: int
    ) -> ServedStream: ...


@dataclass
class _Sample:
    """A stream of the engine: choice `index` of a call, or the scores of its prompt `index`."""

    ticket: Ticket
    index: int
    stream: ServedStream
    is_score: bool


class EngineLoop:
    """Shares one engine among calls: at most `engine.rows` + `max_queue` samples are open."""

    def __init__(self, engine: ServedEngine, max_queue: int) -> None:
        self._engine = engine
        self.max_samples = engine.rows + max_queue
        self.draining = False
        self._open: set[Ticket] = set()
        self._inbox: SimpleQueue[tuple[Callable[[Ticket], None], Ticket] | None] = SimpleQueue()
        # The engine's thread's own, as _events is:
        self._samples: list[_Sample] = []
        self._scored: list[Ticket] = []
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

    def open(
        self, requests: Sequence[Request], to_score: Sequence[ToScore], in_pieces: bool
    ) -> Ticket:
        """Takes a call in. Raises Full, Stopping, or EngineFailed when the thread has ended."""
        if self.draining:
            raise Stopping("the server is shutting down; ask another, or this one later")
        if not self.alive:
            raise EngineFailed("the engine has stopped; restart the server")
        drop = partial(self._tell_thread, self._drop)
        ticket = Ticket(requests, to_score, in_pieces, drop)
        if self.num_open + ticket.num_left > self.max_samples:
            raise Full(
                f"{self.num_open} samples are running or waiting and this call asks for "
                f"{ticket.num_left} more; the server takes {self.max_samples}: try again later"
            )
        self._open.add(ticket)
        self._tell_thread(self._admit, ticket)
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

    def _tell_thread(self, do: Callable[[Ticket], None], ticket: Ticket) -> None:
        self._inbox.put((do, ticket))

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
                self._step()
                self._flush()
        except BaseException as error:
            self._asyncio.call_soon_threadsafe(self.stop_all, _told(error))
            raise

    def _take_commands(self) -> bool:
        """Obeys what came in; waits for something when there is no work. False: the end."""
        while True:
            idle = not self._samples and not self._events
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
            asked = [
                partial(self._engine.submit_score, it.token_ids[:1], it.token_ids[1:], it.num_top)
                for it in ticket.to_score
            ]
            self._submit(ticket, asked, is_score=True)
        else:
            self._begin(ticket)

    def _begin(self, ticket: Ticket) -> None:
        asked = [partial(self._engine.submit, request) for request in ticket.requests]
        if self._submit(ticket, asked, is_score=False):
            self._events.append((ticket, Started()))

    def _submit(
        self, ticket: Ticket, asked: Sequence[Callable[[], ServedStream]], is_score: bool
    ) -> bool:
        """Whether the engine took them all; if not, the call has failed."""
        try:
            for index, submit in enumerate(asked):
                self._samples.append(_Sample(ticket, index, submit(), is_score))
        except Exception as error:
            self._fail(ticket, error)
            return False
        return True

    def _drop(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self._events.append((ticket, None))

    def _forget(self, ticket: Ticket) -> None:
        """Cancels what is left of a call; its rows are free with that."""
        for sample in self._samples:
            if sample.ticket is ticket:
                sample.stream.cancel()
        self._samples = [sample for sample in self._samples if sample.ticket is not ticket]

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        self._forget(ticket)
        self._events.append((ticket, _told(error)))

    def _step(self) -> None:
        if not self._samples:
            return
        try:
            busy = self._engine.step()
        except Exception as error:  # not one request's fault: the engine tells those apart itself
            self._fail_all(error)
            return
        self._collect()
        if not busy and self._samples:
            self._fail_all(RuntimeError("the engine has no work, but a sample has not ended"))
        for ticket in self._scored:
            self._begin(ticket)
        self._scored.clear()

    def _fail_all(self, error: Exception) -> None:
        for ticket in {sample.ticket for sample in self._samples}:
            self._fail(ticket, error)

    def _collect(self) -> None:
        """Turns what the step made into events, and notes the calls whose scores are all there."""
        samples, self._samples = self._samples, []
        failed: dict[Ticket, BaseException] = {}
        scored: set[Ticket] = set()
        for sample in samples:
            stream, ticket = sample.stream, sample.ticket
            if stream.error is not None:
                failed.setdefault(ticket, stream.error)
                continue
            event = _score_event(sample) if sample.is_score else _piece_event(sample)
            if event is not None:
                self._events.append((ticket, event))
            if not stream.done:
                self._samples.append(sample)
            elif sample.is_score:
                scored.add(ticket)
        for ticket, error in failed.items():
            self._fail(ticket, error)
        unscored = {sample.ticket for sample in self._samples if sample.is_score}
        self._scored += [t for t in scored if t not in unscored and t not in failed]

    def _flush(self) -> None:
        """Hands the events over; an event loop that has closed needs none."""
        events, self._events = self._events, []
        if events:
            with contextlib.suppress(RuntimeError):
                self._asyncio.call_soon_threadsafe(self._deliver, events)


def _piece_event(sample: _Sample) -> Piece | None:
    done = sample.stream.done
    # Taking turns tokens into text: wasted work where nobody reads along.
    tokens = tuple(sample.stream.take()) if sample.ticket.in_pieces else ()
    if not tokens and not done:
        return None
    return Piece(sample.index, tokens, sample.stream.completion if done else None)


def _score_event(sample: _Sample) -> Scores | None:
    if not sample.stream.done:
        return None
    completion = sample.stream.completion
    logprobs = completion.logprobs or ()
    return Scores(sample.index, logprobs, completion.top_logprobs or ((),) * len(logprobs))


def _told(error: BaseException) -> Exception:
    """The user's mistakes as they are; anything else as the engine's failure."""
    if isinstance(error, ValueError):
        return error
    failure = EngineFailed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
