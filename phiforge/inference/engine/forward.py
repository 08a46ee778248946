"""The decoder as the engine runs it: fused matrices, a slot cache, one reduction order per row.

`Fused(model, exact).hidden(token_ids_bt, positions_bt, cache)` then `.logits(x)`. Nothing is
written.

In exact mode a row's numbers depend on its own tokens alone: not on the batch, on how a prompt was
cut into pieces, or on the cache's size. Measured on CPU kernels (MKL fp32, oneDNN bf16), this takes
three things: products never have fewer than 16 rows (fewer rows get another kernel); queries
per key head come in fours; in fp32 the values are summed 64 slots at a time (the kernel cuts
longer sums at places that depend on their length). SiLU is spelled out, because its fused kernel
rounds the end of an array otherwise than its middle.

Shapes: b rows, t new tokens, m = t x query heads per kv head, s slots, d model dim, h heads,
k kv heads, e head dim, r half the rotary dimensions, n any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.inference.engine.cache import SLOT_BLOCK, KVCache, round_slots
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.rope import inverse_frequencies, rope_table

ROW_BLOCK = 16  # exact mode: rows of a matrix product come in whole blocks
_QUERY_BLOCK = 4  # exact mode: queries of a batched product come in whole blocks


def round_rows(num_rows: int) -> int:
    """The next multiple of 16."""
    return -(-num_rows // ROW_BLOCK) * ROW_BLOCK


@dataclass(frozen=True)
class LayerWeights:
    """One layer in the compute dtype: query, key and value in one matrix, gate and up in one."""

    attention_norm: Tensor
    query_key_value: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Fused:
    """A model's weights as the engine multiplies them: copies, made anew when the model changes."""

    def __init__(self, model: Phi, exact: bool) -> None:
        self.config: PhiConfig = model.config
        self.exact = exact
        self.stamp = stamp(model)
        self.dtype = model.compute_dtype
        self.device = model.embedding.weight.device
        with torch.no_grad():
            self.layers = [self._layer(layer) for layer in model.layers]
            self.embedding = model.embedding.weight.detach().to(self.dtype, copy=True)
            self.norm = model.norm.weight.detach().float().clone()
            self.lm_head = self.embedding
            if model.lm_head is not None:
                self.lm_head = model.lm_head.weight.detach().to(self.dtype, copy=True)
        long = model.max_length > self.config.original_length
        self._frequencies = inverse_frequencies(self.config, long=long).to(self.device)
        self._rope = self._tables(1024)

    @property
    def context(self) -> int:
        """The longest row in tokens."""
        return self.config.max_position_embeddings

    def _layer(self, layer: torch.nn.Module) -> LayerWeights:
        def fused(*parts: torch.nn.Module) -> Tensor:
            return torch.cat([part.weight.detach().to(self.dtype) for part in parts])  # pyright: ignore

        attention, mlp = layer.attention, layer.mlp
        return LayerWeights(
            attention_norm=layer.attention_norm.weight.detach().float().clone(),  # pyright: ignore
            query_key_value=fused(attention.query, attention.key, attention.value),  # pyright: ignore
            output=fused(attention.output),  # pyright: ignore
            mlp_norm=layer.mlp_norm.weight.detach().float().clone(),  # pyright: ignore
            gate_up=fused(mlp.gate, mlp.up),  # pyright: ignore
            down=fused(mlp.down),  # pyright: ignore
        )

    def _tables(self, num_positions: int) -> tuple[Tensor, Tensor]:
        num = min(num_positions, self.context)
        positions = torch.arange(num, device=self.device)[None]
        cos, sin = rope_table(self._frequencies, positions, self.config.rope_attention_factor)
        return cos[0], sin[0]

    def _rope_at(self, positions_bt: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """cos and sin [b, t, 1, r]; padding beyond the context takes the last position's."""
        known = self._rope[0].shape[0]
        if known < min(s, self.context):
            self._rope = self._tables(max(s, 2 * known))
        index = positions_bt.clamp(max=self._rope[0].shape[0] - 1)
        return self._rope[0][index], self._rope[1][index]

    def hidden(self, token_ids_bt: Tensor, positions_bt: Tensor, cache: KVCache, s: int) -> Tensor:
        """x [b, t, d] after the final norm; the tokens enter the first b rows of the cache.

        Each token attends to the slots up to its own position, at most the config's sliding window,
        among the first `s` (a multiple of 64 above every real position).
        """
        b, t = token_ids_bt.shape
        assert s % SLOT_BLOCK == 0
        assert s <= cache.slots
        x_nd = self.embedding[self._pad_rows(token_ids_bt.flatten())]
        rope = self._rope_at(positions_bt, s)
        bias = self._bias(positions_bt, s)
        for index, layer in enumerate(self.layers):
            normed = self._norm(x_nd, layer.attention_norm)
            qkv = F.linear(normed, layer.query_key_value)[: b * t].view(b, t, -1, self._head_size)
            out_nd = self._attend(index, qkv, positions_bt, rope, bias, cache)
            x_nd = x_nd + F.linear(self._pad_rows(out_nd), layer.output)
            gate, up = F.linear(self._norm(x_nd, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x_nd = x_nd + F.linear(self._silu(gate) * up, layer.down)
        return self._norm(x_nd, self.norm)[: b * t].view(b, t, -1)

    def logits(self, x_nd: Tensor) -> Tensor:
        """Logits [n, v] in fp32."""
        return F.linear(self._pad_rows(x_nd), self.lm_head)[: x_nd.shape[0]].float()

    @property
    def _head_size(self) -> int:
        return self.config.head_size

    def _pad_rows(self, x: Tensor) -> Tensor:
        missing = -x.shape[0] % ROW_BLOCK if self.exact else 0
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x

    def _norm(self, x_nd: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_nd.float(), weight.shape, weight, self.config.rms_norm_eps).to(x_nd)

    def _silu(self, gate: Tensor) -> Tensor:
        if not self.exact:
            return F.silu(gate)
        gate_fp32 = gate.float()
        return (gate_fp32 / gate_fp32.neg().exp_().add_(1.0)).to(gate.dtype)

    def _bias(self, positions_bt: Tensor, s: int) -> Tensor:
        """What is added to the scores, [b, 1, t, 1, s] in fp32: 0 or -inf."""
        slots_s = torch.arange(s, device=self.device)
        positions = positions_bt[:, None, :, None, None]
        hidden = slots_s > positions
        if self.config.sliding_window is not None:
            hidden |= slots_s <= positions - self.config.sliding_window
        return torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)

    def _attend(
        self,
        index: int,
        qkv: Tensor,
        positions_bt: Tensor,
        rope: tuple[Tensor, Tensor],
        bias: Tensor,
        cache: KVCache,
    ) -> Tensor:
        """Attention of one layer, [b*t, h*e]; new keys and values enter the cache first."""
        b, t, _, e = qkv.shape
        h, k = self.config.num_heads, self.config.num_kv_heads
        turned = _rotate(qkv[:, :, : h + k], *rope)
        cache.write(index, positions_bt, turned[:, :, h:], qkv[:, :, h + k :])
        keys, values = cache.read(index, b, bias.shape[-1])
        q_bkme = turned[:, :, :h].view(b, t, k, h // k, e).transpose(1, 2).reshape(b * k, -1, e)
        m = q_bkme.shape[1]
        if self.exact and m % _QUERY_BLOCK:
            q_bkme = F.pad(q_bkme, (0, 0, 0, -m % _QUERY_BLOCK))
        scores = torch.bmm(q_bkme, keys).float()
        probabilities = self._weigh(scores, bias, (b, k, t, h // k)).to(self.dtype)
        out = self._sum_values(probabilities, values)[:, :m]
        return out.reshape(b, k, t, h // k, e).transpose(1, 2).reshape(b * t, h * e)

    def _weigh(self, scores: Tensor, bias: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """softmax(scores / sqrt(e) + bias) in fp32; padding queries keep a plain softmax."""
        m = shape[2] * shape[3]
        scores.mul_(self._head_size**-0.5)
        scores.view(*shape[:2], -1, bias.shape[-1])[:, :, :m].unflatten(2, shape[2:]).add_(bias)
        return torch.softmax(scores, dim=-1)

    def _sum_values(self, probabilities: Tensor, values: Tensor) -> Tensor:
        if not self.exact or self.dtype != torch.float32:
            return torch.bmm(probabilities, values)
        out = torch.bmm(probabilities[:, :, :SLOT_BLOCK], values[:, :SLOT_BLOCK])
        for start in range(SLOT_BLOCK, values.shape[1], SLOT_BLOCK):
            block = slice(start, start + SLOT_BLOCK)
            out.baddbmm_(probabilities[:, :, block], values[:, block])
        return out


def _rotate(x_bthe: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split, in fp32: the same operations as `phiforge.model.rope`, without autograd."""
    half = cos.shape[-1]
    x = x_bthe.float()
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = torch.empty_like(x, dtype=torch.float32)
    turned[..., :half] = (first * cos).sub_(second * sin)
    turned[..., half : 2 * half] = (second * cos).add_(first * sin)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned.to(x_bthe.dtype)


def stamp(model: Phi) -> tuple[object, ...]:
    """Changes whenever a weight is written in place, replaced, moved or cast."""
    parts = []
    for parameter in model.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        parts.append((parameter.data_ptr(), version))
    return (model.compute_dtype, model.max_length, *parts)


def attended_slots(last_position: int) -> int:
    """How many slots rows up to that position attend over."""
    return round_slots(last_position + 1)
