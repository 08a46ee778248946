"""The pack stage: every source tokenised once into shards of tokens with document boundaries.

Run as stage `pack`, or call `run(PackConfig(), {"tokenizer": …, "curate": …}, out)`. Writes
SOURCE/ (and SOURCE/validation/) per source, see data/shards.py, and mixture.json.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from phiforge.core.config import StageConfig
from phiforge.core.distributed import num_workers
from phiforge.core.execute import map_shards
from phiforge.core.files import write_json
from phiforge.core.records import Chat, Document, read_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.data.shards import Packed, ShardWriter
from phiforge.model.tokenizer import Tokenizer

VERSION = 1
# Work is handed out in batches of about so many characters.
_BATCH_CHARACTERS = 1_000_000
# Below this, starting worker processes takes longer than the work.
_CHARACTERS_PER_WORKER = 20_000_000


class RecordFile(BaseModel):
    """A file of records to pack beside the run's own, as one source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of the source in the mixture.")
    path: Path = Field(description="A .jsonl, .jsonl.gz or .parquet file, or a folder of them.")
    kind: Literal["documents", "chats"] = Field(
        default="documents", description="Documents ({id, text}) or chats ({id, messages})."
    )


class PackConfig(StageConfig):
    """What to pack: all that curate and synthesize wrote, and further record files."""

    files: tuple[RecordFile, ...] = Field(default=(), description="Further files to pack.")


class _Item(NamedTuple):
    """A record and where it goes."""

    source: str
    split: str
    record: Document | Chat


def run(config: PackConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Tokenise documents (each ended by the end-of-document token) and chats (with loss masks)."""
    if "tokenizer" not in inputs:
        raise ValueError("pack: no tokenizer; run the tokenizer stage before or adopt a folder")
    files = _files(config, inputs)
    if not files:
        raise ValueError("pack: nothing to pack; run curate or synthesize before, or give `files`")
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    size = sum(_bytes(file.path) for file in files)
    workers = max(1, min(num_workers(out.exec), size // _CHARACTERS_PER_WORKER))
    writers: dict[tuple[str, str], ShardWriter] = {}
    work = partial(_tokenize, inputs["tokenizer"])
    with out.progress(size, "characters") as bar:
        for packed in map_shards(work, _batches(_items(files)), workers):
            for source, split, kind, document in packed:
                if (source, split) not in writers:
                    writers[source, split] = _writer(out.path, source, split, kind, tokenizer)
                writers[source, split].add(document)
                bar.advance(document.text_bytes)
    metas = {key: writer.close() for key, writer in sorted(writers.items())}
    table = {
        source: {"train": meta, "validation": metas.get((source, "validation"))}
        for (source, split), meta in metas.items()
        if split == "train"
    }
    if not table:
        raise ValueError("pack: every document is held out for validation; lower the fraction")
    write_json(out.path / "mixture.json", {"vocab_size": tokenizer.vocab_size, "sources": table})
    for source, splits in table.items():
        meta = splits["train"]
        out.note(f"{source}: {meta['num_tokens']:,} tokens in {meta['num_documents']:,} documents")
    return _metrics(table, tokenizer)


def _metrics(table: dict[str, dict], tokenizer: Tokenizer) -> Metrics:
    sources = {
        source: {
            "tokens": splits["train"]["num_tokens"],
            "documents": splits["train"]["num_documents"],
            "bytes_per_token": splits["train"]["num_bytes"] / splits["train"]["num_tokens"],
            "validation_tokens": (splits["validation"] or {}).get("num_tokens", 0),
        }
        for source, splits in table.items()
    }
    return {
        "tokens": sum(row["tokens"] for row in sources.values()),
        "documents": sum(row["documents"] for row in sources.values()),
        "vocab_size": tokenizer.vocab_size,
        "sources": sources,
    }


def _files(config: PackConfig, inputs: Inputs) -> list[RecordFile]:
    """All files to pack; a name of "" takes each document's own metadata.source."""
    found: list[tuple[Path, str, Literal["documents", "chats"]]] = []
    if "curate" in inputs:
        found.append((inputs["curate"] / "documents.jsonl", "", "documents"))
    if "synthesize" in inputs:
        folder = inputs["synthesize"]
        found.append((folder / "documents.jsonl", "", "documents"))
        found.append((folder / "long_documents.jsonl", "long_documents", "documents"))
        found.append((folder / "chats.jsonl", "chats", "chats"))
    files = [
        RecordFile(name=name, path=path, kind=kind)
        for path, name, kind in found
        if path.is_file() and path.stat().st_size
    ]
    return [*files, *config.files]


def _items(files: Iterable[RecordFile]) -> Iterator[_Item]:
    owner: dict[str, Path] = {}  # which file a source comes from: one name, one source
    for file in files:
        chats = file.kind == "chats"
        records: Iterator[Chat] | Iterator[Document]
        records = read_records(file.path, Chat) if chats else read_records(file.path, Document)
        for record in records:
            source = file.name or str(record.metadata.get("source", "documents"))
            if owner.setdefault(source, file.path) != file.path:
                raise ValueError(
                    f"{file.path}: source {source!r} of record {record.id!r} is also in "
                    f"{owner[source]}; give one of them another name"
                )
            split = "validation" if record.metadata.get("split") == "validation" else "train"
            yield _Item(source, split, record)


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += _characters(item.record)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(record: Document | Chat) -> int:
    if isinstance(record, Document):
        return len(record.text)
    return sum(len(message["content"]) for message in record.messages)


@lru_cache(maxsize=1)
def _load(folder: Path) -> Tokenizer:
    """A worker loads the tokenizer once, not once per batch."""
    return Tokenizer.load(folder)


def _tokenize(folder: Path, items: list[_Item]) -> list[tuple[str, str, str, Packed]]:
    tokenizer = _load(folder)
    texts = [item.record.text for item in items if isinstance(item.record, Document)]
    encoded = iter(tokenizer.encode_batch(texts))
    packed = []
    for source, split, record in items:
        if isinstance(record, Document):
            ids, mask, kind = [*next(encoded), tokenizer.eod_id], None, "documents"
            text_bytes = len(record.text.encode())
        else:
            (ids, mask), kind = tokenizer.encode_chat_with_mask(record.messages), "chats"
            text_bytes = sum(len(message["content"].encode()) for message in record.messages)
        packed.append((source, split, kind, Packed(record.id, ids, mask, text_bytes)))
    return packed


def _writer(folder: Path, source: str, split: str, kind: str, tokenizer: Tokenizer) -> ShardWriter:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source) or source == "validation":
        raise ValueError(
            f"source {source!r}: it names a folder; use letters, digits, '.', '_' and '-'"
        )
    meta = {
        "source": source,
        "split": split,
        "kind": kind,
        "eod_id": tokenizer.eod_id,
        "pad_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
    }
    return ShardWriter(folder / source if split == "train" else folder / source / split, meta)


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(child.stat().st_size for child in path.iterdir() if child.is_file())
    if not path.exists():
        raise ValueError(f"{path}: no such file to pack; check pack.files")
    return path.stat().st_size
