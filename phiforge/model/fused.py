"""The decoder's training pass with own kernels: forward and backward written out, layer by layer.

`with fused(model, kernels) as decoder:` model.hidden(...) goes through `decoder`, and backward puts
gradients straight into each parameter's .grad (see `Weights`). It writes nothing.

Shapes: b rows, t length, n = b x t tokens, d model dim, f feed-forward, r half the rotary
dimensions, m runs of tokens that attend to each other (documents in their rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phiforge.model.kernels import Heads, Kernels
from phiforge.model.phi import Cache, Phi

# A pass takes a multiple of this many tokens, some padding among them if need be: for every number
# of rows oneDNN compiles matrix products anew. Memory is made for multiples of _ROOM tokens.
_MULTIPLE, _ROOM = 128, 1024


class Matrix:
    """Some matrices below each other: a copy in the compute dtype, and their fp32 gradient.

    Each parameter's `.grad` is its part of `gradient`, so q, k, v and gate, up stay parameters of
    their own while one product serves them all.
    """

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype) -> None:
        self.parameters = [module.weight for module in modules]
        shape = (sum(len(p) for p in self.parameters), self.parameters[0].shape[1])
        self.weight = torch.empty(shape, dtype=dtype)
        self.gradient = torch.zeros(shape)
        sizes = [len(p) for p in self.parameters]
        self.shadows = self.weight.split(sizes)
        for parameter, gradient in zip(self.parameters, self.gradient.split(sizes), strict=True):
            parameter.grad = gradient

    def refresh(self) -> None:
        """Copies the parameters again, after something else than the optimizer changed them."""
        for parameter, shadow in zip(self.parameters, self.shadows, strict=True):
            shadow.copy_(parameter.detach())


@dataclass(frozen=True)
class LayerWeights:
    """One layer: two norms (fp32 parameters) and four fused matrices."""

    attention_norm: nn.Parameter
    qkv: Matrix
    output: Matrix
    mlp_norm: nn.Parameter
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class LayerState:
    """What one layer's backward pass needs; n tokens each."""

    x_nd: Tensor
    scale_n: Tensor
    qkv_nd: Tensor
    attended_nd: Tensor
    log_sum_nh: Tensor
    middle_nd: Tensor
    middle_scale_n: Tensor
    gate_up_nf: Tensor


@dataclass(frozen=True)
class Buffers:
    """Every activation of a pass, and scratch that all layers share."""

    layers: list[LayerState]
    last_nd: Tensor
    last_scale_n: Tensor
    normed_nd: Tensor
    delta_nd: Tensor
    heads_nd: Tensor
    wide_nf: Tensor

    def first(self, num_tokens: int) -> Buffers:
        """The same memory for a pass of fewer tokens."""
        return Buffers(
            [
                LayerState(*(tensor[:num_tokens] for tensor in vars(layer).values()))
                for layer in self.layers
            ],
            *(tensor[:num_tokens] for name, tensor in vars(self).items() if name != "layers"),
        )


@dataclass(frozen=True)
class Pass:
    """The tokens of one pass: ids, where runs start [m + 1], RoPE tables and their rows."""

    token_ids_n: Tensor
    starts_m: Tensor
    tables_pr: tuple[Tensor, Tensor]
    positions_n: Tensor


class FusedDecoder:
    """The weights in the compute dtype, gradient buffers, and the two passes over them."""

    def __init__(self, model: Phi, kernels: Kernels) -> None:
        config, dtype = model.config, model.compute_dtype
        self.model, self.kernels, self.dtype, self.eps = model, kernels, dtype, config.rms_norm_eps
        window = config.sliding_window
        self.heads = Heads(config.num_heads, config.num_kv_heads, config.head_size, window)
        self.layers = [
            LayerWeights(
                layer.attention_norm.weight,
                Matrix([layer.attention.query, layer.attention.key, layer.attention.value], dtype),
                Matrix([layer.attention.output], dtype),
                layer.mlp_norm.weight,
                Matrix([layer.mlp.gate, layer.mlp.up], dtype),
                Matrix([layer.mlp.down], dtype),
            )
            for layer in model.layers
        ]
        self.matrices = [
            matrix
            for layer in self.layers
            for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ]
        inside = {id(p) for matrix in self.matrices for p in matrix.parameters}
        self.others = [p for p in model.parameters() if id(p) not in inside]
        for parameter in self.others:
            parameter.grad = torch.zeros_like(parameter)
        self.scratch = torch.empty(max(m.gradient.numel() for m in self.matrices), dtype=dtype)
        self.holds_gradients = False
        self.free: list[Buffers] = []
        self.tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Copies every parameter again, after something else than the optimizer changed them."""
        for matrix in self.matrices:
            matrix.refresh()

    def shadow(self, parameter: Tensor) -> Tensor | None:
        """The copy of a parameter in the compute dtype that the optimizer must keep up to date."""
        for matrix in self.matrices:
            for own, shadow in zip(matrix.parameters, matrix.shadows, strict=True):
                if own is parameter:
                    return shadow
        return None

    def clear(self) -> None:
        """Forgets the gradients: the next backward pass overwrites those of matrices."""
        self.holds_gradients = False
        for parameter in self.others:
            assert parameter.grad is not None
            parameter.grad.zero_()

    def hidden(
        self,
        token_ids_bt: Tensor,
        *,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        mask_bts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As `Phi.hidden`, but what stands at padding means nothing: most of it is not computed.

        Masks, caches and documents that lie in pieces take the plain layers.
        """
        runs = None
        if mask_bts is None and cache is None:
            runs = self._runs(token_ids_bt, documents_bt)
        if runs is None:
            return Phi.hidden(
                self.model,
                token_ids_bt,
                positions_bt=positions_bt,
                documents_bt=documents_bt,
                mask_bts=mask_bts,
                cache=cache,
            )
        self.model.check(token_ids_bt, positions_bt, documents_bt, mask_bts, cache)
        kept_n, starts_m = runs
        tables, positions_n = self._angles(token_ids_bt, positions_bt)
        ids_n = token_ids_bt.reshape(-1)
        moved = not torch.equal(kept_n, torch.arange(len(ids_n)))
        if moved:
            ids_n, positions_n = ids_n[kept_n], positions_n[kept_n]
        tokens = Pass(ids_n, starts_m, tables, positions_n)
        x_nd: Tensor = _Decode.apply(self.model.embedding.weight, self, tokens)  # type: ignore
        if moved:
            x_nd = x_nd.new_zeros(token_ids_bt.numel(), x_nd.shape[1]).index_copy(0, kept_n, x_nd)
        return x_nd.view(*token_ids_bt.shape, -1)

    def _runs(
        self, token_ids_bt: Tensor, documents_bt: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Places of the tokens to compute, and where those that see each other begin; or None."""
        if documents_bt is None:
            n, length = token_ids_bt.numel(), token_ids_bt.shape[1]
            return torch.arange(n), torch.arange(0, n + 1, length)
        runs = self.kernels.find_runs(documents_bt.to(torch.int32).contiguous(), _MULTIPLE)
        return None if runs is None or runs[1][-1] == 0 else runs

    def _angles(
        self, token_ids_bt: Tensor, positions_bt: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """RoPE tables [p, r] and each token's row in them.

        One table of all positions serves until the model's frequencies change; positions beyond the
        model's maximum get a row for each token.
        """
        num_rows, length = token_ids_bt.shape
        limit = max(self.model.config.max_position_embeddings, length)
        if positions_bt is None:
            positions_n = torch.arange(length).repeat(num_rows)
        else:
            positions_n = positions_bt.expand(num_rows, length).reshape(-1).long()
            lowest, highest = positions_n.aminmax()
            if int(lowest) < 0 or int(highest) >= limit:
                cos, sin = self.model.rope(token_ids_bt, positions_n.view(num_rows, length))
                tables = cos.flatten(0, 2), sin.flatten(0, 2)
                return tables, torch.arange(len(positions_n))
        key = (self.model.max_length, limit)
        if key not in self.tables:
            cos, sin = self.model.rope(token_ids_bt, torch.arange(limit)[None])
            self.tables = {key: (cos.flatten(0, 2), sin.flatten(0, 2))}
        return self.tables[key], positions_n

    def forward(self, tokens: Pass, buffers: Buffers) -> Tensor:
        """The final norm's output [n, d]; `buffers` keep what `backward` needs."""
        kernels, weights, states = self.kernels, self.layers, buffers.layers
        normed, delta, wide = buffers.normed_nd, buffers.delta_nd, buffers.wide_nf
        x_nd = states[0].x_nd
        kernels.embed(self.model.embedding.weight.detach(), tokens.token_ids_n, x_nd)
        kernels.norm(x_nd, weights[0].attention_norm, self.eps, normed, states[0].scale_n)
        out = torch.empty_like(normed)
        for i, (w, s) in enumerate(zip(weights, states, strict=True)):
            torch.mm(normed, w.qkv.weight.t(), out=s.qkv_nd)
            kernels.rope(s.qkv_nd, tokens.tables_pr, tokens.positions_n, self.heads)
            kernels.attention(s.qkv_nd, tokens.starts_m, self.heads, s.attended_nd, s.log_sum_nh)
            torch.mm(s.attended_nd, w.output.weight.t(), out=delta)
            add = (s.x_nd, delta)
            kernels.norm(s.middle_nd, w.mlp_norm, self.eps, normed, s.middle_scale_n, add)
            torch.mm(normed, w.gate_up.weight.t(), out=s.gate_up_nf)
            kernels.swiglu(s.gate_up_nf, wide)
            torch.mm(wide, w.down.weight.t(), out=delta)
            add = (s.middle_nd, delta)
            if i + 1 < len(states):
                next_norm, after = weights[i + 1].attention_norm, states[i + 1]
                kernels.norm(after.x_nd, next_norm, self.eps, normed, after.scale_n, add)
            else:
                last_norm = self.model.norm.weight
                kernels.norm(buffers.last_nd, last_norm, self.eps, out, buffers.last_scale_n, add)
        return out

    def backward(self, tokens: Pass, buffers: Buffers, d_out_nd: Tensor) -> None:
        """Adds every parameter's gradient to its .grad; what `buffers` hold is used up."""
        kernels, rope = self.kernels, (tokens.tables_pr, tokens.positions_n)
        normed, d_normed, wide = buffers.normed_nd, buffers.delta_nd, buffers.wide_nf
        d_heads, d_x = buffers.heads_nd, torch.empty_like(normed)
        last = (buffers.last_nd, self.model.norm.weight, buffers.last_scale_n)
        kernels.norm_backward(*last, d_out_nd, None, d_x, normed, _gradient(last[1]))
        for w, s in zip(reversed(self.layers), reversed(buffers.layers), strict=True):
            torch.mm(d_x, w.down.weight, out=wide)
            d_gate_up = s.gate_up_nf
            kernels.swiglu_backward(s.gate_up_nf, wide, d_gate_up, wide)
            self._weight_gradient(w.down, d_x, wide)
            torch.mm(d_gate_up, w.gate_up.weight, out=d_normed)
            norm = (s.middle_nd, w.mlp_norm, s.middle_scale_n)
            kernels.norm_backward(*norm, d_normed, d_x, d_x, normed, _gradient(w.mlp_norm))
            self._weight_gradient(w.gate_up, d_gate_up, normed)

            torch.mm(d_x, w.output.weight, out=d_heads)
            self._weight_gradient(w.output, d_x, s.attended_nd)
            d_qkv, found = s.qkv_nd, (s.attended_nd, s.log_sum_nh)
            kernels.attention_backward(
                s.qkv_nd, tokens.starts_m, self.heads, *found, d_heads, d_qkv
            )
            kernels.rope(d_qkv, *rope, self.heads, back=True)
            torch.mm(d_qkv, w.qkv.weight, out=d_normed)
            norm = (s.x_nd, w.attention_norm, s.scale_n)
            kernels.norm_backward(*norm, d_normed, d_x, d_x, normed, _gradient(w.attention_norm))
            self._weight_gradient(w.qkv, d_qkv, normed)
        kernels.embed_backward(d_x, tokens.token_ids_n, _gradient(self.model.embedding.weight))
        self.holds_gradients = True

    def _weight_gradient(self, matrix: Matrix, d_out_nf: Tensor, x_nd: Tensor) -> None:
        """matrix.gradient (+)= d_out^T x; a product of bf16 comes in bf16 and is added in fp32."""
        into, add = matrix.gradient, self.holds_gradients
        if self.dtype == torch.float32:
            torch.addmm(into, d_out_nf.t(), x_nd, beta=float(add), out=into)
            return
        product = self.scratch[: into.numel()].view(into.shape)
        torch.mm(d_out_nf.t(), x_nd, out=product)
        self.kernels.accumulate(product, into, add)

    def borrow(self, num_tokens: int) -> Buffers:
        """Memory for one pass; give it back to `free` when its backward pass is done."""
        buffers = self.free.pop() if self.free else None
        if buffers is None or len(buffers.last_nd) < num_tokens:
            buffers = self._allocate(-(-num_tokens // _ROOM) * _ROOM)
        return buffers

    def _allocate(self, num_tokens: int) -> Buffers:
        def make(size: int = 0, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty((num_tokens, size) if size else (num_tokens,), dtype=dtype)

        config, heads, fp32 = self.model.config, self.heads, torch.float32
        d, f, wide = config.hidden_size, config.intermediate_size, heads.row_size
        query = heads.num_heads * heads.head_size
        layers = [
            LayerState(
                *(make(d), make(dtype=fp32), make(wide), make(query)),
                *(make(heads.num_heads, fp32), make(d), make(dtype=fp32), make(2 * f)),
            )
            for _ in self.layers
        ]
        return Buffers(layers, make(d), make(dtype=fp32), make(d), make(d), make(query), make(f))


class _Decode(torch.autograd.Function):
    """Joins the two passes to autograd. `anchor` only says that a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, decoder: FusedDecoder, tokens: Pass) -> Tensor:
        memory = decoder.borrow(len(tokens.token_ids_n))
        out_nd = decoder.forward(tokens, memory.first(len(tokens.token_ids_n)))
        if ctx.needs_input_grad[0]:
            ctx.decoder, ctx.tokens, ctx.memory = decoder, tokens, memory
        else:
            decoder.free.append(memory)
        return out_nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        decoder, tokens, memory = ctx.decoder, ctx.tokens, ctx.memory
        if memory is None:
            raise RuntimeError("the fused decoder's backward pass runs once for each forward pass")
        ctx.memory = None
        buffers = memory.first(len(tokens.token_ids_n))
        decoder.backward(tokens, buffers, gradients[0].contiguous())
        decoder.free.append(memory)
        return None, None, None


@contextmanager
def fused(model: Phi, kernels: Kernels) -> Iterator[FusedDecoder]:
    """Inside the block, `model.hidden` runs on kernels and gradients live in fused buffers.

    The model's weights must change through `FusedDecoder.shadow` or be followed by `refresh`;
    gradients are those of `backward` on a loss, not of torch.autograd.grad. All parameters are fp32
    on the CPU and require gradients. Afterwards the model has no gradients.
    """
    decoder = FusedDecoder(model, kernels)
    model.hidden = decoder.hidden  # shadows the method
    model.kernels = kernels
    try:
        yield decoder
    finally:
        del model.hidden
        model.kernels = None
        for parameter in model.parameters():
            parameter.grad = None


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
