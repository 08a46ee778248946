"""The Phi decoder (arXiv 2412.08905 section 3): grouped-query attention, RoPE, SwiGLU, RMSNorm.

`logits_btv = Phi(config).initialize(torch.Generator())(token_ids_bt)`; `hidden` then `head` give
the same in two steps, so that a loss can take the vocabulary in chunks. It writes nothing.

Shapes: b batch, t query length, s key length, v vocabulary, d model dim, h heads, k kv heads,
e head dim.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phiforge.model.attention import QueryBlock, attention_bias, block_attention, query_blocks
from phiforge.model.config import PhiConfig
from phiforge.model.kernels import Kernels
from phiforge.model.norm import RMSNorm
from phiforge.model.rope import inverse_frequencies, rope_table, rotate

# Who may attend to whom, ready for use: numbers to add to the scores, [b or 1, 1, t, s]; blocks of
# queries for packed rows on a CPU; None, plain causal attention.
Bias: TypeAlias = Tensor | list[QueryBlock] | None


class Cache(Protocol):
    """Keys (after RoPE) and values of the tokens seen so far, kept by the caller."""

    def update(self, layer: int, k_bkte: Tensor, v_bkte: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens' keys and values of one layer; returns all of them, [b, k, s, e]."""
        ...


class Linear(nn.Linear):
    """A matrix without bias that multiplies in the dtype of its input, whatever its own dtype."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: values come from `Phi.initialize` or from a file, never from global state."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): h query heads share k key and value heads."""

    def __init__(self, config: PhiConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        query_size = config.num_heads * config.head_size
        key_size = config.num_kv_heads * config.head_size
        self.query = Linear(config.hidden_size, query_size)
        self.key = Linear(config.hidden_size, key_size)
        self.value = Linear(config.hidden_size, key_size)
        self.output = Linear(query_size, config.hidden_size)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor], bias: Bias, cache: Cache | None
    ) -> Tensor:
        heads = (*x_btd.shape[:2], -1, self.head_size)
        q_bthe = rotate(self.query(x_btd).view(heads), *rope)
        k_btke = rotate(self.key(x_btd).view(heads), *rope)
        v_btke = self.value(x_btd).view(heads)
        if isinstance(bias, list):
            return self.output(block_attention(q_bthe, k_btke, v_btke, bias).flatten(2))
        k_bkte, v_bkte = k_btke.transpose(1, 2), v_btke.transpose(1, 2)
        if cache is not None:
            k_bkte, v_bkte = cache.update(self.layer, k_bkte, v_bkte)
        out_bhte = F.scaled_dot_product_attention(
            q_bthe.transpose(1, 2),
            k_bkte,
            v_bkte,
            attn_mask=bias,
            is_causal=bias is None,
            enable_gqa=True,
        )
        return self.output(out_bhte.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_btd)) * self.up(x_btd))


class Layer(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer, each added to its input."""

    def __init__(self, config: PhiConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor], bias: Bias, cache: Cache | None
    ) -> Tensor:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), rope, bias, cache)
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class Phi(nn.Module):
    """A causal language model; parameters start unset: call `initialize` or load a file.

    `compute_dtype` (default: the parameters' dtype) is what matrices multiply in and activations
    are kept in; norms, softmax and RoPE are fp32 always, so fp32 master weights train in bf16 by
    `model.compute_dtype = torch.bfloat16`, without autocast.

    With LongRoPE the factors depend on the longest sequence of the *run*, never on the current
    one, so that keys in a cache stay valid: `max_length` starts as
    `config.max_position_embeddings` (long factors); `set_max_length(n)` chooses again.
    `transformers` looks at each call's length instead; both agree when `max_length` is that length.
    """

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._compute_dtype: torch.dtype | None = None
        self.kernels: Kernels | None = None  # while `model.fused` trains it: losses use them too
        self.set_max_length(config.max_position_embeddings)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> Phi:
        """Fills every parameter from `generator` and returns the model: norms 1, the rest normal.

        Standard deviation `initializer_range`; matrices that write into the residual stream take it
        divided by sqrt(2 x layers), as in GPT-2, so that its variance does not grow with depth.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            scale = (2 * self.config.num_layers) ** -0.5 if residual else 1.0
            values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
            parameter.copy_(values.normal_(0.0, std * scale, generator=generator))
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products and activations."""
        return self._compute_dtype or self.embedding.weight.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = dtype

    def set_max_length(self, num_tokens: int) -> None:
        """States the longest sequence of the run, which fixes the LongRoPE factors.

        Short factors up to `config.original_length`, long ones above; models without LongRoPE
        compute the same either way.
        """
        if num_tokens < 1:
            raise ValueError(f"max_length is {num_tokens}; it must be at least 1 token")
        self.max_length = num_tokens
        long = num_tokens > self.config.original_length
        self._frequencies = inverse_frequencies(self.config, long=long)

    def forward(
        self,
        token_ids_bt: Tensor,
        *,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        mask_bts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [b, t, v] in `compute_dtype`; the arguments are those of `hidden`."""
        x_btd = self.hidden(
            token_ids_bt,
            positions_bt=positions_bt,
            documents_bt=documents_bt,
            mask_bts=mask_bts,
            cache=cache,
        )
        return self.head(x_btd)

    def hidden(
        self,
        token_ids_bt: Tensor,
        *,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        mask_bts: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What enters the head: x [b, t, d] in `compute_dtype`, after the final norm.

        Without further arguments attention is causal over each row, positions 0 .. t-1.
        `documents_bt` (integers, -1 padding) also restricts it to the same document;
        `positions_bt` sets RoPE positions. `mask_bts` (bool, True = may attend) replaces both rules
        and the sliding window; it is required with `cache`, as is `positions_bt`. Raises ValueError
        when arguments contradict each other or a row is longer than LongRoPE's factors allow.
        """
        self.check(token_ids_bt, positions_bt, documents_bt, mask_bts, cache)
        x_btd = F.embedding(token_ids_bt, self.embedding.weight).to(self.compute_dtype)
        rope = self.rope(token_ids_bt, positions_bt)
        bias = self._bias(token_ids_bt, documents_bt, mask_bts)
        for layer in self.layers:
            x_btd = layer(x_btd, rope, bias, cache)
        return self.norm(x_btd)

    def head(self, x_btd: Tensor) -> Tensor:
        """Logits [..., v] in the dtype of `x_btd`; take losses from them in fp32."""
        if self.lm_head is None:
            return F.linear(x_btd, self.embedding.weight.to(x_btd.dtype))
        return self.lm_head(x_btd)

    def rope(self, token_ids_bt: Tensor, positions_bt: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens' angles, each [b or 1, t, 1, r] in fp32."""
        if self._frequencies.device != token_ids_bt.device:
            self._frequencies = self._frequencies.to(token_ids_bt.device)
        if positions_bt is None:
            positions_bt = torch.arange(token_ids_bt.shape[1], device=token_ids_bt.device)[None]
        return rope_table(self._frequencies, positions_bt, self.config.rope_attention_factor)

    def _bias(
        self, token_ids_bt: Tensor, documents_bt: Tensor | None, mask_bts: Tensor | None
    ) -> Bias:
        if mask_bts is not None:
            return attention_bias(mask_bts, self.compute_dtype)
        length, window = token_ids_bt.shape[1], self.config.sliding_window
        if window is not None and window >= length:
            window = None
        if documents_bt is None and window is None:
            return None
        mask_bts = causal_mask(length, documents_bt, window, device=token_ids_bt.device)
        # Which blocks to skip depends on data: no compiled graph, and a GPU's kernels do not wait.
        packed = documents_bt is not None and token_ids_bt.device.type == "cpu"
        if packed and not torch.compiler.is_compiling():
            return query_blocks(mask_bts)
        return attention_bias(mask_bts, self.compute_dtype)

    def check(
        self,
        token_ids_bt: Tensor,
        positions_bt: Tensor | None,
        documents_bt: Tensor | None,
        mask_bts: Tensor | None,
        cache: Cache | None,
    ) -> None:
        """Raises ValueError where `hidden` would: contradicting arguments, rows too long."""
        if cache is not None and (mask_bts is None or positions_bt is None):
            raise ValueError(
                "Phi: with a cache, pass mask_bts and positions_bt; the model cannot know them"
            )
        if documents_bt is not None and mask_bts is not None:
            raise ValueError("Phi: pass documents_bt or mask_bts, not both; mask_bts replaces it")
        length = token_ids_bt.shape[1]
        if self.config.rope_scaling is not None and length > self.max_length:
            raise ValueError(
                f"Phi: a row of {length} tokens exceeds max_length {self.max_length}, which fixed "
                f"the LongRoPE factors; call model.set_max_length({length}) before the run"
            )


def causal_mask(
    length: int,
    documents_bt: Tensor | None = None,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Who may attend to whom: bool [b, t, t], or [1, t, t] without documents.

    A token sees itself and earlier tokens of its row, at most `window` in all; with `documents_bt`
    [b, t] only those of the same document (padding, -1, sees padding: no row is ever empty).
    """
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if documents_bt is None:
        return mask[None]
    return mask & (documents_bt[:, :, None] == documents_bt[:, None, :])
