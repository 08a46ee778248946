"""The limits a figure is held against: bytes and floating-point operations by printed formulas.

`decode_limit(...)` for sampling, `step_shapes(config, num_tokens)` for the matrix products of a
training step. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from phiforge.model.config import PhiConfig
from phiforge.train.cost import matrix_parameters

DECODE_FORMULA = (
    "2 x matrix parameters + 4 x layers x heads x head_dim x mean context, per token; "
    "bytes of a step: matrix parameters x bytes per weight (the cache is not counted)"
)
# Bytes of one weight with its share of the scales, in the layers and in the head: int8 has one
# scale a row, int4 a bf16 one per 32 weights and a head in int8, llama.cpp's q8_0 fp16 ones per 32.
_BYTES = {
    "fp32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "int8": (1.0, 1.0),
    "int4": (0.5625, 1.0),
    "q8_0": (1.0625, 1.0625),
}
_LIMIT_ROWS = 512  # rows at which the engine's matmul rate is measured: enough to be bound by it


@dataclass(frozen=True)
class Limit:
    """The most tokens per second the machine allows, and by what."""

    tokens_per_second: float
    bound: Literal["memory", "matmul"]


def decode_flops(config: PhiConfig, context: float) -> float:
    """Floating-point operations of one decoded token with `context` tokens in sight on average."""
    attention = 4.0 * config.num_layers * config.num_heads * config.head_size * context
    return 2.0 * matrix_parameters(config) + attention


def weight_bytes(config: PhiConfig, format: str) -> float:
    """Bytes of the matrices that a decode step reads, in a format."""
    layers, head = _BYTES[format]
    num_head = config.vocab_size * config.hidden_size
    return layers * (matrix_parameters(config) - num_head) + head * num_head


def decode_limit(
    config: PhiConfig,
    rows: int,
    context: float,
    format: str,
    bytes_per_second: float,
    flops_per_second: float,
) -> Limit:
    """The roofline of decoding `rows` rows together: each step reads every matrix once."""
    reading = weight_bytes(config, format) / bytes_per_second
    computing = rows * decode_flops(config, context) / flops_per_second
    bound = "memory" if reading > computing else "matmul"
    return Limit(rows / max(reading, computing), bound)


def layer_shapes(config: PhiConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of every matrix, fused as at rest."""
    query = config.num_heads * config.head_size
    fused = query + 2 * config.num_kv_heads * config.head_size
    d, ff, layers = config.hidden_size, config.intermediate_size, config.num_layers
    return [
        (d, fused, layers),
        (query, d, layers),
        (d, 2 * ff, layers),
        (ff, d, layers),
        (d, config.vocab_size, 1),
    ]


def step_shapes(config: PhiConfig, num_tokens: int) -> list[dict[str, Any]]:
    """A training step's products: each matrix forward, for its input and for its weights."""
    return _shapes(config, num_tokens, backward=True)


def decode_shapes(config: PhiConfig) -> list[dict[str, Any]]:
    """A decode step's products at enough rows that the arithmetic is the limit."""
    return _shapes(config, _LIMIT_ROWS, backward=False)


def _shapes(config: PhiConfig, num_tokens: int, backward: bool) -> list[dict[str, Any]]:
    return [
        {"m": num_tokens, "k": k, "n": n, "count": count, "backward": backward}
        for k, n, count in layer_shapes(config)
    ]
