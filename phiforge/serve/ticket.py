"""One call at the engine, as the event loop sees it: what was asked, what has come of it.

`EngineLoop.open(...)` gives a `Ticket`; `await ticket.next_event()` until `ticket.ended`;
`ticket.cancel()` ends it. Nothing is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from phiforge.inference.interface import Completion, Request, TopLogprobs


class ServedToken(Protocol):
    """A token of a stream, as the engine gives it."""

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: TopLogprobs


class ServedStream(Protocol):
    """A sample in the engine's batch."""

    @property
    def done(self) -> bool: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def completion(self) -> Completion: ...
    def take(self) -> Sequence[Any]: ...
    def cancel(self) -> None: ...


class Full(Exception):
    """No room for a call now; `retry_after_seconds` from now there may be."""

    retry_after_seconds = 1


class Stopping(Exception):
    """The server is shutting down."""


class Cancelled(Exception):
    """The call was cancelled, by its client's leaving."""


class EngineFailed(Exception):
    """The engine failed at this call; the cause says how."""


@dataclass(frozen=True)
class ToScore:
    """A prompt whose tokens' log-probabilities are asked for, with so many alternatives each."""

    token_ids: tuple[int, ...]
    num_top: int


@dataclass(frozen=True)
class Started:
    """Every sample of the call has joined the batch."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a prompt's tokens but the first, and the alternatives at each."""

    prompt: int
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True)
class Piece:
    """New tokens of one choice; with its last ones, the whole completion."""

    choice: int
    tokens: tuple[ServedToken, ...]
    completion: Completion | None


Event = Started | Scores | Piece


class Ticket:
    """One call's events, in order: its prompts' scores, Started, pieces. Used on the event loop."""

    def __init__(
        self,
        requests: Sequence[Request],
        to_score: Sequence[ToScore],
        on_cancel: Callable[[Ticket], None],
    ) -> None:
        self.requests, self.to_score = tuple(requests), tuple(to_score)
        self.num_left = len(self.requests) + len(self.to_score)
        self._on_cancel = on_cancel
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._ahead: list[Event] = []  # looked at, not yet given
        self._started = self._stopped = self._told = False

    @property
    def ended(self) -> bool:
        """Whether every event, or the error that came in their place, was received."""
        return self._told or (self._complete and self._events.empty() and not self._ahead)

    @property
    def _complete(self) -> bool:
        return self._started and self.num_left == 0

    async def next_event(self, timeout_seconds: float | None = None) -> Event | None:
        """The next event; None when none came in time.

        Raises what ended the call: EngineFailed, Stopping, Cancelled, or ValueError for a request
        that the engine refused.
        """
        if self._ahead:
            return self._ahead.pop(0)
        try:
            event = await asyncio.wait_for(self._events.get(), timeout_seconds)
        except TimeoutError:
            return None
        if isinstance(event, Exception):
            self._told = True
            raise event
        return event

    async def started(self) -> None:
        """Waits until events can be had or the call has failed; raises what ended it."""
        first = await self._events.get()
        if isinstance(first, Exception):
            self._told = True
            raise first
        self._ahead.append(first)

    def cancel(self) -> None:
        """Ends the call; its rows are free after the engine's step in progress."""
        self.stop(Cancelled())

    def stop(self, error: Exception) -> None:
        """Ends the call with an error, unless it has ended."""
        if not self._stopped and not self._complete:
            self._stopped = True
            self._events.put_nowait(error)
            self._on_cancel(self)

    def receive(self, event: Event | Exception) -> None:
        """Takes an event from the engine's thread."""
        if self._stopped:
            return
        if isinstance(event, Scores) or (isinstance(event, Piece) and event.completion is not None):
            self.num_left -= 1
        self._started |= isinstance(event, Started)
        self._stopped |= isinstance(event, Exception)
        self._events.put_nowait(event)
