"""Rotary position embedding (arXiv 2104.09864): half-split layout, partial rotary, LongRoPE.

`cos, sin = rope_table(inverse_frequencies(config, long=False), positions_bt, scale)` once a forward
pass, then `rotate(x_bthe, cos, sin)` in every layer. Nothing is written.

Shapes: b batch, t length, h heads, e head dim, r half the rotary dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phiforge.model.config import PhiConfig


def inverse_frequencies(config: PhiConfig, long: bool) -> Tensor:
    """Radians per position of each rotated pair, [r] in fp32 on the CPU.

    theta^(-2i/d), divided by the long or the short factors under LongRoPE (arXiv 2402.13753).
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu")
    wavelengths = config.rope_theta ** (exponents / config.rotary_dim)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        factors = scaling.long_factor if long else scaling.short_factor
        wavelengths = wavelengths * torch.tensor(factors, dtype=torch.float32, device="cpu")
    return 1.0 / wavelengths


def rope_table(frequencies: Tensor, positions_bt: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each [b, t, 1, r] in fp32; `scale` is LongRoPE's factor."""
    angles = positions_bt[..., None, None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rotate(x_bthe: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + r) of each head by their angle; dimensions from 2r on stay put.

    Computed in fp32, returned in the dtype of `x_bthe`.
    """
    rotated: Tensor = _Rotate.apply(x_bthe, cos, sin)  # type: ignore[assignment]
    return rotated


class _Rotate(torch.autograd.Function):
    """Rotation with its own backward pass: a rotation's gradient is the opposite rotation.

    Autograd through slices would pad and add zeros: three times the memory traffic of a layer's
    cheapest step. Tables get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x_bthe: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_bthe, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, -sin), None, None


def _turn(x_bthe: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x = x_bthe.float()
    halves = x[..., : 2 * half].unflatten(-1, (2, half))
    turned = halves * cos.unsqueeze(-2)
    turned[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    turned[..., 1, :].addcmul_(halves[..., 0, :], sin)
    out = turned.flatten(-2)
    if 2 * half < x.shape[-1]:
        out = torch.cat((out, x[..., 2 * half :]), dim=-1)
    return out.to(x_bthe.dtype)
