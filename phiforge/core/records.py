"""The records every stage reads and writes: Document, Problem, Chat, Pair, Verdict.

Call `read_records(path, Document)` and `write_records(path, documents)`; a path is a .jsonl,
.jsonl.gz or .parquet file, or a folder of them. Files are written whole or not at all.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from phiforge.core.files import atomic_path

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text to train on. `metadata` keeps source, licence and lineage (datatrove's shape)."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with a checkable answer.

    `prompt` is text, token ids or chat messages; `kind` tells the checker how to compare
    ("number", "choice", "text", "refusal").
    """

    id: str
    prompt: str | list[int] | list[Message]
    answer: str | None = None
    kind: str = "text"
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation: a list of {"role", "content"} messages."""

    id: str
    messages: list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference: TRL's prompt / chosen / rejected, and the same as token ids where known."""

    id: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    prompt_token_ids: list[int] | None = None
    chosen_token_ids: list[int] | None = None
    rejected_token_ids: list[int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judgement of two answers by a person or a model; both share this schema."""

    id: str
    prompt: str | list[Message]
    answer_a: str
    answer_b: str
    preference: str
    judge: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


Record = TypeVar("Record", Document, Problem, Chat, Pair, Verdict)

_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "text": (str,),
    "messages": (list,),
    "metadata": (dict,),
    "kind": (str,),
    "prompt": (str, list),
    "chosen": (str, list),
    "rejected": (str, list),
}


def from_dict(kind: type[Record], row: Any, where: str) -> Record:
    """Check `row` and build a record of `kind`.

    Raises ValueError that begins with `where` (FILE:LINE) when a field is missing or mistyped.
    Fields that `kind` does not have are kept under metadata.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    known = {f.name: f for f in fields(kind)}
    values = {name: value for name, value in row.items() if name in known}
    if values.get("metadata", {}) is None:
        values["metadata"] = {}
    extra = {name: value for name, value in row.items() if name not in known}
    if "id" not in values:
        raise ValueError(f"{where}: field 'id' is missing; every {kind.__name__} needs one")
    for name, value in values.items():
        allowed = _TYPES.get(name)
        if allowed and not isinstance(value, allowed):
            wanted = " or ".join(t.__name__ for t in allowed)
            raise ValueError(
                f"{where}: field '{name}' must be {wanted}, found {type(value).__name__}"
            )
    if extra:
        values["metadata"] = {**extra, **values.get("metadata", {})}
    try:
        return kind(**values)
    except TypeError as error:
        missing = [n for n in known if n not in values and n in str(error)]
        raise ValueError(f"{where}: {kind.__name__} lacks {', '.join(missing) or error}") from None


def read_records(path: str | Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of a file, or of a folder's files in name order.

    Raises FileNotFoundError for a missing path and ValueError ("FILE:LINE: ...") for bad content.
    """
    for where, row in read_rows(path):
        yield from_dict(kind, row, where)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """As `read_records`, for rows of any shape: yields ("FILE:LINE", the parsed row)."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if is_record_file(p))
        if not files:
            raise ValueError(f"{path}: no .jsonl, .jsonl.gz or .parquet file in this folder")
        for file in files:
            yield from read_rows(file)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path or run the stage before")
    yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def is_record_file(path: Path) -> bool:
    """Whether the name says that the file holds records."""
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not valid JSON ({error.msg}); is the file truncated?"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number + 1}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); write it again") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            for name in ("metadata", "prompt", "chosen", "rejected", "scores"):
                if isinstance(row.get(name), str) and row[name][:1] in "{[" and row[name]:
                    row[name] = _parse_or_text(row[name])
            yield f"{path}:{number}", row


def _parse_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def write_records(path: str | Path, records: Iterable[Any]) -> int:
    """Write records to .jsonl, .jsonl.gz or .parquet, whole or not at all; returns how many."""
    path = Path(path)
    if not is_record_file(path):
        raise ValueError(f"{path}: records go to a .jsonl, .jsonl.gz or .parquet file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            return _write_parquet(temporary, records)
        return _write_json(temporary, records, compressed=path.name.endswith(".gz"))


def _write_json(path: Path, records: Iterable[Any], compressed: bool) -> int:
    count = 0
    with open(path, "wb") as raw:
        # mtime=0 and no name: the same records give the same bytes.
        out: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0) if compressed else raw
        with out:
            for record in records:
                line = json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":"))
                out.write(line.encode() + b"\n")
                count += 1
    return count


def _write_parquet(path: Path, records: Iterable[Any]) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = [asdict(record) for record in records]
    for row in rows:
        for name in ("metadata", "prompt", "chosen", "rejected", "scores"):
            if name in row and not isinstance(row[name], str):
                row[name] = json.dumps(row[name], ensure_ascii=False)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return len(rows)
