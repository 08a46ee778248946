"""A model's weights as the native kernels read them: panels of 64 outputs (core/native/pack.h).

`packed = Packed(library, weights)`; `packed.model` is what `phiforge_decoder_create` takes. Layers
are packed one by one, so that weights made on the way are never whole in memory twice. Nothing is
written.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.weights import LayerWeights, Weights
from phiforge.model.quantize import GROUP, Matrix

_FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_DATA_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_PANEL = 64  # outputs of one panel of packed weights


class _Matrix(Structure):
    _fields_ = [
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("format", c_int64),
    ]


class _AtRest(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("format", c_int64),
    ]


class _Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_key_value", _Matrix),
        ("output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
    ]


class _Model(Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                "num_layers hidden vocab intermediate num_heads num_kv_heads head_size "
                "rotary_half window half"
            ).split()
        ),
        ("eps", c_double),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(_Layer)),
        ("lm_head", _Matrix),
    ]


def require(**conditions: object) -> None:
    """Asserts conditions by name."""
    wrong = [name for name, holds in conditions.items() if not holds]
    assert not wrong, f"wrong for the native kernels: {', '.join(wrong)}"


class Packed:
    """A model's weights as the kernels read them; keeps alive all memory that `model` points to."""

    def __init__(self, library: ctypes.CDLL, weights: Weights) -> None:
        self._library = library
        self._kept: list[object] = []
        config = weights.config
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"native kernels compute in float32 or bfloat16, not {weights.dtype}")
        self._half = weights.dtype == torch.bfloat16
        self.layers = (_Layer * config.num_layers)()
        for index, target in enumerate(self.layers):
            self._pack(target, weights.layers[index], config.intermediate_size)
        self.model = _Model(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            rotary_half=config.rotary_dim // 2,
            window=config.sliding_window or 0,
            half=self._half,
            eps=config.rms_norm_eps,
            embedding=self._keep(weights.embedding.to(weights.dtype)),
            norm=self._vector(weights.norm),
            layers=self.layers,
            lm_head=self._matrix(weights.lm_head),
        )

    def _pack(self, target: _Layer, layer: LayerWeights, intermediate_size: int) -> None:
        target.attention_norm = self._vector(layer.attention_norm)
        target.mlp_norm = self._vector(layer.mlp_norm)
        target.query_key_value = self._matrix(layer.query_key_value)
        target.output = self._matrix(layer.output)
        target.gate_up = self._matrix(layer.gate_up, _gate_up_rows(intermediate_size))
        target.down = self._matrix(layer.down)

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _vector(self, vector: Tensor) -> int:
        return self._keep(vector.float())

    def _matrix(self, matrix: Matrix, rows: np.ndarray | None = None) -> _Matrix:
        """Packs one matrix; `rows` names the row of each output, -1 for zeros (default: all)."""
        _check_matrix(matrix, self._half)
        if rows is None:
            rows = np.arange(matrix.num_outputs)
        num_outputs = len(rows)
        padded = -(-num_outputs // _PANEL) * _PANEL
        rows = np.pad(rows, (0, padded - num_outputs), constant_values=-1).astype(np.int32)
        code = _FORMATS[matrix.format]
        num_bytes = self._library.phiforge_packed_bytes(num_outputs, matrix.num_inputs, code)
        panels = torch.empty(num_bytes, dtype=torch.uint8)
        self._library.phiforge_large_pages(panels.data_ptr(), num_bytes)
        scales = torch.zeros(padded if matrix.format == "int8" else _PANEL)
        self._kept += [panels, scales]
        data = matrix.data.contiguous()
        scale = None if matrix.scale is None else matrix.scale.contiguous()
        source = _AtRest(
            data.data_ptr(),
            None if scale is None else scale.data_ptr(),
            matrix.num_outputs,
            matrix.num_inputs,
            code,
        )
        failed = self._library.phiforge_pack(
            ctypes.byref(source),
            rows.ctypes.data,
            num_outputs,
            panels.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory to pack a matrix")
        return _Matrix(panels.data_ptr(), scales.data_ptr(), num_outputs, matrix.num_inputs, code)


def _gate_up_rows(intermediate_size: int) -> np.ndarray:
    """Rows of the fused matrix in packed order: panels of 32 gate outputs and their 32 up ones."""
    padded = -(-intermediate_size // 32) * 32
    index = np.arange(padded)
    gate = np.where(index < intermediate_size, index, -1)
    up = np.where(index < intermediate_size, index + intermediate_size, -1)
    return np.stack((gate.reshape(-1, 32), up.reshape(-1, 32)), axis=1).reshape(-1)


def _check_matrix(matrix: Matrix, half: bool) -> None:
    n, k, groups = matrix.num_outputs, matrix.num_inputs, -(-matrix.num_inputs // GROUP)
    shape = (n, groups * GROUP // 2) if matrix.format == "int4" else (n, k)
    require(
        data=matrix.data.dtype == _DATA_TYPES[matrix.format] and matrix.data.shape == shape,
        device=matrix.data.device.type == "cpu",
        format=half == (matrix.format != "fp32"),
    )
    if matrix.format in ("int8", "int4"):
        assert matrix.scale is not None
        shape, dtype = {
            "int8": ((n,), torch.float32),
            "int4": ((n, groups), torch.bfloat16),
        }[matrix.format]
        require(scale=matrix.scale.dtype == dtype and matrix.scale.shape == shape)
