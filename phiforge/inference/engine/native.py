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
from ctypes import Structure, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from phiforge.core.native.build import describe, unavailable
from phiforge.inference.engine.memory import zeros
from phiforge.inference.engine.packed import Packed, require
from phiforge.inference.engine.runner import BLOCK, Pass
from phiforge.inference.engine.sample import Laws
from phiforge.inference.engine.sample import draw as draw_in_torch
from phiforge.inference.engine.weights import Weights
from phiforge.model.config import PhiConfig
from phiforge.model.rope import inverse_frequencies, rope_table

_ROPE_CHUNK = 1024  # positions of the cos and sin table made at a time


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
        self._packed = Packed(self._library, weights)
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
        require(x=x_md.shape[1:] == (self.config.hidden_size,) and x_md.dtype == self.dtype)
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

    def draw(self, logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray) -> tuple[Tensor, Tensor]:
        """As `sample.draw`, in one pass over the logits: (token ids [b], finite [b]).

        Rows with top-k or top-p are drawn by `sample.draw`: their tokens must be sorted.
        """
        ranked_b = laws.ranked(logits_bv.shape[1]) & (laws.temperature != 0.0)
        ids_b, finite_b = self._draw_all(logits_bv, laws, uniforms_b)
        if ranked_b.any():
            places = np.flatnonzero(ranked_b)
            index = torch.from_numpy(places)
            ids_b[index], finite_b[index] = draw_in_torch(
                logits_bv[index], laws.take(places), uniforms_b[places]
            )
        return ids_b, finite_b

    def _draw_all(
        self, logits_bv: Tensor, laws: Laws, uniforms_b: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        logits_bv = logits_bv.contiguous()
        b, v = logits_bv.shape
        numbers = (laws.temperature, laws.min_p, uniforms_b)
        numbers = tuple(np.ascontiguousarray(values, np.float64) for values in numbers)
        require(
            logits=logits_bv.dtype == torch.float32,
            laws=all(values.shape == (b,) for values in numbers),
        )
        ids_b, finite_b = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.bool)
        failed = self._library.phiforge_draw(
            logits_bv.data_ptr(),
            b,
            v,
            *(values.ctypes.data for values in numbers),
            ids_b.data_ptr(),
            finite_b.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to draw {b} tokens")
        return ids_b, finite_b

    def copy_block(self, source: int, target: int) -> None:
        """Keys and values of all layers: one copy, a block is one piece of memory."""
        require(blocks=max(source, target) < self.num_blocks and min(source, target) >= 0)
        self._cache[target].copy_(self._cache[source])

    def _check(self, batch: Pass) -> None:
        """The kernels trust these numbers with memory: whatever is wrong here is our mistake."""
        ids, positions, starts = batch.token_ids_n, batch.positions_n, batch.row_starts
        tables, n = batch.tables_bj, len(batch.token_ids_n)
        arrays = ((ids, 1), (positions, 1), (starts, 1), (tables, 2))
        require(
            int32=all(array.dtype == np.int32 for array, _ in arrays),
            dimensions=all(array.ndim == ndim for array, ndim in arrays),
            contiguous=all(array.flags.c_contiguous for array, _ in arrays),
            lengths=0 < n == len(positions) and len(starts) - 1 == tables.shape[0],
        )
        firsts, lasts = starts[:-1], starts[1:] - 1
        require(
            row_starts=starts[0] == 0 and starts[-1] == n and (lasts >= firsts).all(),
            token_ids=_within(ids, self.config.vocab_size),
            positions=_within(positions, self.context),
            tables=_within(tables, self.num_blocks),
        )
        ends = positions[lasts]
        require(
            consecutive=(ends - positions[firsts] == lasts - firsts).all(),
            table_width=ends.max() // BLOCK < tables.shape[1],
        )


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


def _declare(library: ctypes.CDLL) -> None:
    """The C functions' types: without them ctypes would cut pointers to 32 bits."""
    void, integer, size = c_void_p, ctypes.c_int, c_int64
    types = {
        "decoder_create": (void, [void]),
        "decoder_destroy": (None, [void]),
        "decoder_forward": (integer, [void, void]),
        "decoder_logits": (integer, [void, void, size, void, size]),
        "draw": (integer, [void, size, size, void, void, void, void, void, size]),
        "head_elements": (size, [size]),
        "packed_bytes": (size, [size, size, size]),
        "pack": (integer, [void, void, size, void, void, size]),
        "large_pages": (None, [void, size]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, f"phiforge_{name}")
        function.restype, function.argtypes = result, arguments
