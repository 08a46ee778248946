"""The plain way to sample: every step recomputes the whole row, alone, from nothing.

`plain_generate(engine, prompt, index, ...)` is what the engine must return, token for token; the
kernels are the engine's own, without its batches, shared prefixes, chunks and put-off rows.
"""

import functools
import math

import numpy as np
import pytest
import torch

from phiforge.core.native.build import unavailable
from phiforge.inference.engine import Engine
from phiforge.inference.engine.runner import BLOCK, Pass, Runner, make_runner
from phiforge.inference.engine.sample import (
    BLOCK_STEPS,
    Laws,
    draw,
    prompt_digest,
    stream_key,
    token_logprobs,
    uniforms,
)
from phiforge.inference.engine.weights import from_model
from phiforge.inference.interface import Sampling
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi

NO_NATIVE = unavailable("decoder")
KERNELS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))),
]
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


@functools.lru_cache(maxsize=4)
def plain_runner(model: Phi, kernels: str, weights: str | None) -> Runner:
    """A runner of its own, with a cache for one row."""
    return make_runner(from_model(model, weights), "exact", kernels)


@torch.inference_mode()
def plain_generate(
    engine: Engine,
    prompt: tuple[int, ...],
    index: int = 0,
    seed: int = 0,
    forced: tuple[int, ...] = (),
    mask=lambda drawn: None,
    **settings,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(token ids, log-probabilities) of one sample; stop strings are not looked at."""
    runner = plain_runner(engine.model, engine.kernels, engine.weights)
    sampling = Sampling(**settings)
    key = stream_key(prompt_digest(seed, prompt), index)
    row, logprobs = list(prompt), []
    for step in range(min(sampling.max_tokens, runner.context - len(prompt))):
        logits_bv = runner.logits(plain_hidden(runner, row)[-1:])
        if step < len(forced):
            ids_b = torch.tensor([forced[step]])
        else:
            allowed = mask(tuple(row[len(prompt) :]))
            masked = logits_bv.clone()
            if allowed is not None:
                masked[0, torch.from_numpy(~allowed)] = -math.inf
            u = uniforms(key, step // BLOCK_STEPS)[step % BLOCK_STEPS : step % BLOCK_STEPS + 1]
            ids_b, finite_b = getattr(runner, "draw", draw)(masked, Laws.of(sampling, 1), u)
            assert finite_b.all()
        row.append(int(ids_b[0]))
        logprobs.append(float(token_logprobs(logits_bv, ids_b)[0]))
        if row[-1] in engine.tokenizer.stop_ids:
            break
    return tuple(row[len(prompt) :]), tuple(logprobs)


def plain_hidden(runner: Runner, row: list[int]) -> torch.Tensor:
    """x [t, d] of a whole row, computed in one pass over an empty cache."""
    num_blocks = -(-len(row) // BLOCK)
    runner.allocate(num_blocks + 1)
    return runner.forward(
        Pass(
            np.array(row, np.int32),
            np.arange(len(row), dtype=np.int32),
            np.array([0, len(row)], np.int32),
            np.arange(1, num_blocks + 1, dtype=np.int32)[None],
        )
    )
