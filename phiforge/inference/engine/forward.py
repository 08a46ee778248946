"""The decoder in plain torch over a paged cache: for CUDA, and for CPUs without a compiler.

`runner = TorchRunner(weights, exact=True)`, `runner.allocate(blocks)`, `runner.forward(batch)`.
Nothing is written.

Products run over all tokens of a pass at once, attention over groups of similar rows. In exact mode
a row's numbers depend on its own tokens alone, as measured on CPU kernels (MKL fp32, oneDNN bf16):
products (products.py) and attention (attention.py) keep rules for that, and SiLU is spelled out,
because its fused kernel rounds the end of an array otherwise than its middle.

Shapes: n tokens, d model dim, m any number of rows, h heads, k kv heads, e head dim, r half the
rotary dimensions, b rows of a group, t tokens of a row, j blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.inference.engine.attention import Cached, Group, attend, decode_group, make_groups
from phiforge.inference.engine.graphs import DecodeGraphs
from phiforge.inference.engine.memory import zeros
from phiforge.inference.engine.products import Product, describe, make_product
from phiforge.inference.engine.runner import BLOCK, Pass
from phiforge.inference.engine.weights import LayerWeights, Weights
from phiforge.model.quantize import Matrix
from phiforge.model.rope import inverse_frequencies, rope_table

_ROPE_CHUNK = 1024  # positions


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: Product
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class TorchRunner:
    """Weights, a cache and torch's kernels; see `runner.Runner`."""

    def __init__(self, weights: Weights, exact: bool) -> None:
        self.config = weights.config
        self.context = weights.config.max_position_embeddings
        self.dtype, self.device = weights.dtype, weights.embedding.device
        self.mode_is_exact = exact and self.device.type == "cpu"  # measured on CPU kernels only
        self.name = f"torch {describe(weights.format, self.device)}"
        if self.device.type != "cpu":
            self.name += f" on {self.device}"
        self.num_blocks = 0
        heads = self.config.num_layers * self.config.num_kv_heads
        self.block_bytes = 2 * heads * BLOCK * self.config.head_size * self.dtype.itemsize
        self._layers = [self._make_layer(layer) for layer in weights.layers]
        self._embedding, self._norm_weight = weights.embedding, weights.norm
        self._lm_head = self._make_product(weights.lm_head)
        frequencies = inverse_frequencies(self.config, long=weights.long_rope)
        self._frequencies = frequencies.to(self.device)
        # whole at once on CUDA: a captured graph keeps the table's address
        self._rope = self._rope_table(1 if self.device.type == "cpu" else self.context)
        self._graphs = DecodeGraphs(self._decode) if self.device.type == "cuda" else None

    def allocate(self, num_blocks: int) -> None:
        """Makes the cache anew, all zeros; one block more than asked for is padding's."""
        self._keys = self._values = torch.empty(0)
        if self._graphs is not None:
            self._graphs.clear()
        size, heads = self.config.head_size, self.config.num_kv_heads
        shape = (self.config.num_layers, heads, (num_blocks + 1) * BLOCK, size)
        self._keys = zeros(shape, self.dtype, self.device, "the cache of keys")
        self._values = zeros(shape, self.dtype, self.device, "the cache of values")
        self.num_blocks = num_blocks

    def copy_block(self, source: int, target: int) -> None:
        """Keys and values of all layers."""
        for cache in (self._keys, self._values):
            blocks = cache.unflatten(2, (-1, BLOCK))
            blocks[:, :, target] = blocks[:, :, source]

    @torch.inference_mode()
    def forward(self, batch: Pass) -> Tensor:
        """x [n, d] after the final norm."""
        if self._graphs is not None and len(batch.token_ids_n) == len(batch.row_starts) - 1:
            x_nd = self._graphs.run(batch, self.num_blocks, self.device)
            if x_nd is not None:
                return x_nd
        rows_n = np.repeat(np.arange(len(batch.row_starts) - 1), np.diff(batch.row_starts))
        places_n = batch.tables_bj[rows_n, batch.positions_n // BLOCK].astype(np.int64)
        slots_n = self._put(places_n * BLOCK + batch.positions_n % BLOCK)
        self._grow_rope(int(batch.positions_n.max()) + 1)
        groups = make_groups(batch, self.config, self.num_blocks + 1, self.device)
        ids_n, positions_n = self._put(batch.token_ids_n), self._put(batch.positions_n)
        return self._run(ids_n, positions_n, slots_n, groups)

    @torch.inference_mode()
    def logits(self, x_md: Tensor) -> Tensor:
        """Logits [m, v] in fp32."""
        return self._lm_head(x_md).float()

    def _make_product(self, matrix: Matrix) -> Product:
        return make_product(matrix, self.device, self.dtype, self.mode_is_exact)

    def _make_layer(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            attention_norm=layer.attention_norm,
            query_key_value=self._make_product(layer.query_key_value),
            output=self._make_product(layer.output),
            mlp_norm=layer.mlp_norm,
            gate_up=self._make_product(layer.gate_up),
            down=self._make_product(layer.down),
        )

    def _decode(self, ids_n: Tensor, positions_n: Tensor, tables_nj: Tensor) -> Tensor:
        """One token of each row, all on the device: what a graph captures."""
        blocks_n1 = tables_nj.gather(1, (positions_n // BLOCK)[:, None])
        slots_n = blocks_n1[:, 0] * BLOCK + positions_n % BLOCK
        group = decode_group(tables_nj, positions_n, self.config, self.num_blocks + 1)
        return self._run(ids_n, positions_n, slots_n, [group])

    def _run(
        self, ids_n: Tensor, positions_n: Tensor, slots_n: Tensor, groups: list[Group]
    ) -> Tensor:
        h, k = self.config.num_heads, self.config.num_kv_heads
        x_nd = self._embedding[ids_n]
        cos, sin = self._rope[0][positions_n], self._rope[1][positions_n]
        for index, layer in enumerate(self._layers):
            qkv = layer.query_key_value(self._norm(x_nd, layer.attention_norm))
            qkv = qkv.unflatten(1, (-1, self.config.head_size))
            turned = _rotate(qkv[:, : h + k], cos, sin)
            cached = Cached(self._keys[index], self._values[index])
            cached.write(slots_n, turned[:, h:], qkv[:, h + k :])
            out_nd = attend(turned[:, :h], cached, groups, self.mode_is_exact)
            x_nd = x_nd + layer.output(out_nd)
            gate, up = layer.gate_up(self._norm(x_nd, layer.mlp_norm)).chunk(2, dim=-1)
            x_nd = x_nd + layer.down(self._silu(gate) * up)
        return self._norm(x_nd, self._norm_weight)

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def _norm(self, x_nd: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x_nd.float(), weight.shape, weight, self.config.rms_norm_eps).to(x_nd)

    def _silu(self, gate: Tensor) -> Tensor:
        if not self.mode_is_exact:
            return F.silu(gate)
        gate_fp32 = gate.float()
        return (gate_fp32 / gate_fp32.neg().exp_().add_(1.0)).to(gate.dtype)

    def _rope_table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions up to some multiple of 1024, made in equal chunks: torch's
        cos of a vector's end may differ from its middle, and no position's may ever change."""
        chunks = []
        for first in range(0, num_positions, _ROPE_CHUNK):
            positions = torch.arange(first, first + _ROPE_CHUNK, device=self.device)[None]
            scale = self.config.rope_attention_factor
            chunks.append(rope_table(self._frequencies, positions, scale))
        return torch.cat([cos[0] for cos, _ in chunks]), torch.cat([sin[0] for _, sin in chunks])

    def _grow_rope(self, num_positions: int) -> None:
        known = self._rope[0].shape[0]
        if known < num_positions:
            self._rope = self._rope_table(max(num_positions, 2 * known))


def _rotate(x_nhe: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, half-split, in fp32: the same operations as `phiforge.model.rope`, without autograd."""
    half = cos.shape[-1]
    x = x_nhe.float()
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = torch.empty_like(x, dtype=torch.float32)
    turned[..., :half] = (first * cos).sub_(second * sin)
    turned[..., half : 2 * half] = (second * cos).add_(first * sin)
    turned[..., 2 * half :] = x[..., 2 * half :]
    return turned.to(x_nhe.dtype)
