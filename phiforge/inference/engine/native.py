"""The decoder as one C call per pass: the runner of CPUs with a compiler.

`runner = NativeRunner(weights)`, `runner.allocate(blocks)`, `runner.forward(batch)`. Nothing is
written. The kernels are core/native/decoder.cpp; what enters them is checked here.

A token's numbers depend only on its own row's tokens up to it, whatever the pass, the block numbers
or the number of threads (torch.get_num_threads()).

Shapes: n tokens, b rows, j blocks of a row, d model dim, m any number of rows, v vocabulary,
r half the rotary dimensions.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from phiforge.core.native.build import describe, unavailable
from phiforge.inference.engine.memory import zeros
from phiforge.inference.engine.runner import BLOCK, Pass
from phiforge.inference.engine.weights import Weights
from phiforge.model.config import PhiConfig
from phiforge.model.quantize import GROUP, Matrix
from phiforge.model.rope import inverse_frequencies, rope_table

_FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_DATA_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_PANEL = 64  # outputs of one panel of packed weights
_ROPE_CHUNK = 1024  # positions of the cos and sin table made at a time


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


class _Pass(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_tokens", "num_rows", "table_width")),
        *(
            (name, c_void_p)
            for name in "token_ids positions row_starts tables cos sin cache out".split()
        ),
        ("threads", c_int64),
    ]


class NativeRunner:
    """Packed weights, a paged cache and the kernels that run over both; see `runner.Runner`.

    ValueError when the kernels cannot be had (`core.native.build.unavailable` says why) or the
    weights are not on a CPU.
    """

    mode_is_exact = True

    def __init__(self, weights: Weights) -> None:
        library = describe("decoder")
        if library is None:
            raise ValueError(f"no native kernels: {unavailable('decoder')}; use kernels='torch'")
        if weights.embedding.device.type != "cpu":
            raise ValueError(
                f"native kernels run on a CPU; the weights are on {weights.embedding.device}"
            )
        self._library = library.handle
        _declare(self._library)
        self.name = f"native {weights.format} ({library.simd})"
        self.config: PhiConfig = weights.config
        self.context = weights.config.max_position_embeddings
        self.device = torch.device("cpu")
        self.dtype = weights.dtype
        self.num_blocks = 0
        head = self._library.phiforge_head_elements(self.config.head_size)
        heads = self.config.num_layers * self.config.num_kv_heads
        self.block_bytes = heads * head * self.dtype.itemsize
        self._cache = torch.empty(0)
        self._rope = _RopeTable(weights)
        self._lock = threading.Lock()  # the decoder's working memory serves one pass at a time
        self._packed = _Packed(self._library, weights)
        self._decoder = self._library.phiforge_decoder_create(ctypes.byref(self._packed.model))
        if not self._decoder:
            raise MemoryError("no memory for the native decoder")
        weakref.finalize(self, self._library.phiforge_decoder_destroy, self._decoder)

    def allocate(self, num_blocks: int) -> None:
        """Makes the cache anew, all zeros; its pages take memory as blocks are first written."""
        assert num_blocks >= 0
        self.num_blocks, self._cache = 0, torch.empty(0)
        shape = (num_blocks, self.block_bytes // self.dtype.itemsize)
        self._cache = zeros(shape, self.dtype, self.device, "the cache of keys and values")
        self._library.phiforge_large_pages(self._cache.data_ptr(), self._cache.nbytes)
        self.num_blocks = num_blocks

    def forward(self, batch: Pass) -> Tensor:
        """x [n, d] after the final norm, in the compute dtype."""
        self._check(batch)
        n = len(batch.token_ids_n)
        x_nd = torch.empty(n, self.config.hidden_size, dtype=self.dtype)
        cos, sin = self._rope.up_to(int(batch.positions_n.max()) + 1)
        call = _Pass(
            num_tokens=n,
            num_rows=len(batch.row_starts) - 1,
            table_width=batch.tables_bj.shape[1],
            token_ids=batch.token_ids_n.ctypes.data,
            positions=batch.positions_n.ctypes.data,
            row_starts=batch.row_starts.ctypes.data,
            tables=batch.tables_bj.ctypes.data,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            cache=self._cache.data_ptr(),
            out=x_nd.data_ptr(),
            threads=torch.get_num_threads(),
        )
        with self._lock:
            failed = self._library.phiforge_decoder_forward(self._decoder, ctypes.byref(call))
        if failed:
            raise MemoryError(f"no memory for a pass of {n} tokens: make passes smaller")
        return x_nd

    def logits(self, x_md: Tensor) -> Tensor:
        """Logits [m, v] in fp32."""
        _require(x=x_md.shape[1:] == (self.config.hidden_size,) and x_md.dtype == self.dtype)
        x_md = x_md.contiguous()
        out_mv = torch.empty(x_md.shape[0], self.config.vocab_size)
        with self._lock:
            failed = self._library.phiforge_decoder_logits(
                self._decoder,
                x_md.data_ptr(),
                x_md.shape[0],
                out_mv.data_ptr(),
                torch.get_num_threads(),
            )
        if failed:
            raise MemoryError(f"no memory for the logits of {x_md.shape[0]} tokens")
        return out_mv

    def copy_block(self, source: int, target: int) -> None:
        """Keys and values of all layers: one copy, a block is one piece of memory."""
        _require(blocks=max(source, target) < self.num_blocks and min(source, target) >= 0)
        self._cache[target].copy_(self._cache[source])

    def _check(self, batch: Pass) -> None:
        """The kernels trust these numbers with memory: whatever is wrong here is our mistake."""
        ids, positions, starts = batch.token_ids_n, batch.positions_n, batch.row_starts
        tables, n = batch.tables_bj, len(batch.token_ids_n)
        arrays = ((ids, 1), (positions, 1), (starts, 1), (tables, 2))
        _require(
            int32=all(array.dtype == np.int32 for array, _ in arrays),
            dimensions=all(array.ndim == ndim for array, ndim in arrays),
            contiguous=all(array.flags.c_contiguous for array, _ in arrays),
            lengths=0 < n == len(positions) and len(starts) - 1 == tables.shape[0],
        )
        firsts, lasts = starts[:-1], starts[1:] - 1
        _require(
            row_starts=starts[0] == 0 and starts[-1] == n and (lasts >= firsts).all(),
            token_ids=_within(ids, self.config.vocab_size),
            positions=_within(positions, self.context),
            tables=_within(tables, self.num_blocks),
        )
        ends = positions[lasts]
        _require(
            consecutive=(ends - positions[firsts] == lasts - firsts).all(),
            table_width=ends.max() // BLOCK < tables.shape[1],
        )


def _require(**conditions: object) -> None:
    """Asserts conditions by name."""
    wrong = [name for name, holds in conditions.items() if not holds]
    assert not wrong, f"wrong for the native kernels: {', '.join(wrong)}"


def _within(values: np.ndarray, end: int) -> bool:
    return bool(values.min() >= 0 and values.max() < end)


class _RopeTable:
    """cos and sin of all positions so far, made in equal chunks: torch's cos of a vector's end may
    differ from its middle, and a position's numbers must never change."""

    def __init__(self, weights: Weights) -> None:
        self._frequencies = inverse_frequencies(weights.config, long=weights.long_rope)
        self._scale = weights.config.rope_attention_factor
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._cos = self._sin = torch.empty(0, len(self._frequencies))

    def up_to(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables [at least `length`, r] in fp32."""
        if self._cos.shape[0] < length:
            wanted = max(length, 2 * self._cos.shape[0])
            while len(self._tables) * _ROPE_CHUNK < wanted:
                self._tables.append(self._chunk(len(self._tables) * _ROPE_CHUNK))
            self._cos, self._sin = (torch.cat(parts) for parts in zip(*self._tables, strict=True))
        return self._cos, self._sin

    def _chunk(self, first: int) -> tuple[Tensor, Tensor]:
        positions_1t = torch.arange(first, first + _ROPE_CHUNK)[None]
        cos, sin = rope_table(self._frequencies, positions_1t, self._scale)
        return cos.view(_ROPE_CHUNK, -1), sin.view(_ROPE_CHUNK, -1)


class _Packed:
    """A model's weights as the kernels read them; keeps alive all memory that `model` points to."""

    def __init__(self, library: ctypes.CDLL, weights: Weights) -> None:
        self._library = library
        self._kept: list[object] = []
        config = weights.config
        if weights.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"native kernels compute in float32 or bfloat16, not {weights.dtype}")
        self._half = weights.dtype == torch.bfloat16
        self.layers = (_Layer * config.num_layers)()
        for target, layer in zip(self.layers, weights.layers, strict=True):
            target.attention_norm = self._vector(layer.attention_norm)
            target.mlp_norm = self._vector(layer.mlp_norm)
            target.query_key_value = self._matrix(layer.query_key_value)
            target.output = self._matrix(layer.output)
            target.gate_up = self._matrix(layer.gate_up, _gate_up_rows(config.intermediate_size))
            target.down = self._matrix(layer.down)
            del layer  # a layer made on the way: let go of it before the next is made
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
    _require(
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
        _require(scale=matrix.scale.dtype == dtype and matrix.scale.shape == shape)


def _declare(library: ctypes.CDLL) -> None:
    """The C functions' types: without them ctypes would cut pointers to 32 bits."""
    void, integer, size = c_void_p, ctypes.c_int, c_int64
    types = {
        "decoder_create": (void, [void]),
        "decoder_destroy": (None, [void]),
        "decoder_forward": (integer, [void, void]),
        "decoder_logits": (integer, [void, void, size, void, size]),
        "head_elements": (size, [size]),
        "packed_bytes": (size, [size, size, size]),
        "pack": (integer, [void, void, size, void, void, size]),
        "large_pages": (None, [void, size]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, f"phiforge_{name}")
        function.restype, function.argtypes = result, arguments
