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
    """New tokens of one choice; with its last ones, or in their place, the whole completion."""

    choice: int
    tokens: tuple[ServedToken, ...]
    completion: Completion | None


Event = Started | Scores | Piece


class Ticket:
    """One call's events, in order: its prompts' scores, Started, pieces. Used on the event loop.

    `in_pieces`: tokens come as they are drawn; else one piece per choice, its whole completion.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        to_score: Sequence[ToScore],
        in_pieces: bool,
        on_cancel: Callable[[Ticket], None],
    ) -> None:
        self.requests, self.to_score = tuple(requests), tuple(to_score)
        self.in_pieces = in_pieces
        self.num_left = len(self.requests) + len(self.to_score)
        self._on_cancel = on_cancel
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._something = asyncio.Event()
        self._started = self._told = False

    @property
    def ended(self) -> bool:
        """Whether every event, or the error that came in their place, was given."""
        return self._told or (self._complete and not self._events)

    @property
    def _complete(self) -> bool:
        return self._started and self.num_left == 0

    async def next_events(self, timeout_seconds: float | None = None) -> list[Event]:
        """The events that have come, at least one; none when none came in time.

        Raises what ended the call: EngineFailed, Stopping, Cancelled, or ValueError for a request
        that the engine refused.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.anything()
        except TimeoutError:
            return []
        events, self._events = self._events, []
        if self._error is None:
            self._something.clear()
        return events

    async def anything(self) -> None:
        """Waits until there is an event; raises what ended the call when there will be none."""
        await self._something.wait()
        if not self._events and self._error is not None:
            self._told = True
            raise self._error

    def cancel(self) -> None:
        """Ends the call; its rows are free after the engine's step in progress."""
        self.stop(Cancelled())

    def stop(self, error: Exception) -> None:
        """Ends the call with an error, unless it has ended."""
        if self._error is None and not self._complete:
            self.receive(error)
            self._on_cancel(self)

    def receive(self, event: Event | Exception) -> None:
        """Takes an event; after an error there are none."""
        if self._error is not None:
            return
        if isinstance(event, Exception):
            self._error = event
        else:
            is_last = isinstance(event, Piece) and event.completion is not None
            self.num_left -= isinstance(event, Scores) or is_last
            self._started |= isinstance(event, Started)
            self._events.append(event)
        self._something.set()
