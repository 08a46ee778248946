"""What one training step eats: rows of packed tokens, cut into micro-batches.

`StepBatch(parts, num_units)`; `rows_step(batch, micro_tokens)` makes one from a loader's batch,
`pack_sequences(sequences, context)` fills rows with whole sequences. Nothing is written.

Shapes: b rows, t context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from phiforge.train.losses import IGNORE


@dataclass(frozen=True)
class Rows:
    """Packed rows [b, t]: tokens, next-token targets (-100 = none), document numbers, positions."""

    token_ids_bt: Tensor
    targets_bt: Tensor
    documents_bt: Tensor
    positions_bt: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.token_ids_bt.numel()

    def to(self, device: torch.device) -> Self:
        """The same rows on a device."""
        return move(self, device)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: micro-batches (each with `num_tokens` and `to`), the valid units in all.

    The loss of the step is the sum over `parts` divided by `num_units`, known before the first
    forward pass, so that cutting it otherwise changes nothing.
    """

    parts: Sequence[Any]
    num_units: int

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes in this step, padding included."""
        return sum(part.num_tokens for part in self.parts)


def move(record: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device."""
    if device.type == "cpu":
        return record
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    return type(record)(**moved)


def rows_step(batch: Any, micro_tokens: int) -> StepBatch:
    """Cut anything with the tensors of `Rows` into micro-batches of at most `micro_tokens` tokens.

    A row is never cut: with a context longer than `micro_tokens` each micro-batch is one row.
    Raises ValueError for a batch without a single target.
    """
    num_targets = int((batch.targets_bt != IGNORE).sum())
    if num_targets == 0:
        raise ValueError("a training batch has no token with a target; check the loss masks")
    num_rows, context = batch.token_ids_bt.shape
    size = max(1, micro_tokens // context)
    names = [f.name for f in fields(Rows)]
    parts = [
        Rows(**{name: getattr(batch, name)[start : start + size] for name in names})
        for start in range(0, num_rows, size)
    ]
    return StepBatch(parts, num_targets)


def first_fit(lengths: Sequence[int], context: int, open_rows: int = 32) -> list[list[int]]:
    """Put items, in the order given, into the first of the last `open_rows` rows with room.

    Returns item numbers per row. Raises ValueError for an item longer than a row.
    """
    room: list[int] = []
    rows: list[list[int]] = []
    for item, length in enumerate(lengths):
        if length > context:
            raise ValueError(f"sequence {item} has {length} tokens; a row holds {context}")
        first = max(0, len(rows) - open_rows)
        row = next((r for r in range(first, len(rows)) if room[r] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(context)
        rows[row].append(item)
        room[row] -= length
    return rows


def pack_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    rows: Sequence[Sequence[int]],
    context: int,
    pad_id: int,
) -> Rows:
    """Rows from whole sequences of (token ids, loss mask), placed as `rows` of sequence numbers.

    The mask says which tokens are learned: token i is the target of position i - 1. Each sequence
    is a document of its own: positions restart and attention stays inside it.
    """
    shape = (len(rows), context)
    token_ids, targets = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    documents, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, item in enumerate(row):
            ids, mask = (np.asarray(part, np.int64) for part in sequences[item])
            span = slice(start, start + len(ids))
            token_ids[r, span] = ids
            targets[r, start : start + len(ids) - 1] = np.where(mask[1:] != 0, ids[1:], IGNORE)
            documents[r, span] = number
            positions[r, span] = np.arange(len(ids))
            start += len(ids)
    return Rows(*(torch.from_numpy(a) for a in (token_ids, targets, documents, positions)))
