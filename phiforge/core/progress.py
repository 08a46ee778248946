"""One line or bar per loop, with rate, remaining time and a heartbeat; numbers to metrics.jsonl.

Call `with progress(total, "tokens", "pretrain") as bar: bar.advance(n, loss=2.1)`. On a terminal
a bar is drawn; elsewhere a plain line is printed at least every ten seconds.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from phiforge.core.files import atomic_path

HEARTBEAT_SECONDS = 10.0


def clock(seconds: float) -> str:
    """Seconds as 0:07, 3:05 or 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def short(value: Any) -> str:
    """A number in at most about six characters: 0.0123, 12.4, 3.1M."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.4g}"


class Bar:
    """Progress of one loop: call `advance(amount, **fields)`; the fields are shown as they are."""

    def __init__(self, total: float, unit: str, label: str, stream: TextIO | None = None):
        self.total, self.unit, self.label = total, unit, label
        self.done = 0.0
        self._start_done = 0.0
        self._fields: dict[str, Any] = {}
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._printed = self._started
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Bar":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        with self._lock:
            self._print(end="\n" if self._terminal else "", final=True)

    def start_at(self, done: float) -> None:
        """Set where a resumed loop starts, so that the rate counts only new work."""
        self.done = self._start_done = done

    def advance(self, amount: float = 1, **fields: Any) -> None:
        """Add finished work and remember the fields to show."""
        with self._lock:
            self.done += amount
            self._fields.update(fields)
            if self._terminal and time.monotonic() - self._printed > 0.2:
                self._print(end="")

    def line(self) -> str:
        """The current state as one line of text."""
        seconds = time.monotonic() - self._started
        new = self.done - self._start_done
        rate = new / seconds if seconds > 0 else 0.0
        share = min(1.0, self.done / self.total) if self.total else 1.0
        parts = [f"{self.label:<12} {share:4.0%}", f"{short(self.done)}/{short(self.total)}"]
        parts[-1] += f" {self.unit}"
        parts.append(f"{short(rate)} {self.unit}/s")
        parts += [f"{name} {short(value)}" for name, value in self._fields.items()]
        parts.append(clock(seconds))
        if new and rate and self.done < self.total:
            parts.append(f"eta {clock((self.total - self.done) / rate)}")
        return "  ".join(parts)

    def _beat(self) -> None:
        interval = 0.5 if self._terminal else HEARTBEAT_SECONDS
        while not self._stopped.wait(interval):
            with self._lock:
                self._print(end="")

    def _print(self, end: str, final: bool = False) -> None:
        self._printed = time.monotonic()
        text = self.line()
        if self._terminal:
            self._stream.write(f"\r\x1b[2K{text[:140]}{end}")
        elif final or self.done < self.total:
            self._stream.write(text + "\n")
        self._stream.flush()


class MetricsLog:
    """Appends one JSON object per line to metrics.jsonl; lines past a resume point are cut."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **fields: Any) -> None:
        """Append one line, flushed."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def rewind(self, key: str, limit: float) -> None:
        """Keep only lines whose `key` is at most `limit` (used when training resumes)."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut by kill -9
            if row.get(key, limit) <= limit:
                kept.append(line)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


@contextmanager
def progress(total: float, unit: str, label: str) -> Iterator[Bar]:
    """A Bar as a context manager."""
    with Bar(total, unit, label) as bar:
        yield bar
