"""What computes a forward pass over a paged cache: the seam between the engine and its kernels.

`make_runner(weights, mode, kernels)` gives a `Runner`; the engine hands it one `Pass` at a time.
Nothing is written.

The cache is `num_blocks` blocks of 64 token slots; a row's table names its blocks in order. In mode
"exact" (and always with native kernels) a token's numbers depend on its own row's tokens up to it
alone: not on other rows, how a prompt was cut into passes, block numbers, threads or cache size.

Shapes: n tokens, b rows, j blocks of a row, d model dim, m any number of rows, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from phiforge.model.config import PhiConfig

if TYPE_CHECKING:
    from phiforge.inference.engine.weights import Weights

BLOCK = 64  # tokens of one cache block

Mode = Literal["exact", "fast"]
Kernels = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class Pass:
    """One forward pass over any mix of rows: prompts' chunks and single decode tokens.

    `token_ids_n` int32 [n]: the rows' new tokens, one row after the other. `positions_n` int32 [n]:
    their places, consecutive within a row. `row_starts` int32 [b + 1]: row r owns tokens
    row_starts[r] .. row_starts[r + 1] - 1, at least one. `tables_bj` int32 [b, j], C-contiguous:
    position p of row r lies in block tables_bj[r, p // 64], slot p % 64; entries past a row's end
    are 0.
    """

    token_ids_n: np.ndarray
    positions_n: np.ndarray
    row_starts: np.ndarray
    tables_bj: np.ndarray


class Runner(Protocol):
    """Weights, a cache and the kernels that run over both."""

    name: str  # printed, e.g. "native bf16 (avx512_bf16)" or "torch bf16"
    config: PhiConfig
    context: int  # the longest row in tokens
    device: torch.device
    dtype: torch.dtype  # of `forward`'s output and the cache
    num_blocks: int  # of the cache; 0 before `allocate`
    block_bytes: int  # of one block, keys and values of all layers
    mode_is_exact: bool

    def allocate(self, num_blocks: int) -> None:
        """Makes (or remakes, losing content) the cache; MemoryError, with sizes, when it cannot."""
        ...

    def forward(self, batch: Pass) -> Tensor:
        """x [n, d] after the final norm, in the compute dtype, on `device`.

        Keys and values of the new tokens enter the cache; token i attends to its row's positions up
        to its own, at most the config's sliding window.
        """
        ...

    def logits(self, x_md: Tensor) -> Tensor:
        """Logits [m, v] in fp32."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copies keys and values of all layers from one block to another."""
        ...


def make_runner(weights: Weights, mode: Mode, kernels: Kernels) -> Runner:
    """The runner for these weights: native kernels on a CPU where they compile, else torch.

    ValueError when `kernels` is "native" and they cannot be had, with the reason.
    """
    reason = why_torch(weights, kernels)
    if reason is None:
        from phiforge.inference.engine.native import NativeRunner

        return NativeRunner(weights)
    if kernels == "native":
        raise ValueError(f"kernels is 'native', but there are none: {reason}; try kernels='auto'")
    from phiforge.inference.engine.forward import TorchRunner

    return TorchRunner(weights, exact=mode == "exact")


def why_torch(weights: Weights, kernels: Kernels) -> str | None:
    """Why torch's kernels serve these weights; None when own kernels do."""
    from phiforge.core.native.build import unavailable

    if kernels == "torch":
        return "kernels='torch'"
    if weights.embedding.device.type != "cpu":
        return "own kernels are for CPUs"
    return unavailable("decoder")
