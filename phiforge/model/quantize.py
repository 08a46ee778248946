"""Weight-only quantisation of one matrix: int8 with a scale per row, int4 with one per 32 inputs.

`matrix = quantize(weight_nk, "int4")`, `dequantize(matrix)` is fp32 again, `matrix_bytes(matrix)`
its size. Formats fp32 and bf16 pass through the same door. Nothing is written.

Shapes: n outputs (rows), k inputs, g groups of 32 inputs in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
GROUP = 32  # inputs that share one scale of int4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What the group's largest value (by magnitude, sign kept) may be mapped to: the scale of the least
# squared error is taken. Beyond -8 that value is cut off and all others get finer steps.
_EXTREMES = (-8.0, -9.0, -8.5, -7.5, -7.0)
_CHUNK = 1 << 18  # weights worked on at once: a few copies of them stay in the core's cache


@dataclass(frozen=True)
class Matrix:
    """One weight matrix [n, k] at rest.

    fp32, bf16: `data` is the matrix. int8: `data` int8 [n, k] in -127..127, `scale` fp32 [n],
    w = scale x q. int4: `data` uint8 [n, 16 g], two values to a byte, the low nibble has the even
    index; q = nibble - 8 in -8..7; inputs are padded with nibble 8 (zero) to a multiple of 32;
    `scale` bf16 [n, g], w = scale x q. Scales of int4 may be negative.
    """

    format: Format
    num_outputs: int
    num_inputs: int
    data: Tensor
    scale: Tensor | None = None


def check_format(format: str) -> Format:
    """The format, or ValueError naming the known ones."""
    if format not in FORMATS:
        raise ValueError(f"weights are {format!r}; choose one of: {', '.join(FORMATS)}")
    return format  # type: ignore[return-value]


def quantize(weight_nk: Tensor, format: Format) -> Matrix:
    """A matrix [n, k] of any floating dtype in another format: a copy, on the same device.

    Rounding is to nearest. ValueError for an unknown format, a tensor that is no matrix, or values
    that are not finite (no scale fits them).
    """
    check_format(format)
    if weight_nk.ndim != 2 or not weight_nk.is_floating_point():
        raise ValueError(
            f"quantize: found {weight_nk.dtype} of shape {list(weight_nk.shape)}; give a floating "
            "matrix [outputs, inputs]"
        )
    return quantize_rows(lambda first, last: weight_nk[first:last], *weight_nk.shape, format)


def quantize_rows(
    read: Callable[[int, int], Tensor], num_outputs: int, num_inputs: int, format: Format
) -> Matrix:
    """As `quantize`, of rows that `read(first, last)` gives: a few at a time, so that a matrix in a
    file is never whole in memory in full precision."""
    rows = max(1, _CHUNK // max(1, num_inputs))
    chunks = ((first, min(first + rows, num_outputs)) for first in range(0, num_outputs, rows))
    data, scale = _empty(read(0, 0), num_outputs, num_inputs, format)
    with torch.no_grad():
        for first, last in chunks:
            part = read(first, last).detach()
            if format in _DTYPES:
                data[first:last] = part
            else:
                assert scale is not None
                convert = _int8 if format == "int8" else _int4
                data[first:last], scale[first:last] = convert(part.float())
    if scale is not None and not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"quantize: the matrix [{num_outputs}, {num_inputs}] holds NaN or infinity, which "
            f"{format} cannot express; the checkpoint is damaged or diverged"
        )
    return Matrix(format, num_outputs, num_inputs, data, scale)


def dequantize(matrix: Matrix) -> Tensor:
    """The matrix [n, k] in fp32: exactly what a kernel multiplies with."""
    if matrix.format in _DTYPES:
        return matrix.data.float()
    assert matrix.scale is not None
    scale = matrix.scale.float()
    if matrix.format == "int8":
        return matrix.data.float() * scale[:, None]
    nibbles = torch.stack((matrix.data & 15, matrix.data >> 4), dim=-1)
    values_ngi = nibbles.view(matrix.num_outputs, -1, GROUP).float() - 8.0
    weight_nk = (values_ngi * scale[:, :, None]).flatten(1)
    return weight_nk[:, : matrix.num_inputs].contiguous()


def matrix_bytes(matrix: Matrix) -> int:
    """Bytes of data and scales: what a pass over the matrix reads."""
    return matrix.data.nbytes + (0 if matrix.scale is None else matrix.scale.nbytes)


def _empty(like: Tensor, n: int, k: int, format: Format) -> tuple[Tensor, Tensor | None]:
    if format in _DTYPES:
        return like.new_empty((n, k), dtype=_DTYPES[format]), None
    if format == "int8":
        return (
            like.new_empty((n, k), dtype=torch.int8),
            like.new_empty(n, dtype=torch.float32),
        )
    g = -(-k // GROUP)
    return (
        like.new_empty((n, g * GROUP // 2), dtype=torch.uint8),
        like.new_empty((n, g), dtype=torch.bfloat16),
    )


def _int8(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and scale fp32 [n]: the row's largest magnitude becomes 127."""
    scale = weight_nk.abs().amax(1, keepdim=True) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    values = (weight_nk * inverse).round_().clamp_(-127.0, 127.0)
    return values.to(torch.int8), scale[:, 0]


def _int4(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Packed nibbles [n, 16 g] and scales bf16 [n, g] of least squared error among the grid's."""
    n, k = weight_nk.shape
    padded = F.pad(weight_nk, (0, -k % GROUP))
    # Values of a group down the columns: reductions and scales run along contiguous memory.
    w_ix = padded.view(-1, GROUP).t().contiguous()
    high, low = w_ix.amax(0), w_ix.amin(0)
    extreme = torch.where(high > -low, high, low)
    best_scale, best_values, best_error = extreme, w_ix, extreme
    for index, target in enumerate(_EXTREMES):
        scale = (extreme / target).to(torch.bfloat16).float()
        values = (w_ix * torch.where(scale != 0, 1.0 / scale, 0.0)).round_().clamp_(-8.0, 7.0)
        error = (values * scale).sub_(w_ix).square_().sum(0)
        if index == 0:
            best_scale, best_values, best_error = scale, values, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better, values, best_values)
        best_error = torch.minimum(error, best_error)
    nibbles = best_values.add_(8.0).to(torch.uint8).t().contiguous()
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return packed.view(n, -1), best_scale.to(torch.bfloat16).view(n, -1)
