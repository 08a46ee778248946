"""Attention of one pass in torch: rows of similar size together, their blocks gathered by tables.

`groups = make_groups(batch, config, device)` once a pass, `attend(q, cached, groups, exact)` in
every layer. Nothing is written.

In exact mode a query's numbers depend on its own row alone. Measured on CPU kernels, this takes:
queries per key head in whole fours; in fp32, values summed 64 slots at a time (the kernel cuts
longer sums at places that depend on their length). Slots past a row's end hold zeros or old finite
numbers, which attention weighs with exact zeros.

Shapes: n tokens of the pass, b rows of a group, t tokens of each, j blocks, s = 64 j slots,
h heads, k kv heads, g = h / k, e head dim, m = t g queries per kv head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.inference.engine.runner import BLOCK, Pass
from phiforge.model.config import PhiConfig

_QUERY_BLOCK = 4  # exact mode: queries of a batched product come in whole blocks
_PIECE = 16  # tokens: pieces of a long chunk come in whole blocks
_SCORES = 1 << 24  # attention scores held at a time (fp32: 64 MiB)


@dataclass(frozen=True)
class Group:
    """Rows whose queries run together.

    `tokens_bt`: which tokens of the pass they are, padding repeats a row's first (None: all tokens
    of the pass, one per row). `real`: places in b x t that are no padding, row after row, and
    `owners` the tokens there. `blocks`: the rows' tables, once for each kv head, as places among
    all heads' blocks, [k b j]. `hidden_bts`: slots a query must not see.
    """

    tokens_bt: Tensor | None
    real: Tensor | None
    owners: Tensor | None
    blocks: Tensor
    hidden_bts: Tensor


@dataclass(frozen=True)
class Cached:
    """One layer's keys (after RoPE) and values, each [k, slots, e]."""

    keys: Tensor
    values: Tensor

    def write(self, slots_n: Tensor, k_nke: Tensor, v_nke: Tensor) -> None:
        """Stores new tokens."""
        self.keys.index_copy_(1, slots_n, k_nke.transpose(0, 1))
        self.values.index_copy_(1, slots_n, v_nke.transpose(0, 1))

    def gather(self, blocks: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of b rows, each [k, b, s, e]."""
        return _gather(self.keys, blocks, b), _gather(self.values, blocks, b)


def _gather(cache: Tensor, blocks: Tensor, b: int) -> Tensor:
    k, _, e = cache.shape
    # one index over heads and blocks: torch copies whole blocks then, else single numbers
    return cache.view(-1, BLOCK * e).index_select(0, blocks).view(k, b, -1, e)


def make_groups(
    batch: Pass, config: PhiConfig, num_blocks: int, device: torch.device
) -> list[Group]:
    """Groups of pieces of like length and reach, each within the bound on scores; `num_blocks` of
    the whole cache."""
    counts_b = np.diff(batch.row_starts)
    ends_b = batch.positions_n[batch.row_starts[1:] - 1]
    reach = int(ends_b.max()) // BLOCK + 1
    if counts_b.max() == 1 and len(ends_b) * config.num_heads * reach * BLOCK <= _SCORES:
        tables = torch.from_numpy(batch.tables_bj[:, :reach].astype(np.int64)).to(device)
        positions = torch.from_numpy(batch.positions_n.astype(np.int64)).to(device)
        return [decode_group(tables, positions, config, num_blocks)]
    sorted_pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for row, first, count in _pieces(batch, config):
        last = int(batch.positions_n[first + count - 1])
        size = 0 if count == 1 else (count - 1).bit_length()
        sorted_pieces[size, (last // BLOCK).bit_length()].append((row, first, count))
    groups = []
    for pieces in sorted_pieces.values():
        for part in _within_bound(pieces, batch, config):
            groups.append(_group(part, batch, config, num_blocks, device))
    return groups


def _pieces(batch: Pass, config: PhiConfig) -> Iterator[tuple[int, int, int]]:
    """(row, first token, number of tokens): whole chunks, or parts where scores would be many."""
    for row in range(len(batch.row_starts) - 1):
        first, end = int(batch.row_starts[row]), int(batch.row_starts[row + 1])
        slots = BLOCK * (int(batch.positions_n[end - 1]) // BLOCK + 1)
        most = max(1, _SCORES // (slots * config.num_heads) // _PIECE) * _PIECE
        for start in range(first, end, most):
            yield row, start, min(most, end - start)


def _within_bound(
    pieces: list[tuple[int, int, int]], batch: Pass, config: PhiConfig
) -> Iterator[list[tuple[int, int, int]]]:
    longest = max(count for _, _, count in pieces)
    last = max(int(batch.positions_n[first + count - 1]) for _, first, count in pieces)
    per_row = config.num_heads * longest * BLOCK * (last // BLOCK + 1)
    most = max(1, _SCORES // per_row)
    for start in range(0, len(pieces), most):
        yield pieces[start : start + most]


def _group(
    pieces: list[tuple[int, int, int]],
    batch: Pass,
    config: PhiConfig,
    num_blocks: int,
    device: torch.device,
) -> Group:
    rows, firsts, counts = (np.array(column) for column in zip(*pieces, strict=True))
    columns_t = np.arange(counts.max())
    is_real_bt = columns_t < counts[:, None]
    tokens_bt = firsts[:, None] + np.where(is_real_bt, columns_t, 0)
    positions_bt = batch.positions_n[tokens_bt]
    reach = int(positions_bt.max()) // BLOCK + 1

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return Group(
        tokens_bt=put(tokens_bt),
        real=put(np.flatnonzero(is_real_bt)),
        owners=put(tokens_bt[is_real_bt]),
        blocks=_all_heads(put(batch.tables_bj[rows, :reach]), config, num_blocks),
        hidden_bts=_hidden(put(positions_bt), reach * BLOCK, config),
    )


def decode_group(
    tables_bj: Tensor, positions_b: Tensor, config: PhiConfig, num_blocks: int
) -> Group:
    """All rows of a pass that has one token for each."""
    hidden = _hidden(positions_b[:, None], tables_bj.shape[1] * BLOCK, config)
    return Group(None, None, None, _all_heads(tables_bj, config, num_blocks), hidden)


def _all_heads(tables_bj: Tensor, config: PhiConfig, num_blocks: int) -> Tensor:
    heads_k = torch.arange(config.num_kv_heads, device=tables_bj.device)
    return (heads_k[:, None] * num_blocks + tables_bj.flatten()).flatten()


def _hidden(positions_bt: Tensor, s: int, config: PhiConfig) -> Tensor:
    slots_s = torch.arange(s, device=positions_bt.device)
    hidden = slots_s > positions_bt[..., None]
    if config.sliding_window is not None:
        hidden |= slots_s <= positions_bt[..., None] - config.sliding_window
    return hidden


def attend(q_nhe: Tensor, cached: Cached, groups: list[Group], exact: bool) -> Tensor:
    """Attention of one layer, [n, h e]."""
    run = _fused if q_nhe.device.type == "cuda" else _spelled_out
    if groups[0].tokens_bt is None:
        return run(q_nhe[:, None], cached, groups[0], exact)
    out_nd = q_nhe.new_empty(q_nhe.shape[0], q_nhe.shape[1] * q_nhe.shape[2])
    for group in groups:
        assert group.tokens_bt is not None
        found = run(q_nhe[group.tokens_bt], cached, group, exact)
        out_nd[group.owners] = found[group.real]
    return out_nd


def _fused(q_bthe: Tensor, cached: Cached, group: Group, exact: bool) -> Tensor:
    """torch's own attention kernels, [b t, h e]."""
    b, t = q_bthe.shape[:2]
    keys, values = cached.gather(group.blocks, b)
    out_bhte = F.scaled_dot_product_attention(
        q_bthe.transpose(1, 2),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=~group.hidden_bts[:, None],
        enable_gqa=True,
    )
    return out_bhte.transpose(1, 2).reshape(b * t, -1)


def _spelled_out(q_bthe: Tensor, cached: Cached, group: Group, exact: bool) -> Tensor:
    """Attention step by step, each in an order that other rows do not change; [b t, h e]."""
    b, t, h, e = q_bthe.shape
    keys_kbse, values_kbse = cached.gather(group.blocks, b)
    k, s = keys_kbse.shape[0], keys_kbse.shape[2]
    q_kbtge = q_bthe.view(b, t, k, h // k, e).permute(2, 0, 1, 3, 4)
    q_bme = q_kbtge.reshape(k * b, t * h // k, e)
    m = q_bme.shape[1]
    if exact and m % _QUERY_BLOCK:
        q_bme = F.pad(q_bme, (0, 0, 0, -m % _QUERY_BLOCK))
    scores = torch.bmm(q_bme, keys_kbse.flatten(0, 1).transpose(1, 2)).float()
    scores.mul_(e**-0.5)
    seen = scores[:, :m].view(k, b, t, h // k, s)
    seen.masked_fill_(group.hidden_bts[None, :, :, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(q_bthe.dtype)
    out = _sum_values(weights, values_kbse.flatten(0, 1), exact)[:, :m]
    return out.reshape(k, b, t, h // k, e).permute(1, 2, 0, 3, 4).reshape(b * t, h * e)


def _sum_values(weights: Tensor, values: Tensor, exact: bool) -> Tensor:
    if not exact or values.dtype != torch.float32:
        return torch.bmm(weights, values)
    out = torch.bmm(weights[:, :, :BLOCK], values[:, :BLOCK])
    for start in range(BLOCK, values.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        out.baddbmm_(weights[:, :, block], values[:, block])
    return out
