"""A model of `transformers` behind one call: token ids and a cache in, fp32 logits out.

`Network(model)` finds out what the model's forward takes, its vocabulary, context and device;
`network.why_not_shared()` says whether rows may share and outlive each other's caches. Nothing is
written.

Shapes: b rows, q new tokens, k cached and new tokens, v vocabulary.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Layers whose cache is one key and value per token, whatever is masked: what rows can share.
_PER_TOKEN = {"full_attention", "sliding_attention"}
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# RoPE whose angles depend on the longest row of a batch, once it passes the original length.
_BATCH_DEPENDENT_ROPE = {"longrope", "su", "dynamic"}
_NO_LIMIT = 1 << 20  # tokens, for positions without an end (ALiBi, recurrence)
_LONGEST_PROBE = 256


class Network:
    """`model` in use; its weights are neither copied nor changed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"model is a {type(model).__name__}, an encoder-decoder; give a causal language "
                "model (AutoModelForCausalLM)"
            )
        self._takes = set(inspect.signature(model.forward).parameters)
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        self.vocab_size = int(self.config.vocab_size if weight is None else weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def name(self) -> str:
        """What computes, e.g. "Phi3ForCausalLM float32 cpu"."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{type(self.model).__name__} {dtype} {self.device.type}"

    @cached_property
    def context(self) -> int:
        """The longest row, prompt and answer, in tokens."""
        lengths = [getattr(self.config, name, None) for name in _LENGTH_NAMES]
        length = next((value for value in lengths if isinstance(value, int)), _NO_LIMIT)
        return min(length, self.stable_context or length)

    @cached_property
    def stable_context(self) -> int | None:
        """Where a model with batch-dependent RoPE must end, or its rows would change each other."""
        rope = getattr(self.config, "rope_parameters", None)
        rope = rope or getattr(self.config, "rope_scaling", None) or {}
        kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
        if not any(
            kind.get("rope_type", kind.get("type")) in _BATCH_DEPENDENT_ROPE for kind in kinds
        ):
            return None
        name = "original_max_position_embeddings"
        found = [getattr(self.config, name, None), *(kind.get(name) for kind in kinds)]
        return next((value for value in found if isinstance(value, int)), None)

    def stamp(self) -> tuple[object, ...]:
        """Changes whenever a weight is written in place, replaced or moved."""
        return tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()
        )

    def forward(
        self,
        ids_bq: Tensor,
        cache: Any = None,
        positions_bq: Tensor | None = None,
        mask_bk: Tensor | None = None,
        num_last: int = 1,
        use_cache: bool = True,
    ) -> tuple[Tensor, Any]:
        """Logits [b, num_last, v] in fp32 of the last `num_last` tokens, and the cache that holds
        all of them (None: the model gives none)."""
        asked = {
            "past_key_values": cache,
            "cache_params": cache,  # of models whose state is no keys and values
            "position_ids": positions_bq,
            "attention_mask": mask_bk,
            "logits_to_keep": num_last,
        }
        given = {k: v for k, v in asked.items() if v is not None and k in self._takes}
        out = self.model(input_ids=ids_bq, use_cache=use_cache, **given)
        kept = getattr(out, "past_key_values", None)
        kept = getattr(out, "cache_params", None) if kept is None else kept
        return out.logits[:, -num_last:].float(), kept

    def row(self, ids: Any) -> Tensor:
        """Token ids as a batch of one."""
        return torch.tensor([list(ids)], device=self.device)

    @cached_property
    def probe(self) -> list[int]:
        """Some token ids, as many as a short sliding window needs to be passed."""
        window = getattr(self.config, "sliding_window", None) or 0
        length = min(max(8, window + 4) if window <= _LONGEST_PROBE else 8, self.context)
        return [(7 * place + 3) % self.vocab_size for place in range(length)]

    def differs(self, found_v: Tensor, expected_v: Tensor) -> bool:
        """Whether two logits of one token differ by more than rounding does."""
        exact = self.model.dtype in (torch.float32, torch.float64)
        spread = (expected_v.amax() - expected_v.amin()).clamp_min(1e-6)
        return bool(((found_v - expected_v).abs().amax() / spread) > (1e-3 if exact else 0.1))

    def why_not_shared(self) -> str | None:
        """Why rows cannot share a prompt's cache; None where they can, which is tried out."""
        kinds = set(getattr(self.config, "layer_types", None) or ()) - _PER_TOKEN
        if kinds:
            return f"its layers are of type {', '.join(sorted(kinds))}"
        if "past_key_values" not in self._takes:
            return "its forward takes no past_key_values"
        from phiforge.inference.transformers.cache import tried_out

        return tried_out(self)
