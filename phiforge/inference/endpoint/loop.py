"""One event loop in a thread of its own, so that plain functions (and notebooks) can wait for it.

`work = LoopThread().submit(coroutine)`; `work.wait(tick)` waits for it from any thread and cancels
it on Ctrl-C; `work.cancel()` returns when the coroutine has ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")
TICK_SECONDS = 0.1
# How long Ctrl-C waits for a cancelled job to commit what it has.
CANCEL_SECONDS = 30.0


class Work(Generic[T]):
    """A coroutine that runs in the loop's thread."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop):
        self._ended = threading.Event()
        self.future = asyncio.run_coroutine_threadsafe(self._run(coroutine), loop)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await coroutine
        finally:
            self._ended.set()

    def wait(self, tick: Callable[[], None]) -> T:
        """The result; `tick` is called meanwhile, and once at the end, in the caller's thread.

        What interrupts the wait (Ctrl-C, an error of `tick`) cancels the work.
        """
        try:
            while True:
                done, _ = concurrent.futures.wait([self.future], timeout=TICK_SECONDS)
                tick()
                if done:
                    return self.future.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the work, when it has not ended, and wait until what it keeps is kept."""
        if self.future.cancel():
            self._ended.wait(CANCEL_SECONDS)


class LoopThread:
    """Starts with the first coroutine; ends with `stop`, or with the process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._process = os.getpid()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Work[T]:
        """Run a coroutine there. Raises ValueError in a process forked from the opener's."""
        if os.getpid() != self._process:
            coroutine.close()
            raise ValueError("this endpoint was opened in another process; open one in each")
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, daemon=True, name="endpoint"
                )
                self._thread.start()
        return Work(coroutine, self._loop)

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel what runs, await `last()`, end the thread; nothing happens when none started."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None or os.getpid() != self._process:
            return

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await last()
            await loop.shutdown_default_executor()
            loop.call_soon(loop.stop)

        ended = asyncio.run_coroutine_threadsafe(end(), loop)
        # The garbage collector may run in the loop's own thread, which must not wait for itself.
        if threading.current_thread() is not self._thread:
            ended.result()
            self._thread.join()
            loop.close()
