"""Replay cache and usage ledger in one SQLite file: successes, failures, spending, reservations.

`Store(path, role)`; `lookup(keys)`, `keep(key, answer)`, `enter(spent=...)`, `reserve(...)`. What
arrives is committed by a thread within COMMIT_SECONDS, at once when it was idle, and by `flush()`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from phiforge.inference.endpoint.budget import NOTHING, Budget, Spend, Usage
from phiforge.inference.endpoint.database import connect, is_alive, owner

# What a kill -9 can lose: answers that arrived during the last so many seconds.
COMMIT_SECONDS = 0.02
_ENTER = """
INSERT INTO ledger VALUES(?,?,?,?,?,?,?,?,?,?) ON CONFLICT(role) DO UPDATE SET
 calls=calls+excluded.calls, prompt_tokens=prompt_tokens+excluded.prompt_tokens,
 completion_tokens=completion_tokens+excluded.completion_tokens, usd=usd+excluded.usd,
 lost_calls=lost_calls+excluded.lost_calls,
 lost_prompt_tokens=lost_prompt_tokens+excluded.lost_prompt_tokens,
 lost_completion_tokens=lost_completion_tokens+excluded.lost_completion_tokens,
 lost_usd=lost_usd+excluded.lost_usd, cached=cached+excluded.cached
"""
_HOLD = """
INSERT INTO reservations VALUES(?,?,?,?,?,?) ON CONFLICT(owner, role) DO UPDATE SET
 calls=calls+excluded.calls, prompt_tokens=prompt_tokens+excluded.prompt_tokens,
 completion_tokens=completion_tokens+excluded.completion_tokens, usd=usd+excluded.usd
"""
_FAIL = """
INSERT INTO failures VALUES(?,?,?,?,1) ON CONFLICT(key) DO UPDATE SET
 role=excluded.role, kind=excluded.kind, message=excluded.message, times=times+1
"""


@dataclass
class _Pending:
    """What arrived since the last commit."""

    answers: dict[bytes, str] = field(default_factory=dict)
    failures: list[tuple[bytes, str, str]] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)
    spent: Spend = NOTHING
    lost: Spend = NOTHING
    released: Spend = NOTHING
    cached: int = 0
    any: bool = False


class Store:
    """One process's view of the file; safe with other processes, and with this one's threads.

    Without a `path` answers are not kept and the ledger lives in memory.
    """

    def __init__(self, path: Path | None, role: str):
        self.path, self.role = path, role
        self.keeps = path is not None
        self._owner = owner()
        self._database = threading.RLock()  # the connection; taken before the other lock
        self._arrivals = threading.Lock()
        self._pending = _Pending()
        self._connection = connect(path)
        self._arrived = threading.Event()
        self._closing = threading.Event()
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        self._charge_the_dead()

    # ------------------------------------------------------------------------------- answers

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The answers that are there, of so many keys."""
        if not self.keeps:
            return {}
        found: dict[bytes, str] = {}
        with self._database:
            for begin in range(0, len(keys), 500):
                some = keys[begin : begin + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
                found.update(self._run(query, some).fetchall())
        with self._arrivals:
            found.update((key, a) for key in keys if (a := self._pending.answers.get(key)))
        return found

    def keep(self, key: bytes, answer: str) -> None:
        """Remember a success; a recorded failure of the same key goes."""
        if self.keeps:
            with self._arrivals:
                self._pending.answers[key] = answer
            self._announce()

    def fail(self, key: bytes, kind: str, message: str) -> None:
        """Record a failure; it is never replayed."""
        if self.keeps:
            with self._arrivals:
                self._pending.failures.append((key, kind, message))
            self._announce()

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop answers that turned out to be none (they did not fit their schema)."""
        self.flush()
        with self._arrivals:
            self._pending.forgotten.extend(keys)
        self._announce()

    def failures(self) -> dict[str, int]:
        """How many calls failed and were not answered since, by kind."""
        self.flush()
        with self._database:
            query = "SELECT kind, COUNT(*) FROM failures WHERE role=? GROUP BY kind"
            return dict(self._run(query, (self.role,)).fetchall())

    # -------------------------------------------------------------------------------- ledger

    def enter(
        self,
        *,
        spent: Spend = NOTHING,
        lost: Spend = NOTHING,
        released: Spend = NOTHING,
        cached: int = 0,
    ) -> None:
        """Add to the role's ledger; `released` goes back from what this process holds."""
        with self._arrivals:
            pending = self._pending
            pending.spent += spent
            pending.cached += cached
            if lost is not NOTHING:
                pending.lost += lost
            if released is not NOTHING:
                pending.released += released
        self._announce()

    def usage(self) -> dict[str, Usage]:
        """The ledger of every role in the file."""
        self.flush()
        with self._database:
            rows = self._run("SELECT * FROM ledger ORDER BY role").fetchall()
        return {row[0]: Usage(Spend(*row[1:5]), Spend(*row[5:9]), row[9]) for row in rows}

    def reserve(self, worst: Spend, budget: Budget) -> str | None:
        """Hold a call's worst case; or say which limit it could pass, what is spent, what to do."""
        if self._try_to_hold(worst, budget) is None:
            return None
        # What was settled since the last commit is still held with its worst case.
        self.flush()
        return self._try_to_hold(worst, budget)

    def _try_to_hold(self, worst: Spend, budget: Budget) -> str | None:
        with self._transaction():
            spent, held = self._totals()
            refusal = _refusal(worst, spent, held, budget, self.role, self.path)
            if refusal is None:
                self._run(_HOLD, (self._owner, self.role, *_row(worst)))
        return refusal

    def _totals(self) -> tuple[Spend, Spend]:
        """(spent or lost, reserved by any process) of this role."""
        row = self._run("SELECT * FROM ledger WHERE role=?", (self.role,)).fetchone()
        spent = Spend(*row[1:5]) + Spend(*row[5:9]) if row else NOTHING
        sums = "TOTAL(calls), TOTAL(prompt_tokens), TOTAL(completion_tokens), TOTAL(usd)"
        query = f"SELECT {sums} FROM reservations WHERE role=?"
        calls, prompt, completion, usd = self._run(query, (self.role,)).fetchone()
        return spent, Spend(int(calls), int(prompt), int(completion), usd)

    def _charge_the_dead(self) -> None:
        """What killed processes had in flight may have been charged: it counts as lost."""
        with self._transaction():
            for name, role, *held in self._run("SELECT * FROM reservations").fetchall():
                if not is_alive(name):
                    self._run(_ENTER, (role, *_row(NOTHING), *held, 0))
                    self._run("DELETE FROM reservations WHERE owner=?", (name,))

    # ------------------------------------------------------------------------------- commits

    def flush(self) -> None:
        """Commit everything that arrived. Raises OSError when the file cannot be written."""
        self._commit()

    def check(self) -> None:
        """Raise what the thread could not commit; it stays in hand, for the next commit."""
        if (error := self._error) is not None:
            self._error = None
            raise error

    def close(self) -> None:
        """Flush, stop the thread, close the file; may be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._arrived.set()
        if self._thread is not None:
            self._thread.join()
        with self._database:
            try:
                self._commit()
                query = "DELETE FROM reservations WHERE owner=? AND calls<=0"
                self._run(query, (self._owner,))
            finally:
                self._connection.close()

    def _announce(self) -> None:
        self._pending.any = True
        if not self._arrived.is_set():
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(
                    target=self._write, daemon=True, name="replay cache"
                )
                self._thread.start()
            self._arrived.set()

    def _write(self) -> None:
        """The thread: the first arrival after a pause at once, later ones in batches."""
        while not self._closing.is_set():
            self._arrived.wait()
            self._arrived.clear()
            try:
                self._commit()
            except OSError as error:
                self._error = error  # for check()
            self._closing.wait(COMMIT_SECONDS)

    def _commit(self) -> None:
        with self._database:
            with self._arrivals:
                if not self._pending.any:
                    return
                pending, self._pending = self._pending, _Pending()
            try:
                with self._transaction():
                    self._save(pending)
            except BaseException:
                self._put_back(pending)
                raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._database:
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.rollback()
                if isinstance(error, sqlite3.Error):
                    self._raise(error)
                raise

    def _save(self, pending: _Pending) -> None:
        many = self._connection.executemany
        if pending.forgotten:
            many("DELETE FROM answers WHERE key=?", [(key,) for key in pending.forgotten])
        if pending.failures:
            many(_FAIL, [(key, self.role, kind, text) for key, kind, text in pending.failures])
        if pending.answers:
            many("INSERT OR REPLACE INTO answers VALUES(?,?)", pending.answers.items())
            many("DELETE FROM failures WHERE key=?", [(key,) for key in pending.answers])
        row = (self.role, *_row(pending.spent), *_row(pending.lost), pending.cached)
        if any(row[1:]):
            self._run(_ENTER, row)
        if pending.released is not NOTHING:
            negative = [-value for value in _row(pending.released)]
            self._run(_HOLD, (self._owner, self.role, *negative))

    def _put_back(self, pending: _Pending) -> None:
        """Nothing that arrived is dropped because the disk is full for a while."""
        with self._arrivals:
            now, self._pending = self._pending, pending
            pending.answers.update(now.answers)
            pending.failures += now.failures
            pending.forgotten += now.forgotten
            pending.spent += now.spent
            pending.lost += now.lost
            pending.released += now.released
            pending.cached += now.cached

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            self._raise(error)

    def _raise(self, error: sqlite3.Error) -> NoReturn:
        raise OSError(
            f"{self.path or 'the ledger in memory'}: {error}; free the disk or end what holds the "
            "file, then run the same command: what was committed is replayed"
        ) from error


def _row(spend: Spend) -> tuple[int, int, int, float]:
    return spend.calls, spend.prompt_tokens, spend.completion_tokens, spend.usd


def _refusal(
    worst: Spend, spent: Spend, held: Spend, budget: Budget, role: str, path: Path | None
) -> str | None:
    """Which limit the call could pass, or None when it fits under all of them."""
    limits = (
        ("max_usd", budget.max_usd, spent.usd, held.usd, worst.usd, "${:.6g}"),
        ("max_tokens", budget.max_tokens, spent.tokens, held.tokens, worst.tokens, "{:,}"),
        ("max_calls", budget.max_calls, spent.calls, held.calls, worst.calls, "{:,}"),
    )
    for name, limit, used, reserved, more, form in limits:
        # Sums of prices carry rounding; a billionth of the limit is no overspending.
        if limit is None or used + reserved + more <= limit * (1 + 1e-9):
            continue
        waiting = f", {form.format(reserved)} held for calls in flight" if reserved > 0 else ""
        kept = "; answers so far are in the cache" if path is not None else ""
        return (
            f"{name}: the next call of role {role!r} may need {form.format(more)}, but "
            f"{form.format(used)} of {form.format(limit)} are spent{waiting}. Raise {name} and run "
            f"the same again{kept}."
        )
    return None
