"""The loader: batches of packed rows as a pure function of (seed, step).

Call `Loader(pack_folder, context, tokens_per_step, steps, mixture, seed).batch(step)`; resuming
needs nothing but the step. `validation_batches(pack_folder, …)` walks held-out text. It only reads.

Shapes: b rows, t context length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phiforge.data.mixture import MixturePart, Schedule, hash_key
from phiforge.data.packing import Rows, pack_rows, permutation, scramble
from phiforge.data.shards import Shard, open_shard

IGNORE = -100
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Packed rows: int64 tokens and next-token targets (-100 where there is no loss).

    `documents_bt` (int32) numbers the pieces within a row and is -1 at padding; `positions_bt`
    restarts at 0 with every piece. A target is always the next token of the same document.
    """

    token_ids_bt: Tensor
    targets_bt: Tensor
    documents_bt: Tensor
    positions_bt: Tensor
    num_targets: int


@dataclass(frozen=True)
class Part:
    """A mixture part made concrete: its shard, its packed rows, what they hold."""

    spec: MixturePart
    shard: Shard
    rows: Rows
    document: Ints  # shard document of each packed document (up-weighted ones come again)
    unique_tokens: int
    dropped_documents: int  # chats longer than the context: half a chat teaches the wrong thing

    @property
    def tokens_per_row(self) -> float:
        return self.rows.num_tokens / self.rows.num_rows


def open_part(pack_folder: Path, spec: MixturePart, context: int, seed: int) -> Part:
    """Open a part's shard and pack its documents. ValueError when nothing is left to draw from."""
    folder = pack_folder / spec.source
    if not folder.is_dir():
        known = sorted(path.parent.name for path in pack_folder.glob("*/meta.json"))
        raise ValueError(
            f"mixture source {spec.source!r}: no such folder in {pack_folder}; the packed sources "
            f"are {', '.join(known) or 'none'}"
        )
    shard = open_shard(folder)
    lengths = shard.lengths
    # A document of one token has nothing to predict.
    longest = context if shard.mask is not None else np.iinfo(np.int64).max
    wanted = (lengths >= max(2, spec.min_tokens)) & (lengths <= longest)
    document = np.flatnonzero(wanted)
    if len(document) == 0:
        raise ValueError(
            f"mixture source {spec.source!r}: none of its {len(lengths)} documents has at least "
            f"{max(2, spec.min_tokens)} tokens"
            + (f" and at most {context}" if shard.mask is not None else "")
            + f" (the longest has {shard.meta['longest_tokens']}); lower min_tokens or change the "
            "context"
        )
    unique_tokens = int(lengths[document].sum())
    document = np.repeat(document, _copies(lengths[document], spec, seed))
    rows = pack_rows(lengths[document], context, hash_key(seed, "pack", spec.source))
    dropped = int((lengths > longest).sum())
    return Part(spec, shard, rows, document, unique_tokens, dropped)


def _copies(lengths: Ints, spec: MixturePart, seed: int) -> Ints:
    """How often each document comes per epoch: 1, or `upweight` on average for the long ones."""
    if spec.upweight_from_tokens is None:
        return np.ones(len(lengths), dtype=np.int64)
    whole = int(spec.upweight)
    draw = scramble(hash_key(seed, "upweight", spec.source), np.arange(len(lengths))) / 2.0**64
    copies = whole + (draw < spec.upweight - whole)
    return np.where(lengths >= spec.upweight_from_tokens, copies, 1)


class Loader:
    """Batches of a mixture. `batch(step)` depends on the arguments below and the step alone.

    `tokens_per_step` positions make a step and must be a multiple of `context`; `steps` bounds
    the step. Shares are of tokens: a source whose rows hold padding gets more rows. Raises
    ValueError for an unknown source, a truncated shard, or numbers that do not fit.
    """

    def __init__(
        self,
        pack_folder: str | Path,
        context: int,
        tokens_per_step: int,
        steps: int,
        mixture: Sequence[MixturePart],
        seed: int = 0,
    ) -> None:
        _check(context, tokens_per_step, steps)
        self.pack_folder = Path(pack_folder)
        self.context, self.steps, self.seed = context, steps, seed
        self.rows_per_step = tokens_per_step // context
        drawn_from = [part for part in mixture if part.share > 0]
        if not drawn_from:
            raise ValueError("mixture: no part has a share above 0; name at least one source")
        self.parts = [open_part(self.pack_folder, part, context, seed) for part in drawn_from]
        weights = [part.spec.share / part.tokens_per_row for part in self.parts]
        self.schedule = Schedule(weights, self.rows_per_step, steps, seed)
        self._order = lru_cache(maxsize=2 * len(self.parts))(self._make_order)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step (0-based), or rank's rows of it: rows rank, rank + world, …

        Raises IndexError for a step outside 0..steps-1 and ValueError when the rows do not divide.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside 0..{self.steps - 1}")
        if self.rows_per_step % world:
            raise ValueError(
                f"{self.rows_per_step} rows per step do not divide among {world} ranks; change "
                "tokens_per_step"
            )
        first = step * self.rows_per_step
        sources, draws = self.schedule.rows(first, first + self.rows_per_step)
        rows = []
        for number, draw in zip(sources[rank::world], draws[rank::world], strict=True):
            part = self.parts[number]
            epoch, at = divmod(int(draw), part.rows.num_rows)
            rows.append((part, int(self._order(int(number), epoch)[at])))
        return fill(rows, self.context)

    def _make_order(self, number: int, epoch: int) -> Ints:
        key = hash_key(self.seed, "epoch", number, self.parts[number].spec.source, epoch)
        return permutation(key, self.parts[number].rows.num_rows)

    def drawn(self, step: int | None = None) -> list[dict[str, Any]]:
        """Per part: planned and drawn tokens of the first `step` steps (all when None).

        Keys: source, share, unique_tokens, epoch_tokens, epoch_rows, padding, planned_tokens,
        drawn_tokens, epochs (drawn over unique tokens), dropped_documents.
        """
        steps = self.steps if step is None else step
        counts = self.schedule.drawn(steps * self.rows_per_step)
        drawn = [self._drawn_tokens(n, int(count)) for n, count in enumerate(counts)]
        total_share = sum(part.spec.share for part in self.parts)
        # The plan: the mean tokens a row holds under the shares, times the rows.
        per_row = total_share / sum(p.spec.share / p.tokens_per_row for p in self.parts)
        total = per_row * steps * self.rows_per_step
        return [
            {
                **asdict(part.spec),
                "share": part.spec.share / total_share,
                "unique_tokens": part.unique_tokens,
                "epoch_tokens": part.rows.num_tokens,
                "epoch_rows": part.rows.num_rows,
                "padding": part.rows.padding,
                "planned_tokens": round(total * part.spec.share / total_share),
                "drawn_tokens": tokens,
                "epochs": tokens / part.unique_tokens,
                "dropped_documents": part.dropped_documents,
            }
            for part, tokens in zip(self.parts, drawn, strict=True)
        ]

    def _drawn_tokens(self, number: int, num_rows: int) -> int:
        rows = self.parts[number].rows
        epochs, rest = divmod(num_rows, rows.num_rows)
        partial = rows.tokens[self._order(number, epochs)[:rest]].sum() if rest else 0
        return epochs * rows.num_tokens + int(partial)


def steps_per_epoch(
    pack_folder: str | Path, source: str, context: int, tokens_per_step: int, seed: int = 0
) -> int:
    """Steps after which every row of a source has come at least once (it alone in the mixture)."""
    _check(context, tokens_per_step, 1)
    part = open_part(Path(pack_folder), MixturePart(source, 1.0), context, seed)
    return -(-part.rows.num_rows // (tokens_per_step // context))


def validation_sources(pack_folder: str | Path) -> list[str]:
    """Names of the packed sources that hold held-out documents."""
    return sorted(
        path.parent.parent.name for path in Path(pack_folder).glob("*/validation/meta.json")
    )


def validation_batches(
    pack_folder: str | Path,
    context: int,
    tokens_per_batch: int,
    sources: Sequence[str] | None = None,
    max_batches: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Batch]]:
    """Yield (source, batch) over the held-out documents of each source, each token once.

    The last batch of a source has as many rows as are left. `max_batches` bounds each source; the
    rows then are a sample drawn from the seed.
    """
    _check(context, tokens_per_batch, 1)
    per_batch = tokens_per_batch // context
    for source in validation_sources(pack_folder) if sources is None else sources:
        part = open_part(Path(pack_folder), MixturePart(f"{source}/validation", 1.0), context, seed)
        order = permutation(hash_key(seed, "validation", source), part.rows.num_rows)
        starts = range(0, len(order), per_batch)[:max_batches]
        for start in starts:
            rows = [(part, int(row)) for row in order[start : start + per_batch]]
            yield source, fill(rows, context)


def fill(rows: Sequence[tuple[Part, int]], context: int) -> Batch:
    """Read packed rows (part, row number) into tensors."""
    pad_id = rows[0][0].shard.meta["pad_id"]
    shape = (len(rows), context)
    token_ids_bt = np.full(shape, pad_id, dtype=np.int64)
    targets_bt = np.full(shape, IGNORE, dtype=np.int64)
    documents_bt = np.full(shape, -1, dtype=np.int32)
    positions_bt = np.zeros(shape, dtype=np.int64)
    for b, (part, row) in enumerate(rows):
        token_ids, targets, documents, positions = _read_row(part, row)
        num_tokens = len(token_ids)
        token_ids_bt[b, :num_tokens] = token_ids
        targets_bt[b, :num_tokens] = targets
        documents_bt[b, :num_tokens] = documents
        positions_bt[b, :num_tokens] = positions
    return Batch(
        torch.from_numpy(token_ids_bt),
        torch.from_numpy(targets_bt),
        torch.from_numpy(documents_bt),
        torch.from_numpy(positions_bt),
        int((targets_bt != IGNORE).sum()),
    )


def _read_row(part: Part, row: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(tokens, targets, piece numbers, positions) of one packed row, without its padding."""
    pieces = slice(*part.rows.offsets[row : row + 2])
    length = part.rows.length[pieces]
    document = part.document[part.rows.document[pieces]]
    shard = part.shard
    start = shard.offsets[document] + part.rows.start[pieces]
    end_of_document = shard.offsets[document + 1]
    number = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(number)) - (np.cumsum(length) - length)[number]
    index = start[number] + position
    # The target of a piece's last token is its document's next token, should a row's end have cut
    # the document there: every token but a document's first is predicted once.
    has_next = index + 1 < end_of_document[number]
    following = np.where(has_next, index + 1, index)
    targets = np.where(has_next, shard.tokens[following].astype(np.int64), IGNORE)
    if shard.mask is not None:
        targets = np.where(shard.mask[following] != 0, targets, IGNORE)
    return shard.tokens[index], targets, number, position


def _check(context: int, tokens_per_step: int, steps: int) -> None:
    if context < 2:
        raise ValueError(f"context: {context} is below 2; a row needs a token and its target")
    if tokens_per_step < context or tokens_per_step % context:
        raise ValueError(
            f"tokens_per_step: {tokens_per_step} is no multiple of context {context}; try "
            f"{max(1, round(tokens_per_step / context)) * context}"
        )
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")
