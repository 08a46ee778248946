"""What happens between gradients and new weights: clipping, AdamW, forgetting the gradients.

`update = TorchUpdate(optimizer)`, or `FusedUpdate(optimizer, decoder)` for a fused decoder: two
passes over memory in C++. Both keep their state in the optimizer; nothing is written.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from phiforge.model.fused import FusedDecoder
from phiforge.model.kernels import TensorTable
from phiforge.train.optim import clip, clip_factor, moments, set_lr


class Update(Protocol):
    """One optimizer step in three calls."""

    def clip(self, max_norm: float) -> Tensor:
        """The global gradient norm; larger ones than `max_norm` (0 = none) are scaled down."""
        ...

    def step(self, lr: float) -> None:
        """AdamW with this learning rate."""
        ...

    def clear(self) -> None:
        """Forgets the gradients."""
        ...


class TorchUpdate:
    """torch's own AdamW and clipping."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(self, max_norm: float) -> Tensor:
        return clip(self.parameters, max_norm)

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class FusedUpdate:
    """The same numbers up to rounding: one pass measures, one updates and writes the shadows.

    Clipping scales gradients while they are read; they stay as they are in memory.
    """

    def __init__(self, optimizer: torch.optim.AdamW, decoder: FusedDecoder) -> None:
        self.optimizer, self.decoder, self.factor = optimizer, decoder, 1.0
        groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        parameters = [parameter for parameter, _ in groups]
        states = [moments(optimizer, parameter) for parameter in parameters]
        self.steps = [state["step"] for state in states]
        self.decays = [group["weight_decay"] for _, group in groups]
        self.gradients = TensorTable([parameter.grad for parameter in parameters])
        self.tables = (
            TensorTable([parameter.detach() for parameter in parameters]),
            self.gradients,
            TensorTable([state["exp_avg"] for state in states]),
            TensorTable([state["exp_avg_sq"] for state in states]),
            TensorTable([decoder.shadow(parameter) for parameter in parameters]),
        )

    def clip(self, max_norm: float) -> Tensor:
        norm = torch.tensor(self.decoder.kernels.sum_of_squares(self.gradients)).sqrt()
        self.factor = float(clip_factor(norm, max_norm)) if max_norm > 0 else 1.0
        return norm

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        torch._foreach_add_(self.steps, 1.0)
        group = self.optimizer.param_groups[0]
        self.decoder.kernels.adamw(
            *self.tables,
            self.decays,
            shadow_dtype=self.decoder.dtype,
            clip=self.factor,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            step=int(self.steps[0].item()),
        )

    def clear(self) -> None:
        self.decoder.clear()
