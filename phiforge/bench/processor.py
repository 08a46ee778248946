"""How busy the processors were while a contestant worked, and who else took part of them.

`watch = Watch()` before, `watch.foreign_share(own_cpu_seconds)` after. Nothing is written.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
# Of the columns user nice system idle iowait irq softirq steal: time that was not ours to take.
_IDLE_COLUMNS = (3, 4)
_COLUMNS = 8
FOREIGN_LIMIT = 0.06  # above it a figure is marked: clean windows stay below
_LEAST_SECONDS = 0.25  # /proc/stat counts hundredths of seconds: shorter says nothing


class Watch:
    """Counts from its making; covers the processors this process may use."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy = busy_seconds()

    def foreign_share(self, own_cpu_seconds: float) -> float | None:
        """Share of the processors that others (and the hypervisor) took since then, 0 to 1.

        None where the system does not tell, or when too little time has passed to say.
        """
        seconds = time.perf_counter() - self._started
        busy = busy_seconds()
        if self._busy is None or busy is None or seconds < _LEAST_SECONDS:
            return None
        taken = busy - self._busy - own_cpu_seconds
        return min(1.0, max(0.0, taken / (seconds * len(cores()))))


def cores() -> list[int]:
    """Numbers of the processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def busy_seconds() -> float | None:
    """Seconds those processors have been busy since the system's start; None where unknown."""
    if not _STAT.exists():
        return None
    wanted = {f"cpu{number}" for number in cores()}
    ticks = 0
    for line in _STAT.read_text().splitlines():
        name, *columns = line.split()
        if name in wanted:
            values = [int(value) for value in columns[:_COLUMNS]]
            ticks += sum(v for place, v in enumerate(values) if place not in _IDLE_COLUMNS)
    return ticks / os.sysconf("SC_CLK_TCK")
