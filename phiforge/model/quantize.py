"""Weight-only quantisation of one matrix: int8 with a scale per row, int4 with one per 32 inputs.

`matrix = quantize(weight_nk, "int4")`, `dequantize(matrix)` is fp32 again, `matrix_bytes(matrix)`
its size. Formats fp32 and bf16 pass through the same door. Nothing is written.

Shapes: n outputs (rows), k inputs, g groups of 32 inputs in a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.core.native.build import load

Format = Literal["fp32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
GROUP = 32  # inputs that share one scale of int4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# int4 maps a group's largest value (by magnitude, sign kept) to one of these, the one of least
# squared error: beyond -8 it is cut off, and all others get finer steps. The first wins ties.
_FACTORS = tuple(1.0 / target for target in (-8.0, -9.0, -8.5, -7.5, -7.0))
_SMALLEST = torch.finfo(torch.float32).tiny  # smaller scales have no inverse: their values become 0
# Weights worked on at once. In torch a few copies of them stay in a core's cache; the C++ kernel
# needs none, and threads share the rows of one call.
_TORCH_CHUNK, _NATIVE_CHUNK = 1 << 17, 1 << 22


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
    n, k = weight_nk.shape
    return quantize_rows(lambda first, last: weight_nk[first:last], n, k, format)


def quantize_rows(
    read: Callable[[int, int], Tensor], num_outputs: int, num_inputs: int, format: Format
) -> Matrix:
    """As `quantize`, of rows that `read(first, last)` gives: a few at a time, so that a matrix in a
    file is never whole in memory in full precision."""
    data, scale = None, None
    with torch.no_grad():
        for first, last in _row_ranges(num_outputs, num_inputs, format):
            part = read(first, last).detach()
            if data is None:
                data, scale = _empty(part.device, num_outputs, num_inputs, format)
            if scale is None:
                data[first:last] = part
            elif format == "int8":
                data[first:last], scale[first:last] = _int8(part.float())
            else:
                _int4_into(part, data[first:last], scale[first:last])
    assert data is not None
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


def _row_ranges(num_outputs: int, num_inputs: int, format: Format) -> Iterator[tuple[int, int]]:
    native = format == "int4" and load("quantize") is not None
    rows = max(1, (_NATIVE_CHUNK if native else _TORCH_CHUNK) // num_inputs)
    for first in range(0, num_outputs, rows):
        yield first, min(first + rows, num_outputs)


def _empty(device: torch.device, n: int, k: int, format: Format) -> tuple[Tensor, Tensor | None]:
    if format in _DTYPES:
        return torch.empty((n, k), dtype=_DTYPES[format], device=device), None
    if format == "int8":
        data = torch.empty((n, k), dtype=torch.int8, device=device)
        return data, torch.empty(n, dtype=torch.float32, device=device)
    g = -(-k // GROUP)
    data = torch.empty((n, g * GROUP // 2), dtype=torch.uint8, device=device)
    return data, torch.empty((n, g), dtype=torch.bfloat16, device=device)


def _int8(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [n, k] and scale fp32 [n]: the row's largest magnitude becomes 127."""
    scale = weight_nk.abs().amax(1, keepdim=True) / 127.0
    scale = torch.where(scale < _SMALLEST, 0.0, scale)
    values = (weight_nk * _inverse(scale)).round_().clamp_(-127.0, 127.0)
    return values.to(torch.int8), scale[:, 0]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _SMALLEST, 0.0, 1.0 / scale)


def _int4_into(weight_nk: Tensor, data: Tensor, scale: Tensor) -> None:
    """Fills packed nibbles [n, 16 g] and scales bf16 [n, g]; both ways give the same bits."""
    library = load("quantize") if weight_nk.device.type == "cpu" else None
    if library is None:
        data[:], scale[:] = _int4(weight_nk.float())
        return
    is_bf16 = weight_nk.dtype == torch.bfloat16
    weight_nk = (weight_nk if is_bf16 else weight_nk.float()).contiguous()
    assert data.is_contiguous()
    assert scale.is_contiguous()
    factors = torch.tensor(_FACTORS, dtype=torch.float32)
    library.quantize_int4(
        ctypes.c_void_p(weight_nk.data_ptr()),
        ctypes.c_int(is_bf16),
        ctypes.c_int64(weight_nk.shape[0]),
        ctypes.c_int64(weight_nk.shape[1]),
        ctypes.c_void_p(factors.data_ptr()),
        ctypes.c_int(len(_FACTORS)),
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_void_p(scale.data_ptr()),
    )


def _int4(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """What core/native/quantize.cpp computes, in torch."""
    n, k = weight_nk.shape
    # A group down each column: sums and scales run along contiguous memory.
    w_ix = F.pad(weight_nk, (0, -k % GROUP)).view(-1, GROUP).t().contiguous()
    high, low = w_ix.amax(0), w_ix.amin(0)
    extreme = torch.where(high > -low, high, low)
    values, error = torch.empty_like(w_ix), torch.empty_like(w_ix)
    best = (extreme * _FACTORS[0]).to(torch.bfloat16).float()
    least = torch.full_like(extreme, torch.inf)
    for factor in _FACTORS:
        scale = (extreme * factor).to(torch.bfloat16).float()
        torch.mul(w_ix, _inverse(scale), out=values).round_().clamp_(-8.0, 7.0)
        torch.mul(values, scale, out=error).sub_(w_ix).square_()
        total = _sum_halves(error)
        best = torch.where(total < least, scale, best)
        least = torch.minimum(total, least)
    torch.mul(w_ix, _inverse(best), out=values).round_().clamp_(-8.0, 7.0).add_(8.0)
    nibbles = values.to(torch.uint8).view(GROUP // 2, 2, -1)
    packed = (nibbles[:, 0] | (nibbles[:, 1] << 4)).t()
    best = torch.where(extreme.isfinite(), best, torch.nan)
    return packed.reshape(n, -1), best.to(torch.bfloat16).view(n, -1)


def _sum_halves(values_ix: Tensor) -> Tensor:
    """Sum of 32 rows in one order: the halves added, then their halves; in place."""
    while len(values_ix) > 1:
        half = len(values_ix) // 2
        values_ix = values_ix[:half].add_(values_ix[half:])
    return values_ix[0]
