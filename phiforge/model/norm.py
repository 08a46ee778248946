"""RMSNorm (arXiv 1910.07467) in fp32, whatever dtype comes in and goes out.

`RMSNorm(hidden_size, eps)(x)`. Off the GPU and outside compiled graphs its backward pass is written
out, half the time of the one that autograd composes. Nothing is written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight over the last dimension, in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            # One fused kernel there.
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        normed: Tensor = _RMSNorm.apply(x, weight, self.eps)  # type: ignore[assignment]
        return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number for each vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x_float * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        normed = x.float() * scale
        d_weight = (gradient * normed).flatten(0, -2).sum(0)
        d_normed = gradient * weight
        # Scaling x leaves the output alone: remove the gradient's part along it.
        along = (d_normed * normed).mean(-1, keepdim=True)
        d_x = d_normed.sub_(normed.mul_(along)).mul_(scale)
        return d_x.to(x.dtype), d_weight, None
