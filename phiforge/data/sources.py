"""Sources of raw text: files and folders, JSONL, Parquet, data sets, the Python library itself.

Call `read_source(Source(name="docs", path="texts"))` for an iterator of Documents. A file that
cannot be used is an error naming it, or with `on_error: skip` a `Skipped`. Writes nothing.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phiforge.core.records import Document
from phiforge.data.html import html_to_text
from phiforge.data.python_library import MODULES, documentation, source_code

_PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
_HTML = (".html", ".htm", ".xhtml")
_CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs")
_CODE += (".rb", ".php", ".cs", ".swift", ".kt", ".scala", ".jl", ".r", ".lua", ".sh", ".sql")
_ROWS = (".jsonl", ".jsonl.gz", ".parquet")
KNOWN = (*_PROSE, *_HTML, *_CODE, *_ROWS)
_SKIP_REMEDY = "correct or remove the file, or set on_error: skip"


class Source(BaseModel):
    """Where documents come from, as an entry of `curate.sources`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Kept as metadata.source; names the shard after packing.")
    kind: Literal["files", "python-docs", "python-source", "huggingface"] = Field(
        default="files",
        description="Files; this Python's documentation or source code; a Hugging Face data set.",
    )
    path: Path | None = Field(default=None, description="A file or a folder (kind: files).")
    include: tuple[str, ...] | None = Field(
        default=None, description="Glob patterns below the folder; every known format by default."
    )
    text_field: str | None = Field(
        default=None, description='Column of the text in JSONL, Parquet and data sets ("text").'
    )
    modules: tuple[str, ...] | None = Field(
        default=None, description="Python modules to take instead of the built-in list."
    )
    dataset: str | None = Field(default=None, description="Hugging Face data set (or its folder).")
    subset: str | None = Field(default=None, description="Its configuration name.")
    dataset_split: str | None = Field(default=None, description='Its split ("train").')
    revision: str | None = Field(default=None, description="Its commit, so that it never changes.")
    licence: str | None = Field(default=None, description="Licence recorded with every document.")
    max_documents: int | None = Field(default=None, ge=1, description="Stop after so many.")
    on_error: Literal["error", "skip"] = Field(
        default="error", description="What to do with a file or row that cannot be used."
    )

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> "Source":
        rows = {"text_field"}
        allowed = {
            "files": {"path", "include"} | rows,
            "python-docs": {"modules"},
            "python-source": {"modules"},
            "huggingface": {"dataset", "subset", "dataset_split", "revision"} | rows,
        }
        special = set[str]().union(*allowed.values())
        given = {name for name in special if getattr(self, name) is not None}
        if wrong := sorted(given - allowed[self.kind]):
            raise ValueError(f"{', '.join(wrong)}: has no effect on a source of kind {self.kind}")
        needed = {"files": "path", "huggingface": "dataset"}.get(self.kind)
        if needed and needed not in given:
            raise ValueError(f"{needed} is missing; a source of kind {self.kind} needs it")
        return self


@dataclass(frozen=True)
class Skipped:
    """A file or row that was left out, and why."""

    where: str
    reason: str


def document_id(text: str) -> str:
    """The id of a text: 64 bits of its hash, the same wherever the text was found."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def read_source(source: Source) -> Iterator[Document]:
    """Yield a source's documents; what `on_error: skip` leaves out is left out silently here.

    Use `read_items` to see it. Raises ValueError naming the file and the remedy.
    """
    for item in read_items(source):
        if isinstance(item, Document):
            yield item


def read_items(source: Source) -> Iterator[Document | Skipped]:
    """Yield the documents of a source and, with `on_error: skip`, what was skipped and why."""
    left = source.max_documents
    for shard in shards(source):
        for item in read_shard(source, shard):
            if isinstance(item, Document) and left is not None:
                if left == 0:
                    return
                left -= 1
            yield item


def shards(source: Source) -> list[Path | None]:
    """Independent pieces of a source to read in parallel: its files, or one piece of all."""
    return list(_list_files(source)) if source.kind == "files" else [None]


def read_shard(source: Source, shard: Path | None) -> Iterator[Document | Skipped]:
    """Yield the documents (and skipped items) of one piece of a source."""
    if shard is not None:
        yield from _read_file(source, shard)
    elif source.kind == "huggingface":
        yield from _read_dataset(source)
    else:
        yield from _read_library(source)


def _list_files(source: Source) -> Iterator[Path]:
    """The files of a source in name order, hidden ones left out."""
    assert source.path is not None
    path = source.path.expanduser()
    if path.is_file():
        if not path.name.lower().endswith(KNOWN):
            raise ValueError(
                f"{path}: unknown format; source {source.name!r} reads {' '.join(KNOWN)}"
            )
        yield path
        return
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; correct the path of {source.name!r}")
    found: set[Path] = set()
    for pattern in source.include or ("**/*",):
        found |= {file for file in path.glob(pattern) if file.is_file()}
    num_files = 0
    for file in sorted(found):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if not hidden and file.name.lower().endswith(KNOWN):
            num_files += 1
            yield file
    if num_files == 0:
        raise ValueError(
            f"{path}: no file of a known format ({' '.join(KNOWN)}) for source {source.name!r}; "
            "correct path or include"
        )


def _read_file(source: Source, path: Path) -> Iterator[Document | Skipped]:
    assert source.path is not None
    root = source.path.expanduser()
    # Relative, so that the documents do not depend on where the folder lies.
    where = path.relative_to(root).as_posix() if root.is_dir() else path.name
    if path.name.lower().endswith(_ROWS):
        yield from _read_rows(source, path, where)
        return
    try:
        yield _document(source, _read_text(path), {"path": where})
    except (OSError, ValueError) as error:
        yield _skip(source, path, where, error)


def _skip(source: Source, path: Path | str, where: str, error: Exception) -> Skipped:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
    if source.on_error == "skip":
        return Skipped(where, reason)
    raise ValueError(f"{path}: {reason}; {_SKIP_REMEDY}") from error


def _read_text(path: Path) -> str:
    """The text of one file. Raises ValueError when it is binary, not UTF-8 or empty."""
    data = path.read_bytes()
    if not data.strip():
        raise ValueError("the file is empty")
    if b"\0" in data[:65536]:
        raise ValueError("the file is binary, not text")
    if path.name.lower().endswith(_HTML):
        text = html_to_text(data)
        if not text:
            raise ValueError("the page holds no text")
        return text
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text (byte {data[error.start]:#04x} at {error.start})"
        ) from error


def _read_rows(source: Source, path: Path, where: str) -> Iterator[Document | Skipped]:
    """Rows of JSONL or Parquet; a bad row is skipped or raised alone."""
    read = _parquet_rows if path.suffix == ".parquet" else _json_rows
    empty = True
    for number, row in enumerate(read(path), 1):
        empty = False
        try:
            if isinstance(row, Exception):
                raise row
            yield _row_document(source, row, {"path": where})
        except (OSError, ValueError) as error:
            yield _skip(source, f"{path}:{number}", f"{where}:{number}", error)
    if empty:
        yield _skip(source, path, where, ValueError("the file is empty"))


def _json_rows(path: Path) -> Iterator[Any]:
    """Each line's value, or the error that took its place."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    yield ValueError(f"not a JSON line ({error})")
    except gzip.BadGzipFile as error:
        yield ValueError(f"not a gzip file ({error})")
    except EOFError as error:
        yield ValueError(f"the gzip file is cut short ({error})")
    except OSError as error:
        yield error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        yield ValueError(f"not a readable Parquet file ({error})")
    except OSError as error:
        yield error


def _row_document(source: Source, row: Any, metadata: dict[str, Any]) -> Document:
    field = source.text_field or "text"
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {type(row).__name__}")
    text = row.get(field)
    if not isinstance(text, str):
        known = ", ".join(sorted(map(str, row)))
        raise ValueError(f"field {field!r} holds no text; set text_field to one of {known}")
    if not text.strip():
        raise ValueError(f"field {field!r} is empty")
    own = row.get("metadata")
    kept = dict(own) if isinstance(own, dict) else {}
    if "id" in row:
        kept["original_id"] = row["id"]
    if source.licence is None and (licence := kept.get("licence") or row.get("license")):
        kept["licence"] = licence
    return _document(source, text, {**kept, **metadata})


def _document(source: Source, text: str, metadata: dict[str, Any]) -> Document:
    text = text.strip("\n").rstrip() + "\n"
    if not text.strip():
        raise ValueError("the file is empty")
    licence = {"licence": source.licence} if source.licence else {}
    return Document(
        id=document_id(text), text=text, metadata={**metadata, "source": source.name, **licence}
    )


def _read_library(source: Source) -> Iterator[Document | Skipped]:
    """The Python library's documentation or source code, one document per module."""
    modules = source.modules or MODULES
    if source.kind == "python-docs":
        texts = ((name, html_to_text(html)) for name, html in documentation(modules))
    else:
        texts = source_code(modules)
    licensed = source.model_copy(update={"licence": source.licence or "PSF-2.0"})
    for name, text in texts:
        try:
            yield _document(licensed, text, {"module": name})
        except ValueError as error:
            yield _skip(source, name, name, error)


def _read_dataset(source: Source) -> Iterator[Document | Skipped]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"source {source.name!r} reads a Hugging Face data set: pip install 'phiforge[hub]'"
        ) from error
    rows: Any = load_dataset(
        source.dataset or "",
        source.subset,
        split=source.dataset_split or "train",
        revision=source.revision,
        streaming=True,
    )
    for number, row in enumerate(islice(rows, source.max_documents)):
        where = f"{source.dataset}:{number}"
        try:
            yield _row_document(source, row, {"dataset": source.dataset})
        except ValueError as error:
            yield _skip(source, where, where, error)
