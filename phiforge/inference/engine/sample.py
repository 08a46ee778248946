"""Draws one token per row from logits, with a random stream of its own for every sample.

`draw(logits_bv, laws, uniforms_b)` gives token ids; `stream_key` and `uniforms` give the numbers,
a function of (seed, prompt token ids, sample index, step). Nothing is written.

Shapes: b rows, v vocabulary, c blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.inference.interface import Sampling, TopLogprobs

BLOCK_STEPS = 64  # uniforms are made for so many steps at a time
_BLOCK_TOKENS = 64  # the distribution function is summed by blocks of so many tokens


class NonFiniteLogits(RuntimeError):
    """The model's logits are NaN or infinite: its weights are damaged or its training diverged."""


@dataclass(frozen=True)
class Laws:
    """How each row draws: arrays [b] of `Sampling`'s fields of the same name."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray

    @classmethod
    def empty(cls, num_rows: int) -> Laws:
        """Room for so many rows."""
        floats = [np.zeros(num_rows, np.float64) for _ in range(3)]
        return cls(floats[0], floats[1], np.zeros(num_rows, np.int64), floats[2])

    @classmethod
    def of(cls, sampling: Sampling, num_rows: int) -> Laws:
        """The same law for every row."""
        laws = cls.empty(num_rows)
        laws.set(slice(None), sampling)
        return laws

    def set(self, rows: int | slice, sampling: Sampling) -> None:
        """Fills in rows."""
        self.temperature[rows], self.top_p[rows] = sampling.temperature, sampling.top_p
        self.top_k[rows], self.min_p[rows] = sampling.top_k, sampling.min_p

    def take(self, index: np.ndarray) -> Laws:
        """Those of some rows."""
        return Laws(
            self.temperature[index], self.top_p[index], self.top_k[index], self.min_p[index]
        )

    def ranked(self, vocab_size: int) -> np.ndarray:
        """Which rows need their tokens sorted, bool [b]."""
        return ((self.top_k > 0) & (self.top_k < vocab_size)) | (self.top_p < 1.0)


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


def draw(logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
    """(token ids [b], whether the row's logits were finite [b]).

    Greedy at temperature 0 (the lowest id among equals), else the inverse of the distribution
    function at each row's uniform number. Every row is computed by itself, in fp32 and fp64.
    """
    return _apart(laws.temperature == 0.0, _greedy, _sampled, logits_bv, laws, uniforms_b)


def _apart(which_b: np.ndarray, yes, no, logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray):
    """One function for the rows of a kind, another for the others, the results back in order."""
    if not which_b.any():
        return no(logits_bv, laws, uniforms_b)
    if which_b.all():
        return yes(logits_bv, laws, uniforms_b)
    ids_b = torch.empty(len(which_b), dtype=torch.int64, device=logits_bv.device)
    finite_b = torch.empty(len(which_b), dtype=torch.bool, device=logits_bv.device)
    for function, places in ((yes, np.flatnonzero(which_b)), (no, np.flatnonzero(~which_b))):
        index = torch.from_numpy(places).to(logits_bv.device)
        found = function(logits_bv[index], laws.take(places), uniforms_b[places])
        ids_b[index], finite_b[index] = found
    return ids_b, finite_b


def _greedy(logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
    best_b, ids_b = logits_bv.max(dim=-1)
    return ids_b, best_b.isfinite()


def _sampled(logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
    ranked_b = laws.ranked(logits_bv.shape[-1])
    return _apart(ranked_b, _from_ranked, _from_all, logits_bv, laws, uniforms_b)


def _from_all(logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
    return _invert(keep_likely(_softmax(logits_bv, laws), laws), uniforms_b)


def _from_ranked(logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
    p_bv = keep_ranked(_softmax(logits_bv, laws), laws)
    return _invert(keep_likely(p_bv, laws), uniforms_b)


def _softmax(logits_bv: Tensor, laws: Laws) -> Tensor:
    if (laws.temperature == 1.0).all():
        return torch.softmax(logits_bv, dim=-1)
    return torch.softmax(logits_bv / _column(laws.temperature, logits_bv).float(), dim=-1)


def _column(values_b: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values_b).to(like.device)[:, None]


def keep_ranked(p_bv: Tensor, laws: Laws) -> Tensor:
    """The probabilities that top-k, then top-p leave, not normalised; the others are zero."""
    num_tokens = p_bv.shape[-1]
    sorted_bv, order_bv = p_bv.sort(dim=-1, descending=True, stable=True)
    most_b = np.where(laws.top_k > 0, laws.top_k, num_tokens)
    ranks_v = torch.arange(num_tokens, device=p_bv.device)
    sorted_bv.masked_fill_(ranks_v >= _column(most_b, p_bv), 0.0)
    cumulative_bv = sorted_bv.double().cumsum(dim=-1)
    before_bv = F.pad(cumulative_bv[:, :-1], (1, 0))
    limit_b = np.where(laws.top_p < 1.0, laws.top_p, np.inf)
    sorted_bv.masked_fill_(before_bv >= _column(limit_b, p_bv) * cumulative_bv[:, -1:], 0.0)
    return torch.zeros_like(p_bv).scatter_(-1, order_bv, sorted_bv)


def keep_likely(p_bv: Tensor, laws: Laws) -> Tensor:
    """The probabilities that min-p leaves, not normalised; the others are zero."""
    if not laws.min_p.any():
        return p_bv
    least_b1 = _column(laws.min_p, p_bv).float() * p_bv.amax(dim=-1, keepdim=True)
    return p_bv.masked_fill(p_bv < least_b1, 0.0)


def _invert(weights_bv: Tensor, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
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
    target_b1 = _column(uniforms_b, weights_bv) * total_b1
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


def top_logprobs(logits_bv: Tensor, num_top: Sequence[int]) -> list[TopLogprobs]:
    """For each row the likeliest tokens, so many of them, with log p at temperature 1."""
    most = min(max(num_top), logits_bv.shape[-1])
    values_bk, ids_bk = torch.log_softmax(logits_bv, dim=-1).topk(most, dim=-1)
    rows = zip(num_top, ids_bk.tolist(), values_bk.tolist(), strict=True)
    return [tuple(zip(ids[:k], values[:k], strict=True)) for k, ids, values in rows]


def token_logprobs(logits_bv: Tensor, ids_b: Tensor) -> Tensor:
    """log p(id) of the model at temperature 1, [b] in fp32."""
    return torch.log_softmax(logits_bv, dim=-1).gather(1, ids_b[:, None])[:, 0]
