"""A lock that threads get in the order they ask, and may take again while they hold it.

`with turns: ...`. Nothing is written. A thread that drives the engine step after step would win an
ordinary lock every time, and a thread that only wants its tokens would wait until the end.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A fair reentrant lock."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards the fields below, for moments only
        self._owner: int | None = None
        self._depth = 0
        self._queue: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> Turns:
        me = threading.get_ident()
        with self._mutex:
            if self._owner in (me, None):
                self._owner = me
                self._depth += 1
                return self
            turn = threading.Lock()
            turn.acquire()
            self._queue.append((me, turn))
        try:
            turn.acquire()  # until the one before hands over
        except BaseException:  # interrupted while waiting
            self._leave_queue(me, turn)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._mutex:
            self._depth -= 1
            if self._depth == 0:
                self._hand_over()

    def _leave_queue(self, me: int, turn: threading.Lock) -> None:
        with self._mutex:
            if (me, turn) in self._queue:
                self._queue.remove((me, turn))
            else:
                self._hand_over()  # the turn had just come

    def _hand_over(self) -> None:
        self._owner, self._depth = None, 0
        if self._queue:
            self._owner, turn = self._queue.popleft()
            self._depth = 1
            turn.release()
