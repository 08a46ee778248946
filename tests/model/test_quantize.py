"""Formats of a matrix: layout to the bit, errors within the formats' bounds, kernel = torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phiforge.core.native.build import load
from phiforge.model import quantize as module
from phiforge.model.quantize import (
    FORMATS,
    GROUP,
    dequantize,
    matrix_bytes,
    quantize,
    quantize_rows,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.fixture(params=["native", "torch"])
def ways(request, monkeypatch) -> str:
    """Both ways to int4: the C++ kernel where there is a compiler, and torch."""
    if request.param == "torch":
        monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    elif load("quantize") is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 100), (40, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_shape_comes_back(ways, format, shape, dtype):
    weight = normal(*shape).to(dtype)
    matrix = quantize(weight, format)
    assert (matrix.num_outputs, matrix.num_inputs) == shape
    found = dequantize(matrix)
    assert found.dtype == torch.float32
    assert found.shape == shape
    assert distance(found, weight.float()) < {"fp32": 1e-6, "bf16": 0.004, "int8": 0.01}.get(
        format, 0.1
    )


def test_fp32_and_bf16_are_copies():
    weight = normal(4, 8)
    matrix = quantize(weight, "fp32")
    weight.zero_()
    assert torch.equal(matrix.data, normal(4, 8))
    assert torch.equal(quantize(normal(4, 8), "bf16").data, normal(4, 8).bfloat16())


def test_int8_layout():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    matrix = quantize(weight, "int8")
    assert matrix.data.dtype == torch.int8
    assert matrix.data.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert matrix.scale is not None
    assert matrix.scale.dtype == torch.float32
    assert matrix.scale[0] == torch.tensor(2.0) / 127
    assert matrix_bytes(matrix) == 6 + 8


def test_int4_layout(ways):
    """Even inputs in the low nibble, nibble 8 is zero, also in the padding."""
    weight = torch.zeros(1, 40)
    weight[0, :4] = torch.tensor([-8.0, 7.0, 0.0, 3.0])
    weight[0, 32] = -16.0
    matrix = quantize(weight, "int4")
    assert matrix.data.shape == (1, 32)
    assert matrix.data.dtype == torch.uint8
    assert matrix.data[0, :3].tolist() == [0 | 15 << 4, 8 | 11 << 4, 0x88]
    assert matrix.data[0, 16:].tolist() == [0 | 8 << 4] + [0x88] * 15
    assert matrix.scale is not None
    assert matrix.scale.dtype == torch.bfloat16
    assert matrix.scale.tolist() == [[1.0, 2.0]]
    assert torch.equal(dequantize(matrix), weight)
    assert matrix_bytes(matrix) == 32 + 4


def test_int8_is_within_half_a_step():
    weight = normal(50, 64)
    matrix = quantize(weight, "int8")
    assert matrix.scale is not None
    steps = (dequantize(matrix) - weight).abs() / matrix.scale[:, None]
    assert steps.max() <= 0.5001


def test_int4_beats_every_single_scale(ways):
    """The grid's best is at most each candidate's error; on Gaussian weights 5% below the first."""
    weight = normal(64, 640)
    groups = weight.view(-1, GROUP)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    found = (dequantize(quantize(weight, "int4")) - weight).view(-1, GROUP).square().sum(1)
    first = 0.0
    for factor in module._FACTORS:
        scale = (largest * factor).bfloat16().float()
        error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(1)
        assert (found <= error * 1.0001).all()
        first = first or float(error.sum())
    assert float(found.sum()) < 0.93 * first


def test_int4_kernel_gives_the_bits_of_torch(monkeypatch):
    if load("quantize") is None:
        pytest.skip("no C++ compiler")
    for scale in (1.0, 1e-38, 3e-39, 1e30):
        for dtype in (torch.float32, torch.bfloat16):
            weight = (normal(65, 261) * scale).to(dtype)
            native = quantize(weight, "int4")
            with monkeypatch.context() as patch:
                patch.setenv("PHIFORGE_NATIVE", "off")
                plain = quantize(weight, "int4")
            assert native.scale is not None
            assert plain.scale is not None
            assert torch.equal(native.data, plain.data)
            assert torch.equal(native.scale, plain.scale)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=70),
    format=st.sampled_from(FORMATS),
)
def test_any_finite_row_comes_back_finite(values, format):
    weight = torch.tensor([values])
    found = dequantize(quantize(weight, format))
    assert bool(found.isfinite().all())
    assert found.abs().max() <= weight.abs().max() * 1.15


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_is_not_finite_is_refused(ways, format, bad):
    weight = normal(5, 64)
    weight[3, 40] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, format)


def test_misuse():
    with pytest.raises(ValueError, match="choose one of: fp32, bf16, int8, int4"):
        quantize(normal(2, 2), "int3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"found torch.float32 of shape \[2\]"):
        quantize(normal(2), "int8")
    with pytest.raises(ValueError, match=r"torch.int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64), "int8")


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_do_not_show(ways, format, monkeypatch):
    weight = normal(37, 96)
    whole = quantize(weight, format)
    monkeypatch.setattr(module, "_TORCH_CHUNK", 500)
    monkeypatch.setattr(module, "_NATIVE_CHUNK", 500)
    read: list[int] = []

    def rows(first: int, last: int) -> Tensor:
        read.append(last - first)
        return weight[first:last]

    pieces = quantize_rows(rows, 37, 96, format)
    assert max(read) == 5
    assert torch.equal(pieces.data, whole.data)
    assert whole.scale is None or torch.equal(pieces.scale, whole.scale)  # pyright: ignore
