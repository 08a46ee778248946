"""The mixture: which share of the tokens each source gives, and which row comes from which source.

Build `MixturePart`s; `Schedule(weights, ...)` says for any row number which source it draws from
and the how manieth draw of that source it is, without replaying what came before. Writes nothing.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from phiforge.data.packing import permutation

Ints = NDArray[np.int64]
# Rows are shuffled within blocks of at least so many, and each block holds every share exactly.
MIN_BLOCK_ROWS = 64


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MixturePart:
    """One source of a training mixture, given as {source, share} in a recipe.

    `share` is the part of the tokens it gives; shares are weights and need not sum to 1.
    `min_tokens` keeps only documents at least so long; those of at least `upweight_from_tokens`
    come `upweight` times as often (arXiv 2412.08905 §3.3: long documents in midtraining).
    """

    source: str = Field(description="Name of a packed source; a folder of the pack stage.")
    share: float = Field(ge=0, description="Share of the tokens, relative to the other parts.")
    min_tokens: int = Field(default=0, ge=0, description="Shortest document taken, in tokens.")
    upweight_from_tokens: int | None = Field(
        default=None, ge=1, description="Documents of at least so many tokens come more often."
    )
    upweight: float = Field(default=2.0, ge=1, description="How many times as often.")


def combine(
    groups: Sequence[tuple[float, Sequence[MixturePart]]],
) -> list[MixturePart]:
    """One mixture from several: each group's parts get its share between them.

    `[(0.3, long), (0.7, recall)]` is midtraining's mixture; recall is pretraining's own.
    """
    parts: list[MixturePart] = []
    for share, group in groups:
        total = sum(part.share for part in group)
        if total <= 0 < share:
            raise ValueError(f"mixture: a group with share {share} has no part with a share")
        for part in group:
            parts.append(
                MixturePart(
                    part.source,
                    share * part.share / total if total else 0.0,
                    part.min_tokens,
                    part.upweight_from_tokens,
                    part.upweight,
                )
            )
    return parts


class Schedule:
    """Which source each row of a run draws from: a function of (seed, row number).

    Rows come in blocks of `block_rows`. A block's counts per source are its shares rounded so that
    after any number of blocks no source is a whole row away from its share; the rows of a block
    are shuffled by the seed. `weights` are shares of rows.
    """

    def __init__(self, weights: Sequence[float], rows_per_step: int, steps: int, seed: int) -> None:
        total = sum(weights)
        if total <= 0:
            raise ValueError(f"mixture: shares sum to {total}; at least one must be above 0")
        self.weights = np.array(weights) / total
        self.seed = seed
        self.block_rows = rows_per_step * -(-MIN_BLOCK_ROWS // rows_per_step)
        num_blocks = -(-steps * rows_per_step // self.block_rows)
        self._before = self._counts_before(num_blocks)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def _counts_before(self, num_blocks: int) -> Ints:
        """[num_blocks + 1, sources]: rows drawn from each source before each block."""
        before = np.zeros((num_blocks + 1, len(self.weights)), dtype=np.int64)
        for block in range(num_blocks):
            owed = self.weights * self.block_rows * (block + 1) - before[block]
            owed = np.maximum(owed, 0)
            owed *= self.block_rows / owed.sum()
            counts = np.floor(owed + 1e-9).astype(np.int64)
            # Largest remainders get the rows that rounding down left over.
            rest = self.block_rows - int(counts.sum())
            counts[np.argsort(counts - owed, kind="stable")[:rest]] += 1
            before[block + 1] = before[block] + counts
        return before

    def _make_block(self, block: int) -> tuple[Ints, Ints]:
        """Source and draw number of each row of a block; draws count up in row order.

        So the first rows of a source are its first draws wherever a run ends, and an epoch's worth
        of rows is an epoch.
        """
        counts = self._before[block + 1] - self._before[block]
        order = permutation(hash_key(self.seed, "block", block), self.block_rows)
        source = np.repeat(np.arange(len(counts)), counts)[order]
        draw = np.empty_like(source)
        for number, count in enumerate(counts):
            draw[source == number] = self._before[block][number] + np.arange(count)
        return source, draw

    def rows(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """(source number, draw number) of rows start..stop-1."""
        sources, draws = [], []
        while start < stop:
            block, at = divmod(start, self.block_rows)
            end = min(self.block_rows, at + stop - start)
            source, draw = self._block(block)
            sources.append(source[at:end])
            draws.append(draw[at:end])
            start += end - at
        return np.concatenate(sources), np.concatenate(draws)

    def drawn(self, num_rows: int) -> Ints:
        """How many of the first `num_rows` rows each source gave."""
        block, rest = divmod(num_rows, self.block_rows)
        counts = self._before[block].copy()
        if rest:
            source, _ = self._block(block)
            counts += np.bincount(source[:rest], minlength=len(counts))
        return counts


def hash_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; the same on every machine."""
    import hashlib

    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
