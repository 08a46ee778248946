"""Attention over packed rows on a CPU, without computing what the document mask forbids.

`blocks = query_blocks(mask_bts)` once per forward pass, `block_attention(q, k, v, blocks)` in every
layer: a few times faster than masking the whole square when documents are shorter than rows.

Shapes: b batch, t length, s key length, h heads, k kv heads, g heads per kv head, e head dim; n the
queries of one block. Scores, softmax and its gradient are fp32, as in a fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryBlock:
    """Neighbouring queries [start, end) and the keys [first, last) that any of them may see."""

    start: int
    end: int
    first: int
    last: int
    bias: Tensor  # [b or 1, 1, n, s] fp32, added to the scores


def attention_bias(mask_bts: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores, [b, 1, t, s]: made once, shared by all layers.

    Forbidden places hold the lowest finite number, not -inf: rows that may attend to nothing (the
    padding of ragged batches) then give an average, never a NaN that would spread through a cache.
    """
    bias = torch.zeros(mask_bts.shape, dtype=dtype, device=mask_bts.device)
    return bias.masked_fill_(~mask_bts, torch.finfo(dtype).min)[:, None]


def query_blocks(mask_bts: Tensor, block_tokens: int = 64) -> list[QueryBlock]:
    """Cuts the queries into blocks; each keeps the span of keys that some row of the batch needs.

    Exact for every mask in which each query sees at least one key, since what is left out would get
    a probability of 0.
    """
    blocks = []
    for start in range(0, mask_bts.shape[1], block_tokens):
        end = min(start + block_tokens, mask_bts.shape[1])
        needed = mask_bts[:, start:end].flatten(0, 1).any(0).nonzero()
        first, last = int(needed[0]), int(needed[-1]) + 1
        bias = attention_bias(mask_bts[:, start:end, first:last], torch.float32)
        blocks.append(QueryBlock(start, end, first, last, bias))
    return blocks


def block_attention(
    q_bthe: Tensor, k_btke: Tensor, v_btke: Tensor, blocks: list[QueryBlock]
) -> Tensor:
    """Softmax attention of grouped queries, [b, t, h, e] in the dtype of the inputs."""
    out: Tensor = _BlockAttention.apply(q_bthe, k_btke, v_btke, blocks)  # type: ignore[assignment]
    return out


class _BlockAttention(torch.autograd.Function):
    """Keeps the probabilities of each block for the backward pass, in the inputs' dtype."""

    @staticmethod
    def forward(
        ctx: Any, q_bthe: Tensor, k_btke: Tensor, v_btke: Tensor, blocks: list[QueryBlock]
    ) -> Tensor:
        num_kv_heads, dtype = k_btke.shape[2], q_bthe.dtype
        q_bkgte = _group(q_bthe, num_kv_heads) * q_bthe.shape[-1] ** -0.5
        k_nse, v_nse = _flat(k_btke), _flat(v_btke)
        queries, keys = q_bkgte.float(), k_nse.float()
        out_bkgte = torch.empty(q_bkgte.shape, dtype=dtype, device=q_bthe.device)
        kept = []
        for block in blocks:
            rows, span = slice(block.start, block.end), slice(block.first, block.last)
            scores = torch.bmm(_rows(queries, rows), keys[:, span].mT)
            _per_head(scores, q_bthe.shape[0], block).add_(block.bias)
            probabilities = torch.softmax(scores, dim=-1, out=scores).to(dtype)
            out = torch.bmm(probabilities, v_nse[:, span])
            out_bkgte[:, :, :, rows] = out.view(out_bkgte[:, :, :, rows].shape)
            kept.append(probabilities)
        ctx.save_for_backward(q_bkgte, k_nse, v_nse, out_bkgte, *kept)
        ctx.blocks = blocks
        return out_bkgte.permute(0, 3, 1, 2, 4).reshape(q_bthe.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_bkgte, k_nse, v_nse, out_bkgte, *kept = ctx.saved_tensors
        shape, dtype = q_bkgte.shape, q_bkgte.dtype
        g_bkgte = _group(gradients[0], shape[1]).float()
        # The softmax gradient needs sum(p * dp) per query, which equals sum(out * d_out).
        mean_bkgt1 = (g_bkgte * out_bkgte).sum(-1, keepdim=True)
        values = v_nse.float()
        dq_bkgte = torch.empty_like(q_bkgte)
        dk_nse = torch.zeros_like(k_nse, dtype=torch.float32)
        dv_nse = torch.zeros_like(v_nse, dtype=torch.float32)
        for block, probabilities in zip(ctx.blocks, kept, strict=True):
            rows, span = slice(block.start, block.end), slice(block.first, block.last)
            gradient = _rows(g_bkgte, rows)
            d_scores = torch.bmm(gradient, values[:, span].mT)
            d_scores.sub_(_rows(mean_bkgt1, rows)).mul_(probabilities)
            d_scores = d_scores.to(dtype)
            dq = torch.bmm(d_scores, k_nse[:, span])
            dq_bkgte[:, :, :, rows] = dq.view(dq_bkgte[:, :, :, rows].shape)
            dk_nse[:, span] += torch.bmm(d_scores.mT, _rows(q_bkgte, rows))
            dv_nse[:, span] += torch.bmm(probabilities.mT, gradient.to(dtype))
        dq_bkgte *= shape[-1] ** -0.5
        b, k, g, t, e = shape
        dq_bthe = dq_bkgte.permute(0, 3, 1, 2, 4).reshape(b, t, k * g, e)
        dk_btke, dv_btke = (x.view(b, k, t, e).transpose(1, 2).to(dtype) for x in (dk_nse, dv_nse))
        return dq_bthe, dk_btke, dv_btke, None


def _group(q_bthe: Tensor, num_kv_heads: int) -> Tensor:
    """[b, k, g, t, e]: the query heads by the key head they share."""
    b, t, h, e = q_bthe.shape
    return q_bthe.reshape(b, t, num_kv_heads, h // num_kv_heads, e).permute(0, 2, 3, 1, 4)


def _flat(x_btke: Tensor) -> Tensor:
    """[b x k, t, e]: one matrix for each key head of each row."""
    return x_btke.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(x_bkgte: Tensor, rows: slice) -> Tensor:
    """[b x k, g x n, e]: the queries of a block, all heads of a group below each other."""
    return x_bkgte[:, :, :, rows].flatten(2, 3).flatten(0, 1)


def _per_head(scores: Tensor, batch: int, block: QueryBlock) -> Tensor:
    """A view [b, h, n, s] of scores [b x k, g x n, s], for a bias all heads share."""
    return scores.view(batch, -1, block.end - block.start, block.last - block.first)
