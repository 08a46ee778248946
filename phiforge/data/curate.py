"""The curate stage: raw sources to clean documents, exact duplicates and scraps removed.

Run as stage `curate`, or call `run(CurateConfig(sources=[…]), {}, out)`. Writes documents.jsonl
(metadata.source, licence, split) and dropped.jsonl, which says why each dropped one went.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from phiforge.core.config import StageConfig
from phiforge.core.distributed import num_workers
from phiforge.core.execute import map_shards
from phiforge.core.records import Document, write_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.data.sources import Skipped, Source, read_shard, shards

VERSION = 1
# Below so many bytes of files, starting worker processes takes longer than the work.
_BYTES_PER_WORKER = 20_000_000

Item = Document | Skipped


class CurateConfig(StageConfig):
    """Which text to read and what to keep of it."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Where the text comes from.")
    min_characters: int = Field(
        default=100, ge=1, description="Documents shorter than this are dropped."
    )
    validation_fraction: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="Share of documents held out, chosen by id; at least one per source.",
    )

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two sources are named {repeated[0]!r}; names must differ")
        return sources


def run(config: CurateConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Read, filter, deduplicate, split. Raises ValueError when a source keeps no document."""
    kept: list[Document] = []
    dropped: list[Document] = []
    seen: dict[str, str] = {}  # text id → the source that had it first
    with out.progress(len(config.sources), "sources") as bar:
        for source in config.sources:
            documents = _keep(config, _items(source, out), seen, dropped)
            chosen = list(islice(documents, source.max_documents))
            if not chosen:
                raise ValueError(
                    f"source {source.name!r}: no document is left of what it holds; see "
                    "min_characters and whether an earlier source has the same texts"
                )
            kept += _split(chosen, config.validation_fraction)
            bar.advance(1, documents=len(kept))
    write_records(out.path / "documents.jsonl", kept)
    write_records(out.path / "dropped.jsonl", dropped)
    reasons = Counter(document.metadata["reason"] for document in dropped)
    for reason, count in sorted(reasons.items()):
        out.note(f"dropped {count:,}: {reason}")
    return {
        "documents": len(kept),
        "characters": sum(len(document.text) for document in kept),
        "sources": _table(config, kept),
        "dropped": dict(sorted(reasons.items())),
    }


def _items(source: Source, out: StageDir) -> Iterator[Item]:
    """All items of a source, its files read in parallel when they are big."""
    pieces = shards(source)
    size = sum(piece.stat().st_size for piece in pieces if piece is not None)
    workers = max(1, min(num_workers(out.exec), size // _BYTES_PER_WORKER, len(pieces)))
    if workers == 1:
        # One process reads lazily, so that max_documents stops it early.
        for piece in pieces:
            yield from read_shard(source, piece)
        return
    for items in map_shards(partial(_read, source), pieces, workers):
        yield from items


def _read(source: Source, piece: Path | None) -> list[Item]:
    return list(read_shard(source, piece))


def _keep(
    config: CurateConfig, items: Iterable[Item], seen: dict[str, str], dropped: list[Document]
) -> Iterator[Document]:
    """Yield what stays; append what does not, with its reason, to `dropped`."""
    for item in items:
        if isinstance(item, Skipped):
            details = {"reason": "unusable", "where": item.where, "error": item.reason}
            dropped.append(Document(id=item.where, text="", metadata=details))
        elif len(item.text) < config.min_characters:
            dropped.append(_drop(item, "too short", characters=len(item.text)))
        elif item.id in seen:
            dropped.append(_drop(item, "duplicate", first_in=seen[item.id]))
        else:
            seen[item.id] = item.metadata["source"]
            yield item


def _drop(document: Document, reason: str, **details: Any) -> Document:
    metadata = {**document.metadata, "reason": reason, **details}
    return Document(id=document.id, text=document.text, metadata=metadata)


def _split(documents: list[Document], fraction: float) -> list[Document]:
    """Mark each document "train" or "validation" by a hash of its id.

    The seed has no part in it, so runs with different seeds hold out the same documents. A source
    of two or more documents has at least one on either side.
    """

    def place(document: Document) -> float:
        digest = hashlib.blake2b(document.id.encode(), digest_size=8, person=b"split").digest()
        return int.from_bytes(digest, "little") / 2.0**64

    places = [place(document) for document in documents]
    held_out = {at for at, value in enumerate(places) if value < fraction}
    if fraction > 0 and len(documents) > 1:
        held_out = held_out or {places.index(min(places))}
        if len(held_out) == len(documents):
            held_out.discard(places.index(max(places)))
    return [
        Document(
            id=document.id,
            text=document.text,
            metadata={
                **document.metadata,
                "split": "validation" if at in held_out else "train",
            },
        )
        for at, document in enumerate(documents)
    ]


def _table(config: CurateConfig, kept: list[Document]) -> dict[str, dict[str, int]]:
    """Documents and characters per source, and how many are held out."""
    table = {}
    for source in config.sources:
        own = [document for document in kept if document.metadata["source"] == source.name]
        table[source.name] = {
            "documents": len(own),
            "characters": sum(len(document.text) for document in own),
            "validation": sum(document.metadata["split"] == "validation" for document in own),
        }
    return table
