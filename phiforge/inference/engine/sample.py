"""Draws one token per row from logits, with a random stream of its own for every sample.

`draw(logits_bv, sampling, uniforms_b)` gives token ids; `stream_key` and `uniforms` give the
numbers, a function of (seed, prompt token ids, sample index, step). Nothing is written.

Shapes: b rows, v vocabulary, c blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.inference.interface import Sampling

BLOCK_STEPS = 64  # uniforms are made for so many steps at a time
_BLOCK_TOKENS = 64  # the distribution function is summed by blocks of so many tokens


class NonFiniteLogits(RuntimeError):
    """The model's logits are NaN or infinite: its weights are damaged or its training diverged."""


def prompt_digest(seed: int, prompt_ids: Sequence[int]) -> hashlib.blake2b:
    """The hash that all samples of a prompt share; `stream_key` completes it."""
    digest = hashlib.blake2b(f"phiforge sample {seed}\n".encode(), digest_size=16)
    digest.update(np.asarray(prompt_ids, dtype="<u4").tobytes())
    return digest


def stream_key(digest: hashlib.blake2b, index: int) -> np.ndarray:
    """The Philox key (two 64-bit words) of sample `index`."""
    mine = digest.copy()
    mine.update(index.to_bytes(8, "little"))
    return np.frombuffer(mine.digest(), dtype="<u8")


def uniforms(key: np.ndarray, block: int) -> np.ndarray:
    """Numbers in [0, 1) for steps `block` x 64 to that + 63: counter-based, so in any order."""
    counter = block * (BLOCK_STEPS // 4)  # one count of Philox4x64 is four numbers
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(BLOCK_STEPS)


def draw(logits_bv: Tensor, sampling: Sampling, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
    """(token ids [b], whether the row's logits were finite [b]).

    Greedy at temperature 0 (the lowest id among equals), else the inverse of the distribution
    function at each row's uniform number. Every row is computed by itself, in fp32 and fp64.
    """
    if sampling.temperature == 0.0:
        best_b, ids_b = logits_bv.max(dim=-1)
        return ids_b, best_b.isfinite()
    scaled_bv = logits_bv if sampling.temperature == 1.0 else logits_bv / sampling.temperature
    weights_bv = keep(torch.softmax(scaled_bv, dim=-1), sampling)
    return _invert(weights_bv, uniforms_b)


def keep(p_bv: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that top-k, top-p and min-p leave, not normalised; the others are zero."""
    num_tokens = p_bv.shape[-1]
    ranked = 0 < sampling.top_k < num_tokens or sampling.top_p < 1.0
    if ranked:
        sorted_bv, order_bv = p_bv.sort(dim=-1, descending=True, stable=True)
        if 0 < sampling.top_k < num_tokens:
            sorted_bv[:, sampling.top_k :] = 0.0
        if sampling.top_p < 1.0:
            cumulative_bv = sorted_bv.double().cumsum(dim=-1)
            before_bv = F.pad(cumulative_bv[:, :-1], (1, 0))
            sorted_bv.masked_fill_(before_bv >= sampling.top_p * cumulative_bv[:, -1:], 0.0)
        p_bv = torch.zeros_like(p_bv).scatter_(-1, order_bv, sorted_bv)
    if sampling.min_p > 0.0:
        p_bv = p_bv.masked_fill(p_bv < sampling.min_p * p_bv.amax(dim=-1, keepdim=True), 0.0)
    return p_bv


def _invert(weights_bv: Tensor, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distribution function passes u: first the block of 64 tokens, then the token.

    Two short sums in fp64 instead of one over the vocabulary. A target that rounding puts past the
    end of its block takes the block's last token of non-zero weight.
    """
    padding = -weights_bv.shape[-1] % _BLOCK_TOKENS
    if padding:
        weights_bv = F.pad(weights_bv, (0, padding))
    blocks = weights_bv.view(weights_bv.shape[0], -1, _BLOCK_TOKENS)
    ends_bc = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total_b1 = ends_bc[:, -1:]
    target_b1 = uniforms_b[:, None] * total_b1
    block_b1 = _first_above(ends_bc, target_b1)
    before_b1 = F.pad(ends_bc, (1, 0)).gather(1, block_b1)
    chosen = blocks.gather(1, block_b1[:, :, None].expand(-1, -1, _BLOCK_TOKENS))[:, 0]
    inside_b1 = _first_above(chosen.cumsum(dim=-1, dtype=torch.float64), target_b1 - before_b1)
    return (block_b1 * _BLOCK_TOKENS + inside_b1)[:, 0], total_b1[:, 0].isfinite()


def _first_above(cumulative: Tensor, target_b1: Tensor) -> Tensor:
    """The first place whose running sum exceeds the target, at most the last that adds to it.

    Damaged rows get some place within bounds; their totals tell.
    """
    place_b1 = torch.searchsorted(cumulative, target_b1, right=True)
    last_b1 = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(place_b1, last_b1).clamp_(max=cumulative.shape[-1] - 1)


def token_logprobs(logits_bv: Tensor, ids_b: Tensor) -> Tensor:
    """log p(id) of the model at temperature 1, [b] in fp32."""
    return torch.log_softmax(logits_bv, dim=-1).gather(1, ids_b[:, None])[:, 0]
