"""The SQLite file behind the store: its tables, opening it safely, and which processes are alive.

`connect(path)` opens or makes the file (None: in memory); `owner()` names this process so that
`is_alive(owner)` can tell later whether it still runs.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from pathlib import Path

FORMAT = 1
_APPLICATION = 0x70686667  # "phfg"
_TABLES = """
CREATE TABLE IF NOT EXISTS answers(key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures(key BLOB PRIMARY KEY, role TEXT NOT NULL, kind TEXT NOT NULL,
  message TEXT NOT NULL, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger(role TEXT PRIMARY KEY,
  calls INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, usd REAL,
  lost_calls INTEGER, lost_prompt_tokens INTEGER, lost_completion_tokens INTEGER, lost_usd REAL,
  cached INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservations(owner TEXT, role TEXT,
  calls INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, usd REAL,
  PRIMARY KEY(owner, role)) WITHOUT ROWID;
"""


def connect(path: Path | None) -> sqlite3.Connection:
    """Open or make the file. Raises ValueError when it is something else."""
    name = ":memory:" if path is None else str(path)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(
            name, timeout=60, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise OSError(f"{name}: cannot be opened as a replay cache ({error})") from error
    try:
        connection.execute("PRAGMA synchronous=NORMAL")
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and (found, version) != (_APPLICATION, FORMAT):
            raise sqlite3.DatabaseError(f"application {found:#x}, version {version}")
        if not tables:
            _switch_to_wal(connection)
            connection.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id={_APPLICATION};"
                f"PRAGMA user_version={FORMAT}; {_TABLES} COMMIT;"
            )
    except sqlite3.OperationalError as error:  # locked, read-only, disk full
        connection.close()
        raise OSError(f"{name}: cannot be used as a replay cache ({error})") from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(
            f"{name}: not a replay cache of this version ({error}); give another path, or delete "
            "it to begin anew"
        ) from error
    return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging; SQLite does not wait here when another process makes the same file."""
    for _ in range(100):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            time.sleep(0.05)
    connection.execute("PRAGMA journal_mode=WAL")


def owner() -> str:
    """A name for one opening of the file by this process."""
    return f"{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:8]}"


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks; "0" where the system does not say."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return "0"
    return status.rpartition(")")[2].split()[19]


def is_alive(owner: str) -> bool:
    """Whether the process that holds a reservation still runs (a number may be used again)."""
    process, started, _ = owner.split("-")
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return started == _started(int(process))
