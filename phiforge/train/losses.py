"""Losses: next-token cross-entropy without holding all logits, and preference losses (DPO family).

`cross_entropy_sum(x_nd, weight_vd, targets_n)` for language modelling, `token_losses` where every
token needs its own gradient, `PREFERENCE_LOSSES[name](scores)` for pairs. Nothing is written.

Shapes: b batch, t length, n tokens, p pairs, c tokens of one chunk, d model dim, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phiforge.model.kernels import Kernels
from phiforge.model.phi import Phi

IGNORE = -100

# Logits of one chunk: 8 MiB in fp32 on a CPU (near its caches), 1 GiB on a GPU (few launches).
_CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**28}
_MIN_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class LossSum:
    """A loss summed over the valid units of a micro-batch, and sums of numbers to log with it."""

    total: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def head_weight(model: Phi) -> Tensor:
    """The output matrix [v, d]: its own, or the embedding when they are tied."""
    return model.embedding.weight if model.lm_head is None else model.lm_head.weight


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at once."""
    return max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS.get(device.type, 2**21) // vocab_size)


def cross_entropy_sum(
    x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, kernels: Kernels | None = None
) -> Tensor:
    """Sum of -log p(target) over the targets that are not -100, in fp32: a scalar.

    Logits are x times the head, multiplied in the dtype of `x_nd`, softmax in fp32. Gradients are
    made in the forward pass, chunk by chunk, while the logits are in the cache: no recomputation,
    and never more than one chunk of logits. The result can be scaled, not differentiated twice.
    """
    found: Tensor = _CrossEntropySum.apply(  # type: ignore[assignment]
        x_nd, weight_vd, targets_n, kernels
    )
    return found


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, kernels: Kernels | None
    ) -> Tensor:
        weight = weight_vd.to(x_nd.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x_nd.device)
        train = any(ctx.needs_input_grad[:2])
        if train:
            grad_x_nd = torch.zeros_like(x_nd)
            grad_weight = _WeightGradient(weight, kernels)
        space_cv = _chunk_space(x_nd, weight)
        for rows, x_cd, targets_c in _valid_chunks(x_nd, targets_n, len(weight)):
            logits_cv = torch.mm(x_cd, weight.t(), out=space_cv[: len(x_cd)])
            loss_c, error_cv = _loss_and_error(logits_cv, targets_c, None, train, kernels)
            total += loss_c.sum()
            if train:
                _put(grad_x_nd, rows, error_cv @ weight)
                grad_weight.add(error_cv, x_cd)
        if train:
            ctx.gradients = grad_x_nd, grad_weight.value()
            ctx.weight_dtype = weight_vd.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("this loss has been differentiated: its gradients are used up")
        grad_x_nd, grad_weight_vd = (gradient.mul_(gradients[0]) for gradient in ctx.gradients)
        ctx.gradients = None
        return grad_x_nd, grad_weight_vd.to(ctx.weight_dtype), None, None


def token_losses(
    x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, kernels: Kernels | None = None
) -> Tensor:
    """-log p(target) of each token, [n] in fp32; 0 where the target is -100.

    As `cross_entropy_sum`, but each token's gradient may have its own size, so the backward pass
    computes each chunk of logits again.
    """
    found: Tensor = _TokenLosses.apply(  # type: ignore[assignment]
        x_nd, weight_vd, targets_n, kernels
    )
    return found


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, kernels: Kernels | None
    ) -> Tensor:
        weight = weight_vd.to(x_nd.dtype)
        losses_n = torch.zeros(len(x_nd), dtype=torch.float32, device=x_nd.device)
        space_cv = _chunk_space(x_nd, weight)
        for rows, x_cd, targets_c in _valid_chunks(x_nd, targets_n, len(weight)):
            logits_cv = torch.mm(x_cd, weight.t(), out=space_cv[: len(x_cd)])
            loss_c, _ = _loss_and_error(logits_cv, targets_c, None, False, kernels)
            _put(losses_n, rows, loss_c)
        ctx.save_for_backward(x_nd, weight_vd, targets_n)
        ctx.kernels = kernels
        return losses_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_nd, weight_vd, targets_n = ctx.saved_tensors
        scale_n = gradients[0]
        weight = weight_vd.to(x_nd.dtype)
        grad_x_nd = torch.zeros_like(x_nd)
        grad_weight = _WeightGradient(weight, ctx.kernels)
        space_cv = _chunk_space(x_nd, weight)
        for rows, x_cd, targets_c in _valid_chunks(x_nd, targets_n, len(weight)):
            logits_cv = torch.mm(x_cd, weight.t(), out=space_cv[: len(x_cd)])
            scale_c = scale_n[rows].contiguous()
            _, error_cv = _loss_and_error(logits_cv, targets_c, scale_c, True, ctx.kernels)
            _put(grad_x_nd, rows, error_cv @ weight)
            grad_weight.add(error_cv, x_cd)
        return grad_x_nd, grad_weight.value().to(weight_vd.dtype), None, None


def _loss_and_error(
    logits_cv: Tensor,
    targets_c: Tensor,
    scale_c: Tensor | None,
    train: bool,
    kernels: Kernels | None,
) -> tuple[Tensor, Tensor]:
    """-log softmax at the targets [c], and with `train` its gradient for the logits (x scale).

    The gradient has the logits' dtype; kernels write it over them.
    """
    if kernels is not None:
        loss_c = torch.empty(len(targets_c), dtype=torch.float32)
        if train:
            kernels.cross_entropy(logits_cv, targets_c, loss_c, scale_c)
        else:
            kernels.token_loss(logits_cv, targets_c, loss_c)
        return loss_c, logits_cv
    log_p_cv = F.log_softmax(logits_cv, dim=-1, dtype=torch.float32)
    loss_c = -log_p_cv.gather(1, targets_c[:, None])[:, 0]
    if not train:
        return loss_c, logits_cv
    error_cv = _minus_one_hot(log_p_cv.exp_(), targets_c)
    if scale_c is not None:
        error_cv.mul_(scale_c[:, None])
    return loss_c, error_cv.to(logits_cv.dtype)


def _chunk_space(x_nd: Tensor, weight_vd: Tensor) -> Tensor:
    """Memory for the logits of every chunk: fresh memory costs a page fault for each page."""
    num_tokens = min(len(x_nd), chunk_tokens(len(weight_vd), x_nd.device))
    return x_nd.new_empty(num_tokens, len(weight_vd))


class _WeightGradient:
    """The head's gradient in fp32: the sum over chunks of error^T x, multiplied in x's dtype."""

    def __init__(self, weight_vd: Tensor, kernels: Kernels | None) -> None:
        self.weight_vd, self.kernels = weight_vd, kernels
        self.product_vd = torch.empty_like(weight_vd)
        self.sum_vd: Tensor | None = None

    def add(self, error_cv: Tensor, x_cd: Tensor) -> None:
        torch.mm(error_cv.t(), x_cd, out=self.product_vd)
        if self.sum_vd is None:
            self.sum_vd = self.product_vd.to(torch.float32, copy=True)
        elif self.kernels is None:
            self.sum_vd += self.product_vd
        else:
            self.kernels.accumulate(self.product_vd, self.sum_vd, add=True)

    def value(self) -> Tensor:
        if self.sum_vd is None:
            return torch.zeros_like(self.weight_vd, dtype=torch.float32)
        return self.sum_vd


def _valid_chunks(
    x_nd: Tensor, targets_n: Tensor, vocab_size: int
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """(rows, x, targets) of the tokens that have a target, a chunk at a time.

    Masked tokens (prompts, padding) never meet the head. Rows are a slice when all have targets.
    """
    size = chunk_tokens(vocab_size, x_nd.device)
    valid = (targets_n != IGNORE).nonzero()[:, 0]
    every = len(valid) == len(targets_n)
    for start in range(0, len(valid), size):
        rows = slice(start, start + size) if every else valid[start : start + size]
        yield rows, x_nd[rows], targets_n[rows]


def _minus_one_hot(p_cv: Tensor, targets_c: Tensor) -> Tensor:
    """p minus 1 at each target, in place: the gradient of the loss for the logits."""
    minus_one = torch.full((len(p_cv), 1), -1.0, dtype=p_cv.dtype, device=p_cv.device)
    return p_cv.scatter_add_(1, targets_c[:, None], minus_one)


def _put(into: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    """into[rows] = values; rows are distinct, so no sum depends on an order."""
    if isinstance(rows, slice):
        into[rows] = values
    else:
        into.index_copy_(0, rows, values)


@dataclass(frozen=True)
class PairScores:
    """Sums over completion tokens of log p(policy) - log p(reference), and lengths; all [p]."""

    chosen_p: Tensor
    rejected_p: Tensor
    num_chosen_p: Tensor
    num_rejected_p: Tensor


def dpo_sigmoid(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290 eq. 7); label_smoothing: the share of labels taken as wrong."""
    margin_p = beta * (s.chosen_p - s.rejected_p)
    loss_p = -(1 - label_smoothing) * F.logsigmoid(margin_p)
    return loss_p - label_smoothing * F.logsigmoid(-margin_p)


def dpo_hinge(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """Hinge on the margin (SLiC-HF, arXiv 2305.10425)."""
    return torch.relu(1 - beta * (s.chosen_p - s.rejected_p))


def dpo_ipo(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """IPO (arXiv 2310.12036 eq. 17) on scores averaged over tokens, as its authors advise."""
    margin_p = s.chosen_p / s.num_chosen_p - s.rejected_p / s.num_rejected_p
    return (margin_p - 1 / (2 * beta)) ** 2


def dpo_robust(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased when labels are wrong label_smoothing of the time."""
    margin_p = beta * (s.chosen_p - s.rejected_p)
    clean_p = -(1 - label_smoothing) * F.logsigmoid(margin_p)
    flipped_p = -label_smoothing * F.logsigmoid(-margin_p)
    return (clean_p - flipped_p) / (1 - 2 * label_smoothing)


def dpo_sigmoid_norm(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """DPO on scores averaged over each completion's tokens; beta is then larger (2 to 10)."""
    margin_p = s.chosen_p / s.num_chosen_p - s.rejected_p / s.num_rejected_p
    return -F.logsigmoid(beta * margin_p)


def dpo_apo_zero(s: PairScores, beta: float, label_smoothing: float) -> Tensor:
    """APO-zero (arXiv 2408.06266 eq. 7): raises the chosen, lowers the rejected, each by itself."""
    return 1 - torch.sigmoid(beta * s.chosen_p) + torch.sigmoid(beta * s.rejected_p)


PREFERENCE_LOSSES: dict[str, Callable[[PairScores, float, float], Tensor]] = {
    "sigmoid": dpo_sigmoid,
    "hinge": dpo_hinge,
    "ipo": dpo_ipo,
    "robust": dpo_robust,
    "sigmoid_norm": dpo_sigmoid_norm,
    "apo_zero": dpo_apo_zero,
}
# Losses of the margin alone: for one-token completions the softmax normaliser cancels in them.
MARGIN_LOSSES = frozenset({"sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"})
SMOOTHED_LOSSES = frozenset({"sigmoid", "robust"})


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed loss in nats over text of `num_bytes` UTF-8 bytes, as bits per byte."""
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
