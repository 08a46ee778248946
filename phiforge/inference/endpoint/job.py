"""Many calls at once: what the cache has, what is missing, who sends it, and when to stop.

`await Job(sender, store, prepared, deliver).run()` gives per call its outcomes in order; `deliver`
gets each Result as it is there. Results go to the store as they come.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from phiforge.inference.endpoint.calls import (
    TROUBLE,
    Answer,
    Call,
    EndpointError,
    Failure,
    Outcome,
    Result,
    TooManyFailures,
    count_kinds,
)
from phiforge.inference.endpoint.replies import dump, load
from phiforge.inference.endpoint.send import Sender, Unit
from phiforge.inference.endpoint.store import Store
from phiforge.inference.endpoint.wire import Prepared

# A job is judged by its failures from this many finished calls on.
JUDGED_FROM = 20
# Shared beginnings count from so many characters (of the prompt's JSON), in doublings.
_PREFIX_LENGTHS = tuple(128 * 2**power for power in range(10))


# Where a sample belongs: the call's position, and which of its samples it is (from 0).
Slot = tuple[int, int]


class Job:
    """One list of prepared calls on its way."""

    def __init__(
        self,
        sender: Sender,
        store: Store,
        prepared: Sequence[Prepared],
        deliver: Callable[[Result], None],
        max_error_share: float,
    ):
        self._sender, self._store, self._prepared = sender, store, prepared
        self._deliver, self._max_error_share = deliver, max_error_share
        self.results: list[list[Outcome | None]] = [[None] * p.call.n for p in prepared]
        self._slots: dict[bytes, list[Slot]] = {}
        self._units: deque[Unit] = deque()
        self._working: dict[asyncio.Task[None], Unit | None] = {}
        self._stop: BaseException | None = None
        self._finished = self._failed = self._in_a_row = 0
        self._messages: Counter[str] = Counter()

    async def run(self) -> list[list[Outcome | None]]:
        """All outcomes. Raises BudgetExceeded, TooManyFailures (with the results so far), or what
        `deliver` and the store raise; everything that was answered is committed before."""
        try:
            await self._plan()
            workers = min(self._sender.pace.ceiling, len(self._units))
            for _ in range(workers):
                self._working[asyncio.create_task(self._work())] = None
            if self._working:
                await asyncio.gather(*self._working, return_exceptions=True)
        finally:
            unfinished = [task for task in self._working if not task.done()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            self._store.flush()
        if self._stop is not None:
            if isinstance(self._stop, EndpointError):
                self._stop.results = self.results
            raise self._stop
        return self.results

    # -------------------------------------------------------------------------------- planning

    async def _plan(self) -> None:
        """Deliver what the cache has; queue the rest, those that share a prefix side by side."""
        keys = [p.sample_keys() for p in self._prepared]
        for position, mine in enumerate(keys):
            for offset, key in enumerate(mine):
                self._slots.setdefault(key, []).append((position, offset))
        found = await asyncio.to_thread(self._store.lookup, list(self._slots))
        cached = 0
        for key, text in found.items():
            answer, slots = load(text), self._slots[key]
            taken = [slot for slot in slots if judge(self._call(slot), answer) is answer]
            self._slots[key] = [slot for slot in slots if slot not in taken]
            for slot in taken:
                self._put(slot, answer)
            cached += len(taken)
        if cached:
            self._store.enter(cached=cached)
        self._finished = cached
        self._units = deque(self._missing(keys))

    def _missing(self, keys: list[list[bytes]]) -> Iterator[Unit]:
        together = self._sender.server.provider_n
        for position in prefix_order([p.text for p in self._prepared]):
            prepared = self._prepared[position]
            first = prepared.call.first_index
            # A sample asked for twice is sent for its first place only.
            mine = [
                (first + offset, key)
                for offset, key in enumerate(keys[position])
                if (slots := self._slots[key]) and slots[0] == (position, offset)
            ]
            if together and mine and not prepared.call.echo:
                yield Unit(prepared, [index for index, _ in mine], [key for _, key in mine])
            else:
                for index, key in mine:
                    yield Unit(prepared, [index], [key])

    def _call(self, slot: Slot) -> Call:
        return self._prepared[slot[0]].call

    # --------------------------------------------------------------------------------- working

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while self._units and self._stop is None:
                unit = self._units.popleft()
                self._working[task] = unit
                outcomes = await self._sender.send(unit, self._is_stopped)
                for key, outcome in zip(unit.keys, outcomes, strict=True):
                    self._take(key, outcome)
                self._store.check()
                self._judge_the_job()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
        except BaseException as error:
            self._end(error)

    def _is_stopped(self) -> bool:
        return self._stop is not None

    def _end(self, error: BaseException) -> None:
        """Send no more; what is on the wire is paid, so it may arrive."""
        if self._stop is not None:
            return
        self._stop = error
        for task, unit in self._working.items():
            if task is not asyncio.current_task() and not (unit is not None and unit.in_flight):
                task.cancel()

    def _take(self, key: bytes, outcome: Outcome) -> None:
        judged = [(slot, judge(self._call(slot), outcome)) for slot in self._slots[key]]
        final = [found for _, found in judged]
        if isinstance(outcome, Answer) and any(found is outcome for found in final):
            self._store.keep(key, dump(outcome))
        elif isinstance(failure := final[0], Failure):
            self._store.fail(key, failure.kind, failure.message)
        self._count(final[0])
        for slot, found in judged:
            self._put(slot, found)

    def _put(self, slot: Slot, outcome: Outcome) -> None:
        position, offset = slot
        self.results[position][offset] = outcome
        self._deliver(Result(position, self._call(slot).first_index + offset, outcome))

    def _count(self, outcome: Outcome) -> None:
        self._finished += 1
        if isinstance(outcome, Failure):
            self._failed += 1
            self._messages[outcome.message] += 1
            self._in_a_row = self._in_a_row + 1 if outcome.kind in TROUBLE else 0
        else:
            self._in_a_row = 0

    def _judge_the_job(self) -> None:
        """Stop when most calls fail, or when a server that did answer stopped answering."""
        if self._max_error_share >= 1 or self._stop is not None:
            return
        many = self._finished >= JUDGED_FROM and (
            self._failed > self._max_error_share * self._finished
        )
        if not many and self._in_a_row < JUDGED_FROM:
            return
        flat = [outcome for row in self.results for outcome in row]
        message, times = self._messages.most_common(1)[0]
        where = self._sender.transport.shown_url
        self._end(
            TooManyFailures(
                f"{where}: stopped, {self._failed} of {self._finished} calls failed "
                f"({count_kinds(flat)}). {times} times: {message}. Put that right and run the same "
                "again: what was answered is replayed from the cache."
            )
        )


def judge(call: Call, outcome: Outcome) -> Outcome:
    """The outcome for one call: an answer that was cut short is a failure unless allowed."""
    if isinstance(outcome, Failure) or outcome.finish_reason == "stop":
        return outcome
    if outcome.finish_reason in call.allow:
        return outcome
    if outcome.finish_reason == "length":
        message = (
            f"cut after {outcome.completion_tokens} tokens (max_tokens {call.sampling.max_tokens}, "
            "or the model's context); raise max_tokens, or allow 'length'"
        )
        return Failure(kind="length", message=message, status=200)
    said = f": {outcome.text[:120]!r}" if outcome.text else ""
    return Failure(
        kind="content_filter",
        message=f"withheld by the server's content filter{said}; reword, or allow 'content_filter'",
        status=200,
    )


def prefix_order(texts: Sequence[str]) -> list[int]:
    """Positions in an order that keeps shared beginnings together, so that a server's prefix cache
    still has them; groups, and prompts without a shared beginning, stay in the given order."""
    first: dict[str, int] = {}
    ranks = []
    for position, text in enumerate(texts):
        rank = [
            first.setdefault(text[:length], position)
            for length in _PREFIX_LENGTHS
            if len(text) >= length
        ]
        ranks.append((*rank, position))
    return sorted(range(len(texts)), key=ranks.__getitem__)
