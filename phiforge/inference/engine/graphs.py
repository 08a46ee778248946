"""CUDA graphs of decode passes: one launch a token instead of hundreds.

`DecodeGraphs(decode).run(batch, padding_block, device)` gives x [b, d], or None for a shape that
is not worth a graph yet. Nothing is written.

A graph has fixed shapes, so rows and blocks are rounded up to powers of two; rows too many read and
write a block of their own. The tensors a graph reads and writes stay where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.runner import BLOCK, Pass

_MOST_BLOCKS = 4096  # gathered by one graph: more would take too much memory at once
_WORTH_A_GRAPH = 8  # passes of a shape before it is captured: capturing takes many passes' time

# (token ids [b], positions [b], tables [b, j]), all int64 on the device -> x [b, d]
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Captured:
    graph: Any  # torch.cuda.CUDAGraph
    ids: Tensor
    positions: Tensor
    tables: Tensor
    x: Tensor


class DecodeGraphs:
    """The graphs captured so far, by (rows, blocks), in one memory pool."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs, as the cache they were captured over goes away."""
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._met: Counter[tuple[int, int]] = Counter()
        self._pool: Any = None

    def run(self, batch: Pass, padding_block: int, device: torch.device) -> Tensor | None:
        """x [b, d] of a pass with one token a row; None: run it without a graph."""
        b = len(batch.token_ids_n)
        blocks = int(batch.positions_n.max()) // BLOCK + 1
        shape = (_power_of_two(b), _power_of_two(blocks))
        if shape[0] * shape[1] > _MOST_BLOCKS:
            return None
        self._met[shape] += 1
        if shape not in self._captured and self._met[shape] < _WORTH_A_GRAPH:
            return None
        if shape not in self._captured:
            self._captured[shape] = self._capture(shape, padding_block, device)
        captured = self._captured[shape]
        ids, positions, tables = _padded(batch, shape, padding_block)
        captured.ids.copy_(torch.from_numpy(ids))
        captured.positions.copy_(torch.from_numpy(positions))
        captured.tables.copy_(torch.from_numpy(tables))
        captured.graph.replay()
        return captured.x[:b].clone()

    def _capture(
        self, shape: tuple[int, int], padding_block: int, device: torch.device
    ) -> _Captured:
        """Runs the pass on padding alone, three times before and once under capture."""
        b = shape[0]
        ids = torch.zeros(b, dtype=torch.int64, device=device)
        positions = torch.zeros(b, dtype=torch.int64, device=device)
        tables = torch.full(shape, padding_block, dtype=torch.int64, device=device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries set themselves up outside the capture
            for _ in range(3):
                self._decode(ids, positions, tables)
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            x = self._decode(ids, positions, tables)
        return _Captured(graph, ids, positions, tables, x)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(
    batch: Pass, shape: tuple[int, int], padding_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, positions and tables of a graph's shape, int64."""
    b, j = len(batch.token_ids_n), min(shape[1], batch.tables_bj.shape[1])
    ids, positions = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    ids[:b], positions[:b] = batch.token_ids_n, batch.positions_n
    tables = np.full(shape, padding_block, np.int64)
    tables[:b, :j] = batch.tables_bj[:, :j]
    tables[:b, j:] = 0
    return ids, positions, tables
