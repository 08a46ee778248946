"""What training costs: floating-point operations by a printed formula, and when compiling pays.

`flops_per_token(config, context)`, `choose_compile(exec, ...)`. Nothing is written.
"""

from __future__ import annotations

import shutil

import torch

from phiforge.core.config import Exec
from phiforge.core.usage import UsageError
from phiforge.model import kernels
from phiforge.model.config import PhiConfig
from phiforge.model.kernels import Kernels

FLOPS_FORMULA = "6 x matrix parameters x tokens + 6 x layers x heads x head_dim x context x tokens"

# On a CPU compiling loses: a graph cannot skip what the document mask forbids, the eager layers do
# (nano shape, bf16, one Zen 4 core: 0.69 s a step eager, 0.91 s compiled). On a GPU it costs a
# minute or so, which a run of few minutes does not win back (an estimate, not measured here).
_MIN_FLOPS_TO_COMPILE = 1e17


def matrix_parameters(config: PhiConfig) -> int:
    """Parameters that multiply activations: every matrix but the input embedding's lookup."""
    norms = (2 * config.num_layers + 1) * config.hidden_size
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return config.num_parameters - norms - lookup


def flops_per_token(config: PhiConfig, context: int) -> float:
    """Floating-point operations of forward and backward per token, causal attention over `context`.

    FLOPS_FORMULA per token; a token sees half the context on average, and document masks are not
    subtracted. 6 = 2 (multiply, add) x 3 (forward, two products backward).
    """
    attention = config.num_layers * config.num_heads * config.head_size * context
    return 6.0 * matrix_parameters(config) + 6.0 * attention


def choose_compile(
    exec: Exec, device: torch.device, planned_flops: float, fixed_shapes: bool
) -> tuple[bool, str]:
    """Whether to compile the model, and why; a function of the plan alone, so it never varies.

    "on" without a C++ compiler falls back to eager with that reason.
    """
    if exec.compile == "off":
        return False, "exec.compile is off"
    if exec.compile == "auto":
        if device.type == "cpu":
            return False, "on a CPU the eager layers, which skip masked attention, are faster"
        if not fixed_shapes:
            return False, "shapes differ from step to step"
        if planned_flops < _MIN_FLOPS_TO_COMPILE:
            least = f"{_MIN_FLOPS_TO_COMPILE:.0e}"
            return False, f"{planned_flops:.2g} planned FLOPs; compiling pays from {least}"
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return False, "no C++ compiler found (g++, clang++ or c++)"
    return True, f"exec.compile is {exec.compile}, {planned_flops:.2g} planned FLOPs"


def choose_kernels(exec: Exec, device: torch.device, compiled: bool) -> tuple[Kernels | None, str]:
    """Own kernels or None, and why; a function of settings and machine.

    Raises UsageError when exec.kernels is "native" and they cannot be had.
    """
    if exec.kernels == "torch":
        return None, "exec.kernels is torch"
    found = why = None
    if device.type != "cpu":
        why = "they are for the CPU"
    elif compiled:
        why = "the layers are compiled"
    else:
        found, why = kernels.load(), kernels.unavailable()
    if found is not None:
        return found, f"exec.kernels is {exec.kernels}"
    if exec.kernels == "native":
        raise UsageError(f"exec.kernels is native, but there are none here: {why}; set auto")
    return None, f"no own kernels: {why}"
