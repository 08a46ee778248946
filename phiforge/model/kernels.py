"""The training step's C++ kernels on tensors: norm, RoPE, attention, SwiGLU, loss, AdamW.

`kernels = load()` gives them, or None (`unavailable()` says why); each call takes contiguous CPU
tensors and writes into those named out or d_...; activations are all bf16 or all fp32.

Shapes: n tokens, d model dim, h heads, k kv heads, e head dim, f feed-forward, v vocabulary, r half
the rotary dimensions, m runs (documents in their rows). The C++ is core/native/training.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from phiforge.core.native import build

_P, _I, _F = c_void_p, c_int64, c_float
_TYPES: dict[str, tuple[type, ...]] = {
    "norm": (_P, _P, _P, _P, _P, _P, _I, _I, _F),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _I, _I),
    "rope": (_P, _P, _P, _P, _I, _I, _I, _I, _I, _F),
    "swiglu": (_P, _P, _I, _I),
    "swiglu_backward": (_P, _P, _P, _P, _I, _I),
    "cross_entropy": (_P, _P, _P, _P, _I, _I, _I),
    "embed": (_P, _P, _P, _I, _I),
    "embed_backward": (_P, _P, _P, _I, _I),
    "accumulate": (_P, _P, _I, _I),
    "attention": (_P, _P, _P, _P, _I, _I, _I, _I, _I, _F),
    "attention_backward": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _F),
    "adamw": (_I, _P, _P, _P, _P, _P, _P, _P, _F, _F, _F, _F, _F, _F, _F),
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_NO_WINDOW = 2**40


def load() -> Kernels | None:
    """The kernels, compiled on first use; None where they cannot be had or are switched off."""
    library = build.describe("training")
    return _kernels(library) if library else None


def unavailable() -> str | None:
    """Why `load` gives None, or None."""
    return build.unavailable("training")


@functools.cache
def _kernels(library: build.Library) -> Kernels:
    return Kernels(library)


@dataclass(frozen=True)
class Heads:
    """What attention needs to know about a row of the fused projection q | k | v."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None

    @property
    def row_size(self) -> int:
        """Numbers in one row of q | k | v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size


class TensorTable:
    """Addresses of a list of tensors, for a kernel that goes through all of them in one call."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)  # keeps the memory alive
        self.pointers = (c_void_p * len(self.tensors))(*map(_address, self.tensors))
        sizes = [0 if tensor is None else tensor.numel() for tensor in self.tensors]
        self.counts = (c_int64 * len(sizes))(*sizes)

    def __len__(self) -> int:
        return len(self.tensors)


class Kernels:
    """Every kernel of one compiled library."""

    def __init__(self, library: build.Library) -> None:
        self.name = f"native {library.simd}"
        self._calls: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, types in _TYPES.items():
            for dtype, suffix in _NAMES.items():
                address = c_void_p.in_dll(library.handle, f"{name}_{suffix}").value
                assert address is not None
                self._calls[name, dtype] = CFUNCTYPE(None, *types)(address)
        self._find_runs = library.handle.find_runs
        self._find_runs.argtypes = (_P, _I, _I, _I, _P, _P)
        self._find_runs.restype = c_int64
        self._sum_of_squares = library.handle.sum_of_squares
        self._sum_of_squares.argtypes = (_I, _P, _P)
        self._sum_of_squares.restype = c_double

    def norm(
        self,
        x_nd: Tensor,
        weight_d: Tensor,
        eps: float,
        out_nd: Tensor,
        scale_n: Tensor,
        add: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """out = RMSNorm(x), scale = 1 / rms(x); with `add`, x = add[0] + add[1] is made first."""
        before, delta = add or (None, None)
        n, d = x_nd.shape
        tensors = (x_nd, before, delta, weight_d, out_nd, scale_n)
        self._calls["norm", x_nd.dtype](*map(_address, tensors), n, d, eps)

    def norm_backward(
        self,
        x_nd: Tensor,
        weight_d: Tensor,
        scale_n: Tensor,
        d_out_nd: Tensor,
        d_skip_nd: Tensor | None,
        d_x_nd: Tensor,
        out_nd: Tensor,
        d_weight_d: Tensor,
    ) -> None:
        """d_x = d_skip + the norm's gradient; out = the norm's output again; d_weight += its own.

        `d_x` may be `d_skip` or `d_out`.
        """
        n, d = x_nd.shape
        tensors = (x_nd, weight_d, scale_n, d_out_nd, d_skip_nd, d_x_nd, out_nd, d_weight_d)
        self._calls["norm_backward", x_nd.dtype](*map(_address, tensors), n, d)

    def rope(
        self,
        qkv_nd: Tensor,
        tables_pr: tuple[Tensor, Tensor],
        positions_n: Tensor,
        heads: Heads,
        back: bool = False,
    ) -> None:
        """Turns queries and keys in q | k | v in place; `back` by the opposite angles.

        cos and sin of a token are rows of the tables; positions must lie within them.
        """
        n, r = len(qkv_nd), tables_pr[0].shape[1]
        turned = heads.num_heads + heads.num_kv_heads
        self._calls["rope", qkv_nd.dtype](
            *map(_address, (qkv_nd, *tables_pr, positions_n)),
            *(n, heads.row_size, turned, heads.head_size, r),
            -1.0 if back else 1.0,
        )

    def attention(
        self, qkv_nd: Tensor, starts_m: Tensor, heads: Heads, out_nd: Tensor, log_sum_nh: Tensor
    ) -> None:
        """Causal attention inside each run [starts[i], starts[i + 1]); int64 [m + 1]."""
        tensors = (qkv_nd, out_nd, log_sum_nh, starts_m)
        self._calls["attention", qkv_nd.dtype](*map(_address, tensors), *_shape(starts_m, heads))

    def attention_backward(
        self,
        qkv_nd: Tensor,
        starts_m: Tensor,
        heads: Heads,
        out_nd: Tensor,
        log_sum_nh: Tensor,
        d_out_nd: Tensor,
        d_qkv_nd: Tensor,
    ) -> None:
        """The gradient of queries, keys (both after RoPE) and values."""
        tensors = (qkv_nd, out_nd, log_sum_nh, d_out_nd, d_qkv_nd, starts_m)
        call = self._calls["attention_backward", qkv_nd.dtype]
        call(*map(_address, tensors), *_shape(starts_m, heads))

    def swiglu(self, gate_up_nf: Tensor, out_nf: Tensor) -> None:
        """out = silu(gate) x up, from rows gate | up."""
        tensors = (gate_up_nf, out_nf)
        self._calls["swiglu", out_nf.dtype](*map(_address, tensors), *out_nf.shape)

    def swiglu_backward(
        self, gate_up_nf: Tensor, d_out_nf: Tensor, d_gate_up_nf: Tensor, out_nf: Tensor
    ) -> None:
        """The gradient of gate | up, and the output again."""
        tensors = (gate_up_nf, d_out_nf, d_gate_up_nf, out_nf)
        self._calls["swiglu_backward", out_nf.dtype](*map(_address, tensors), *out_nf.shape)

    def cross_entropy(
        self, logits_nv: Tensor, targets_n: Tensor, loss_n: Tensor, scale_n: Tensor | None = None
    ) -> None:
        """loss = -log softmax(logits)[target]; logits become scale x (softmax - one-hot)."""
        tensors = (logits_nv, targets_n, scale_n, loss_n)
        self._calls["cross_entropy", logits_nv.dtype](*map(_address, tensors), 1, *logits_nv.shape)

    def token_loss(self, logits_nv: Tensor, targets_n: Tensor, loss_n: Tensor) -> None:
        """The loss alone: logits stay as they are."""
        tensors = (logits_nv, targets_n, None, loss_n)
        self._calls["cross_entropy", logits_nv.dtype](*map(_address, tensors), 0, *logits_nv.shape)

    def embed(self, table_vd: Tensor, token_ids_n: Tensor, out_nd: Tensor) -> None:
        """Rows of an fp32 table, in the dtype of `out`. Raises IndexError for unknown ids."""
        lowest, highest = token_ids_n.aminmax()
        if int(lowest) < 0 or int(highest) >= len(table_vd):
            raise IndexError(
                f"a token id is outside 0 to {len(table_vd) - 1}, the model's vocabulary"
            )
        tensors = (table_vd, token_ids_n, out_nd)
        self._calls["embed", out_nd.dtype](*map(_address, tensors), *out_nd.shape)

    def embed_backward(self, d_x_nd: Tensor, token_ids_n: Tensor, d_table_vd: Tensor) -> None:
        """d_table[token id] += d_x, in the order of the tokens."""
        tensors = (d_x_nd, token_ids_n, d_table_vd)
        self._calls["embed_backward", d_x_nd.dtype](*map(_address, tensors), *d_x_nd.shape)

    def accumulate(self, source: Tensor, into: Tensor, add: bool) -> None:
        """into (fp32) = source, or += source."""
        call = self._calls["accumulate", source.dtype]
        call(_address(source), _address(into), source.numel(), int(add))

    def find_runs(self, documents_bt: Tensor, multiple: int) -> tuple[Tensor, Tensor] | None:
        """Places [n] of the tokens that are no padding (-1), and where documents begin among them.

        The second, int64 [m + 1], ends with n, a multiple of `multiple` where there is enough
        padding to fill it up. None when a document of a row comes back after another: no run would
        hold all of it.
        """
        size = documents_bt.numel()
        starts, kept = (torch.empty(size + 1, dtype=torch.int64) for _ in range(2))
        addresses = _address(starts), _address(kept)
        runs = self._find_runs(_address(documents_bt), *documents_bt.shape, multiple, *addresses)
        if runs < 0:
            return None
        return kept[: int(starts[runs])], starts[: runs + 1]

    def sum_of_squares(self, table: TensorTable) -> float:
        """Over all numbers of fp32 tensors; the same for any number of threads."""
        return self._sum_of_squares(len(table), table.counts, table.pointers)

    def adamw(
        self,
        weights: TensorTable,
        gradients: TensorTable,
        means: TensorTable,
        squares: TensorTable,
        shadows: TensorTable,
        decays: Sequence[float],
        *,
        shadow_dtype: torch.dtype,
        clip: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        step: int,
    ) -> None:
        """One AdamW step (arXiv 1711.05101) on fp32 tensors; `clip` scales the gradients.

        `shadows` (None where there is none) receive the new weights in `shadow_dtype`.
        """
        pointers = [t.pointers for t in (weights, gradients, means, squares, shadows)]
        self._calls["adamw", shadow_dtype](
            len(weights),
            weights.counts,
            *pointers,
            (c_float * len(decays))(*decays),
            *(clip, lr, *betas, eps, 1 - betas[0] ** step, 1 - betas[1] ** step),
        )


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "kernels read memory in order"
    return tensor.data_ptr()


def _shape(starts_m: Tensor, heads: Heads) -> tuple[float, ...]:
    window = _NO_WINDOW if heads.window is None else heads.window
    sizes = (heads.num_heads, heads.num_kv_heads, heads.head_size)
    return (len(starts_m) - 1, *sizes, window, heads.head_size**-0.5)
