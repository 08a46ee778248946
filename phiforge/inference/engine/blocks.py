"""Which blocks of the cache are free, and who holds the others.

`pool = BlockPool(num_blocks)`; `take()` gives a free block, `hold` and `release` count the rows and
the prefix tree that use it. Nothing is written.

Block 0 is never given out: tables name it past a row's end, and it stays all zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class BlockPool:
    """Free blocks, and for each block how many rows and how many nodes of the tree hold it."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 1
        self.num_usable = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))  # low numbers first: few pages are touched
        self._rows = np.zeros(num_blocks, np.int32)
        self._nodes = np.zeros(num_blocks, np.int32)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free block, now held by one row."""
        block = self._free.pop()
        self._rows[block] = 1
        return block

    def held_by_rows(self, block: int) -> bool:
        """Whether a row uses the block, so that the tree letting go would free nothing."""
        return bool(self._rows[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """One more row uses these."""
        for block in blocks:
            self._rows[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """One row less uses these; returns those that became free."""
        return self._let_go(self._rows, blocks)

    def hold_by_tree(self, blocks: Iterable[int]) -> None:
        """One more node of the tree keeps these."""
        for block in blocks:
            self._nodes[block] += 1

    def release_by_tree(self, blocks: Iterable[int]) -> list[int]:
        """One node less keeps these; returns those that became free."""
        return self._let_go(self._nodes, blocks)

    def _let_go(self, counts: np.ndarray, blocks: Iterable[int]) -> list[int]:
        freed = []
        for block in blocks:
            counts[block] -= 1
            assert counts[block] >= 0
            if not (self._rows[block] or self._nodes[block]):
                freed.append(block)
        self._free.extend(reversed(freed))
        return freed
