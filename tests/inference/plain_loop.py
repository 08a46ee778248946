"""The plain way to sample: every step recomputes the whole row, alone, from nothing.

`plain_generate(engine, prompt, index, ...)` is what the engine must return, token for token; the
kernels are the engine's own, without its cache, batches, shared prefixes and refilled rows.
"""

import torch

from phiforge.inference.engine.cache import KVCache, round_slots
from phiforge.inference.engine.forward import Fused, round_rows
from phiforge.inference.engine.sample import (
    BLOCK_STEPS,
    draw,
    prompt_digest,
    stream_key,
    token_logprobs,
    uniforms,
)
from phiforge.inference.interface import Sampling
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi

CONFIG = PhiConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=192,
)


class Letters:
    """A tokenizer of one token per byte (id = byte + 2); 0 pads, 1 ends."""

    stop_ids = frozenset({1})

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode()]

    def encode_chat(self, messages, add_generation_prompt=False) -> list[int]:
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return self.encode(text + ("assistant:" if add_generation_prompt else ""))

    def decode(self, ids, skip_special=True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        return bytes([index - 2]) if 2 <= index < 258 else b""


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Phi:
    """A tiny random model with weights large enough that it is sure of some of its tokens."""
    model = Phi(CONFIG.replace(**changes)).initialize(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.to(dtype)


@torch.inference_mode()
def plain_generate(
    model: Phi,
    prompt: tuple[int, ...],
    index: int = 0,
    seed: int = 0,
    stop_ids: frozenset[int] = Letters.stop_ids,
    **settings,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(token ids, log-probabilities) of one sample; stop strings are not looked at."""
    fused = Fused(model, exact=True)
    sampling = Sampling(**settings)
    key = stream_key(prompt_digest(seed, prompt), index)
    row, logprobs = list(prompt), []
    for step in range(min(sampling.max_tokens, fused.context - len(prompt))):
        logits_bv = fused.logits(plain_hidden(fused, row)[-1:])
        u = uniforms(key, step // BLOCK_STEPS)[step % BLOCK_STEPS]
        ids_b, finite_b = draw(logits_bv, sampling, torch.tensor([u], dtype=torch.float64))
        assert finite_b.all()
        row.append(int(ids_b[0]))
        logprobs.append(float(token_logprobs(logits_bv, ids_b)[0]))
        if row[-1] in stop_ids:
            break
    return tuple(row[len(prompt) :]), tuple(logprobs)


def plain_hidden(fused: Fused, row: list[int]) -> torch.Tensor:
    """x [t, d] of a whole row, computed in one piece."""
    ids = torch.tensor([row + [0] * (round_rows(len(row)) - len(row))])
    positions = torch.arange(ids.shape[1])[None]
    slots = round_slots(ids.shape[1])
    cache = KVCache(fused.config, 1, slots, fused.dtype, fused.device)
    return fused.hidden(ids, positions, cache, slots)[0, : len(row)]
