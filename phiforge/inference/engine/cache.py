"""Keys and values of the tokens seen so far: one block of memory, a slot per token position.

`KVCache(config, rows, slots, ...)`; `write` adds tokens, `copy_rows` gives rows to other caches.
Nothing is written to disk.

A token's slot is its position, so a row never depends on its neighbours' lengths. Keys lie
transposed, as the product with queries wants them. Unused slots hold zeros or old finite numbers,
which attention weighs with exact zeros.

Shapes: l layers, r rows, b rows in use, k kv heads, e head dim, s slots, t new tokens.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from phiforge.model.config import PhiConfig

SLOT_BLOCK = 64  # slots come in whole blocks; exact attention sums values block by block


def round_slots(num_tokens: int) -> int:
    """Slots for so many tokens: the next multiple of 64."""
    return -(-num_tokens // SLOT_BLOCK) * SLOT_BLOCK


class KVCache:
    """Keys [l, r, k, e, s] (after RoPE) and values [l, r, k, s, e]."""

    def __init__(
        self,
        config: PhiConfig,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows, self.slots = rows, round_slots(slots)
        lead = (config.num_layers, rows, config.num_kv_heads)
        size = config.head_size
        self.keys = torch.zeros(*lead, size, self.slots, dtype=dtype, device=device)
        self.values = torch.zeros(*lead, self.slots, size, dtype=dtype, device=device)

    def fits(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this is just the cache that these arguments would make."""
        mine = (self.rows, self.slots, self.keys.dtype, self.keys.device)
        return mine == (rows, round_slots(slots), dtype, device)

    def write(self, layer: int, positions_bt: Tensor, k_btke: Tensor, v_btke: Tensor) -> None:
        """Stores the new tokens of the first b rows at their positions."""
        b, t, heads, size = k_btke.shape
        index = positions_bt[:, None, None, :].expand(b, heads, size, t)
        self.keys[layer, :b].scatter_(3, index, k_btke.permute(0, 2, 3, 1))
        index = positions_bt[:, None, :, None].expand(b, heads, t, size)
        self.values[layer, :b].scatter_(2, index, v_btke.transpose(1, 2))

    def read(self, layer: int, b: int, s: int) -> tuple[Tensor, Tensor]:
        """Keys [b*k, e, s] and values [b*k, s, e] of the first b rows and s slots: views."""
        return (
            self.keys[layer, :b].flatten(0, 1)[:, :, :s],
            self.values[layer, :b].flatten(0, 1)[:, :s],
        )

    def copy_rows(self, rows: Tensor, source: KVCache, source_rows: Tensor, length: int) -> None:
        """Fills `rows` with the first `length` tokens of `source_rows`: one read, many writes."""
        s = min(round_slots(length), self.slots, source.slots)
        self.keys[:, rows, :, :, :s] = source.keys[:, source_rows, :, :, :s]
        self.values[:, rows, :, :s] = source.values[:, source_rows, :, :s]

    def move_rows(self, rows: Tensor, source_rows: Tensor, length: int) -> None:
        """Moves rows within the cache; the two sets must not overlap."""
        self.copy_rows(rows, self, source_rows, length)

    def one_row(self, row: int, length: int) -> KVCache:
        """A small copy of one row, so that the rest of a large cache can be given back."""
        copy = KVCache.__new__(KVCache)
        copy.rows, copy.slots = 1, round_slots(length)
        copy.keys = self.keys[:, row : row + 1, :, :, : copy.slots].clone()
        copy.values = self.values[:, row : row + 1, :, : copy.slots].clone()
        return copy


def default_cache_tokens(config: PhiConfig, dtype: torch.dtype, device: torch.device) -> int:
    """As many tokens as half of the memory free now holds; the bound never changes results."""
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free_bytes = 8 << 30  # macOS does not say; take a small machine
    per_head = 2 * config.head_size * torch.empty(0, dtype=dtype).element_size()
    per_token = config.num_layers * config.num_kv_heads * per_head
    return max(SLOT_BLOCK, free_bytes // 2 // per_token)
