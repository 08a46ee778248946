"""AdamW as language models use it: parameter groups, learning-rate schedules, gradient clipping.

`make_optimizer(model, config)`, then per step `set_lr(optimizer, lr_at(step, steps, config))` and
`clip(parameters, max_norm)`. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from phiforge.core.config import StageConfig


class OptimConfig(StageConfig):
    """Settings of the optimizer and its schedule, shared by every training stage."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from near 0.")
    schedule: Literal["linear", "cosine", "wsd", "constant"] = Field(
        default="linear",
        description="After warm-up: linear or cosine decay to the end, or stay at the peak and "
        "decay linearly over the last decay_fraction of the steps (wsd), or stay (constant).",
    )
    decay_fraction: float | None = Field(
        default=None, gt=0, le=1, description="Share of all steps that decay; wsd needs it."
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Last learning rate as a share of the peak."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled weight decay.")
    decay_embeddings: bool = Field(
        default=False, description="Whether weight decay also acts on the input embedding."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's two decay rates.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    clip: float = Field(
        default=1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off."
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if (self.schedule == "wsd") != (self.decay_fraction is not None):
            raise ValueError(
                f"decay_fraction is {self.decay_fraction} with schedule {self.schedule!r}: "
                "schedule 'wsd' needs it, the others would not read it"
            )
        if self.schedule == "constant" and self.min_lr_ratio > 0:
            raise ValueError("min_lr_ratio has no effect with schedule 'constant'; leave it out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; both must be at least 0 and below 1")
        return self


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over two groups: with weight decay, and without (norms, and the embedding).

    A tied embedding is the output matrix too, so it counts as a matrix and decays.
    """
    decayed, plain = [], []
    tied = getattr(model, "lm_head", None) is None
    for name, parameter in model.named_parameters():
        embedding = name == "embedding.weight" and not tied
        no_decay = parameter.ndim < 2 or (embedding and not config.decay_embeddings)
        (plain if no_decay else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (0-based) of `steps`: warm-up, then the schedule.

    The first step is above 0 and the last one above or at min_lr_ratio x peak, so none is wasted.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        share = 1.0
    else:
        decay_steps = steps - config.warmup_steps
        if config.schedule == "wsd":
            assert config.decay_fraction is not None
            decay_steps = min(decay_steps, max(1, round(config.decay_fraction * steps)))
        left = min(1.0, (steps - step) / decay_steps)
        if config.schedule == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        share = floor + (1 - floor) * left
    return config.lr * share


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place to a global norm of at most `max_norm` (0 = only measure).

    Returns the norm before. Nothing here waits for the device: a norm that is not finite is the
    caller's to find.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if max_norm > 0:
        torch._foreach_mul_(gradients, clip_factor(norm, max_norm))
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by; as torch's own clipping, 1e-6 away from a division by 0."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def moments(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter, made when absent: AdamW itself waits for its first step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
