"""Append-only log of rollouts: a killed search draws nothing twice, a finished one is re-read.

`RolloutLog(path, header)` opens or continues a JSONL file; `read` and `append` move whole requests.
Each `append` is on disk (fsync) before it returns; a line cut by a kill is dropped on opening.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from phiforge.posttrain.pivotal.estimates import Prefix, Request, Rollout

Key = tuple[str, str, Prefix, int | None, int, int]


def row_of(problem_id: str, prompt: Prefix, request: Request, rollouts: list[Rollout]) -> dict:
    """One request and its rollouts as a JSON object; outcomes are 1, 0 or null (unscored)."""
    row: dict[str, Any] = {
        "problem_id": problem_id,
        "prompt": _digest(prompt),
        "prefix": list(request.prefix),
        "first_index": request.first_index,
        "purpose": request.purpose,
        "outcomes": [None if r.success is None else int(r.success) for r in rollouts],
        "token_ids": [list(r.token_ids) for r in rollouts],
    }
    if request.forbidden is not None:
        row["forbidden"] = request.forbidden
    if any(r.logprobs is not None for r in rollouts):
        row["logprobs"] = [list(r.logprobs or ()) for r in rollouts]
    return row


class RolloutLog:
    """The file of one search. Raises ValueError when it was begun with another `header`."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self._offsets: dict[Key, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__ or close()
        try:
            self._index(dict(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RolloutLog":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def close(self) -> None:
        """Close the file; nothing is pending, every append was synced."""
        self._file.close()

    def read(self, problem_id: str, prompt: Prefix, request: Request) -> list[Rollout] | None:
        """The rollouts of a request, or None when it was never answered."""
        place = (request.prefix, request.forbidden, request.first_index, request.n)
        key = (problem_id, _digest(prompt), *place)
        offset = self._offsets.get(key)
        if offset is None:
            return None
        self._file.seek(offset)
        row = json.loads(self._file.readline())
        logprobs = row.get("logprobs") or [None] * len(row["token_ids"])
        return [
            Rollout(tuple(ids), None if won is None else bool(won), tuple(lp) if lp else None)
            for ids, won, lp in zip(row["token_ids"], row["outcomes"], logprobs, strict=True)
        ]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows of `row_of` and wait until they are on disk."""
        offset = self._file.seek(0, os.SEEK_END)
        for row in rows:
            self._offsets[_key(row)] = offset
            offset += self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _index(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # cut by a kill in the middle of a write
            try:
                row = json.loads(line)
                if number == 1:
                    _check(self.path, row["header"], header)
                else:
                    self._offsets[_key(row)] = good
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not a rollout log line ({error}); "
                    "delete the file to search anew"
                ) from None
            good += len(line)
        self._file.truncate(good)
        if good == 0:
            self._file.write(_line({"header": header}))
            self._file.flush()


def _check(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
    if names:
        differing = ", ".join(f"{n} {found.get(n)!r} → {wanted.get(n)!r}" for n in names)
        raise ValueError(
            f"{path}: these rollouts were drawn with other settings ({differing}); "
            "use the same settings or another file"
        )


def _key(row: dict[str, Any]) -> Key:
    prefix = tuple(row["prefix"])
    place = (prefix, row.get("forbidden"), row["first_index"], len(row["outcomes"]))
    return row["problem_id"], row["prompt"], *place


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _digest(ids: Prefix) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]
