"""Maps a function over shards: in this process, in worker processes, or on a Ray cluster.

Call `map_shards(function, items, workers=2)`; results come in the order of the items, so the bytes
a stage writes never depend on how many workers it had.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_shards(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int = 1,
    engine: Literal["auto", "process", "ray"] = "auto",
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order.

    `workers` = 1 runs here; more start processes (the function and items must pickle). With
    `engine="ray"` the same calls run as Ray tasks on the cluster that `ray.init` finds. At most
    4 × workers items are in flight, so an endless iterable is fine.

    Raises what `function` raises, RuntimeError when a worker process dies (out of memory), and
    ValueError for an unknown engine or when the [ray] extra is missing.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; use 1 or more")
    if engine not in ("auto", "process", "ray"):
        raise ValueError(f"engine is {engine!r}; use 'auto', 'process' or 'ray'")
    if engine == "ray":
        yield from _map_ray(function, items, workers)
    elif workers == 1:
        yield from map(function, items)
    else:
        yield from _map_processes(function, items, workers)


def _map_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    # spawn: a forked child of a process with torch threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt)
    try:
        waiting: deque[Future[Result]] = deque()
        source = iter(items)
        for item in islice(source, 4 * workers):
            waiting.append(pool.submit(function, item))
        while waiting:
            result = waiting.popleft().result()
            for item in islice(source, 1):
                waiting.append(pool.submit(function, item))
            yield result
    except BrokenProcessPool:
        raise RuntimeError(
            "a data worker died, most likely out of memory; run again with fewer exec.workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which stops the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _map_ray(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    try:
        import ray
    except ImportError:
        raise ValueError("engine 'ray' needs the extra: pip install 'phiforge[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    remote = ray.remote(function)
    waiting: deque[Any] = deque()
    source = iter(items)
    for item in islice(source, 4 * workers):
        waiting.append(remote.remote(item))
    while waiting:
        result = ray.get(waiting.popleft())
        for item in islice(source, 1):
            waiting.append(remote.remote(item))
        yield result
