"""How fast to send: a limit on calls in flight that adapts to the server, and its Retry-After.

`permit = await pace.enter()` … `pace.leave()`; tell it `succeeded()` or `throttled(permit, ...)`.
`retry_after(header)` is a server's wait in seconds.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections import deque

CUT = 0.75  # what a 429 leaves of the limit
GROWTH = 1 / 16  # at least so much is added to it per success; 1 / limit where that is more


class Pace:
    """At most `ceiling` calls in flight: multiplicative cut when the server throttles, additive
    growth with every success, and a pause for all when it says how long to wait."""

    def __init__(self, ceiling: int):
        self.ceiling = ceiling
        self.limit = float(ceiling)
        self.in_flight = 0
        self._cuts = 0
        self._resume_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> int:
        """Wait for a place; the number to give back to `throttled`."""
        while True:
            pause = self._resume_at - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.in_flight < max(1, int(self.limit)):
                self.in_flight += 1
                return self._cuts
            else:
                await self._wait_for_place()

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._wake()

    def succeeded(self) -> None:
        """One more answer: the limit grows, by one per round of calls while it is small."""
        if self.limit < self.ceiling:
            self.limit = min(self.ceiling, self.limit + max(1 / self.limit, GROWTH))
            self._wake()

    def throttled(self, permit: int, pause_seconds: float | None) -> None:
        """The server says it is too much. Calls sent before the last cut do not cut again."""
        if permit == self._cuts:
            self._cuts += 1
            self.limit = max(1.0, self.limit * CUT)
        if pause_seconds is not None:
            self._resume_at = max(self._resume_at, time.monotonic() + pause_seconds)

    async def _wait_for_place(self) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._wake()
            raise

    def _wake(self) -> None:
        free = max(1, int(self.limit)) - self.in_flight
        while self._waiting and free > 0:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """A Retry-After header as seconds from `now` (Unix time): a number, or an HTTP date.

    None for no header and for one that is neither.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        seconds = date.timestamp() - (time.time() if now is None else now)
    return max(0.0, seconds) if math.isfinite(seconds) else None
