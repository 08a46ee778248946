"""Token shards at rest: one folder per source, uint32 tokens, document ids and int64 offsets.

Call `write_shard(folder, documents, meta)` and `open_shard(folder)`. Writes tokens.bin, mask.bin
(chats only), documents.parquet (id, offset, text_bytes) and, last, meta.json.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phiforge.core.files import write_json

TOKENS, MASK, DOCUMENTS, META = "tokens.bin", "mask.bin", "documents.parquet", "meta.json"
_REMEDY = "the shard was cut short or changed; run the pack stage again (--rebuild pack)"


class Packed(NamedTuple):
    """One document as tokens; `mask` (0/1 per token) says which of a chat's tokens are learned."""

    id: str
    token_ids: Sequence[int] | NDArray[np.uint32]
    mask: Sequence[int] | NDArray[np.uint8] | None
    text_bytes: int  # UTF-8 bytes of the text the tokens stand for


@dataclass(frozen=True)
class Shard:
    """An open shard: all tokens on end, document d being tokens[offsets[d] : offsets[d + 1]]."""

    folder: Path
    tokens: NDArray[np.uint32]  # memory map
    offsets: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    mask: NDArray[np.uint8] | None
    meta: dict[str, Any]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document_ids(self) -> list[str]:
        """The ids of the documents, in shard order."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.folder / DOCUMENTS, columns=["id"])
        return table.column("id").to_pylist()


class ShardWriter:
    """Writes one shard document by document; `close()` completes it.

    `meta` (kind, end-of-document and padding token, …) is kept; counts and the SHA-256 of the
    token bytes are added. A shard is whole when its meta.json exists, because that comes last.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).unlink(missing_ok=True)
        self.folder, self.meta = folder, meta
        self.masked = meta["kind"] == "chats"
        self._digest = hashlib.sha256()
        self._ids: list[str] = []
        self._lengths: list[int] = []
        self._text_bytes: list[int] = []
        self._tokens = open(folder / TOKENS, "wb")  # noqa: SIM115 (open until close())
        self._masks = open(folder / MASK, "wb") if self.masked else None  # noqa: SIM115

    def add(self, document: Packed) -> None:
        """Append one document."""
        data = np.asarray(document.token_ids, dtype="<u4").tobytes()
        self._digest.update(data)
        self._tokens.write(data)
        if self._masks is not None:
            mask = np.asarray(document.mask, dtype=np.uint8)
            assert len(mask) == len(document.token_ids), "a chat's mask has one value per token"
            self._digest.update(mask.tobytes())
            self._masks.write(mask.tobytes())
        self._ids.append(document.id)
        self._lengths.append(len(document.token_ids))
        self._text_bytes.append(document.text_bytes)

    def close(self) -> dict[str, Any]:
        """Write document ids, offsets and meta.json; return the meta data."""
        import pyarrow
        import pyarrow.parquet

        self._tokens.close()
        if self._masks is not None:
            self._masks.close()
        ends = np.cumsum(self._lengths, dtype=np.int64)
        table = {
            "id": pyarrow.array(self._ids, pyarrow.string()),
            "offset": pyarrow.array(ends - np.array(self._lengths, np.int64), pyarrow.int64()),
            "text_bytes": pyarrow.array(self._text_bytes, pyarrow.int64()),
        }
        pyarrow.parquet.write_table(pyarrow.table(table), self.folder / DOCUMENTS)
        full = {
            **self.meta,
            "num_documents": len(self._ids),
            "num_tokens": int(ends[-1]) if len(ends) else 0,
            "num_bytes": sum(self._text_bytes),
            "longest_tokens": max(self._lengths, default=0),
            "sha256": self._digest.hexdigest(),
        }
        write_json(self.folder / META, full)
        return full


def write_shard(folder: Path, documents: Iterable[Packed], meta: dict[str, Any]) -> dict[str, Any]:
    """Write a whole shard and return its meta data; `meta` needs kind, eod_id and pad_id."""
    writer = ShardWriter(folder, meta)
    for document in documents:
        writer.add(document)
    return writer.close()


def open_shard(folder: Path) -> Shard:
    """Open a shard without reading its tokens.

    Raises ValueError naming the file when one is missing, truncated or contradicts meta.json.
    """
    import pyarrow
    import pyarrow.parquet

    meta = read_meta(folder)
    num_tokens = meta["num_tokens"]
    _check_size(folder / TOKENS, 4 * num_tokens)
    masked = meta["kind"] == "chats"
    if masked:
        _check_size(folder / MASK, num_tokens)
    try:
        table = pyarrow.parquet.read_table(folder / DOCUMENTS, columns=["offset", "text_bytes"])
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{folder / DOCUMENTS}: cannot be read ({error}); {_REMEDY}") from error
    starts = table.column("offset").to_numpy()
    if len(starts) != meta["num_documents"]:
        raise ValueError(
            f"{folder / DOCUMENTS}: {len(starts)} documents, but {META} says "
            f"{meta['num_documents']}; {_REMEDY}"
        )
    return Shard(
        folder,
        _map(folder / TOKENS, np.dtype("<u4"), num_tokens),
        np.append(starts, num_tokens).astype(np.int64),
        table.column("text_bytes").to_numpy(),
        _map(folder / MASK, np.dtype(np.uint8), num_tokens) if masked else None,
        meta,
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """A shard's meta.json. Raises ValueError when it is missing or damaged."""
    path = folder / META
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so {folder} is no finished token shard; {_REMEDY}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        for key in ("kind", "num_tokens", "num_documents", "eod_id", "pad_id"):
            meta[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {_REMEDY}") from error
    return meta


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise ValueError(f"{path}: {found} bytes, but {META} says {expected}; {_REMEDY}")


def _map(path: Path, dtype: np.dtype, length: int) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)
