"""Products with a weight matrix in any format, in plain torch: `y = product(x)`, x [m, k].

`make_product(matrix, device, dtype, exact)` chooses once how a matrix is multiplied,
`describe(...)` says so. Nothing is written.

On a CPU, bf16 is packed for oneDNN where it can be (measured: twice as fast as `F.linear` from 1 to
16 rows), and int8 and int4 stay packed where torch has kernels for them; the bits of these three do
not depend on the number of rows. Elsewhere int8 and int4 become the compute dtype at load. Products
by `F.linear` have whole blocks of 16 rows in exact mode: fewer rows get another kernel. Scales of
int8 are applied after the product, in fp32: torch's kernel would round them to bf16.

Shapes: m rows, k inputs, n outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.model.quantize import GROUP, Format, Matrix, dequantize

_ROW_BLOCK = 16  # rows of an exact product
Product = Callable[[Tensor], Tensor]
_OUTPUTS, _INPUTS = 16, 64  # torch's packed kernels want multiples, and read past ends otherwise


def make_product(matrix: Matrix, device: torch.device, dtype: torch.dtype, exact: bool) -> Product:
    """The function that multiplies rows of `dtype` by the matrix, on `device`; `exact`: a row's
    numbers are the same whatever the other rows."""
    if matrix.format == "int8" and device.type == "cpu" and has_int8():
        return _int8(matrix)
    if matrix.format == "int4" and device.type == "cpu" and has_int4():
        return _int4(matrix)
    plain = matrix.format in ("fp32", "bf16")
    weight_nk = (matrix.data if plain else dequantize(matrix)).to(device=device, dtype=dtype)
    if dtype == torch.bfloat16 and device.type == "cpu" and has_bf16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_nk, _ROW_BLOCK)
        return lambda x_mk: _bf16_linear(x_mk, packed)
    return _plain(weight_nk, exact)


def _plain(weight_nk: Tensor, exact: bool) -> Product:
    def product(x_mk: Tensor) -> Tensor:
        missing = -x_mk.shape[0] % _ROW_BLOCK
        if not (exact and missing):
            return F.linear(x_mk, weight_nk)
        return F.linear(F.pad(x_mk, (0, 0, 0, missing)), weight_nk)[: x_mk.shape[0]]

    return product


def describe(format: Format, device: torch.device) -> str:
    """The format as a runner's name states it, e.g. "int4 (as bf16)" where it is turned."""
    packed = {"int8": has_int8, "int4": has_int4}
    if format not in packed or (device.type == "cpu" and packed[format]()):
        return format
    return f"{format} (as bf16)"


@cache
def has_bf16() -> bool:
    """Whether torch multiplies by bf16 matrices packed for oneDNN on this CPU."""

    def probe() -> Tensor:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise NotImplementedError
        weight_nk = torch.ones(16, GROUP, dtype=torch.bfloat16)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_nk, _ROW_BLOCK)
        return _bf16_linear(_probe(), packed)

    return _works(probe)


@cache
def has_int8() -> bool:
    """Whether torch multiplies bf16 by int8 rows on this CPU."""
    return _works(lambda: _int8_linear(_probe(), torch.ones(16, 32, dtype=torch.int8), _ones(16)))


@cache
def has_int4() -> bool:
    """Whether torch multiplies bf16 by packed int4 groups on this CPU."""
    return _works(lambda: _int4_linear(_probe(), _pack(torch.full((16, 32), 9)), _pairs(16)))


def _works(call: Callable[[], Tensor]) -> bool:
    """Whether the kernel exists and is right: 32 ones times ones."""
    try:
        return bool((call() == GROUP).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _probe() -> Tensor:
    return torch.ones(2, GROUP, dtype=torch.bfloat16)


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def _pairs(n: int) -> Tensor:
    """Scale 1, zero point 0, for one group of n outputs."""
    return torch.stack((_ones(n), torch.zeros(n, dtype=torch.bfloat16)), dim=-1)[None]


def _bf16_linear(x_mk: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_mk, packed, None, "none", [], "")


def _int8_linear(x_mk: Tensor, weight_nk: Tensor, scale_n: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x_mk, weight_nk, scale_n)


def _int8(matrix: Matrix) -> Product:
    assert matrix.scale is not None
    n, padding = matrix.num_outputs, -matrix.num_inputs % _INPUTS
    weight_nk = F.pad(matrix.data, (0, padding, 0, -n % _OUTPUTS)).contiguous()
    ones_n, scale_n = _ones(weight_nk.shape[0]), matrix.scale

    def product(x_mk: Tensor) -> Tensor:
        padded_mk = F.pad(x_mk, (0, padding)) if padding else x_mk.contiguous()
        y_mn = _int8_linear(padded_mk, weight_nk, ones_n)[:, :n]
        return (y_mn * scale_n).to(x_mk.dtype)

    return product


def _pack(values_nk: Tensor) -> Tensor:
    """Nibbles 0..15 in the layout of torch's kernel."""
    return torch._convert_weight_to_int4pack_for_cpu(values_nk.to(torch.int32), 1)


def _int4_linear(x_mk: Tensor, packed: Tensor, pairs_gn2: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x_mk, packed, GROUP, pairs_gn2)


def _int4(matrix: Matrix) -> Product:
    assert matrix.scale is not None
    n, missing = matrix.num_outputs, -matrix.num_outputs % _OUTPUTS
    nibbles = torch.stack((matrix.data & 15, matrix.data >> 4), dim=-1).flatten(1)
    packed = _pack(F.pad(nibbles, (0, 0, 0, missing), value=8))
    scale_gn = F.pad(matrix.scale, (0, 0, 0, missing)).t()
    pairs_gn2 = torch.stack((scale_gn, torch.zeros_like(scale_gn)), dim=-1).contiguous()
    padding = -matrix.num_inputs % GROUP

    def product(x_mk: Tensor) -> Tensor:
        x_mk = F.pad(x_mk, (0, padding)) if padding else x_mk.contiguous()
        return _int4_linear(x_mk, packed, pairs_gn2)[:, :n]

    return product
