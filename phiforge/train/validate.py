"""Validation on held-out text: loss per token and bits per byte, for each source and in all.

`make_validation(pack, sources, tokenizer, context, max_tokens, exec)` gives the function that the
loop calls, or None when the pack holds nothing back. Nothing is written.

Shapes: b rows, t context length, n tokens, v vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from phiforge.core.config import Exec
from phiforge.data.loader import validation_batches, validation_sources
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer
from phiforge.train.batch import Rows, rows_step
from phiforge.train.losses import IGNORE, bits_per_byte, head_weight, token_losses


def make_validation(
    pack: Path,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    context: int,
    max_tokens: int,
    exec: Exec,
) -> Callable[[Phi], dict[str, float]] | None:
    """A function from a model to validation_loss (nats a token) and bits_per_byte, also by source.

    Looks at up to `max_tokens` of each of `sources` that has held-out documents; the same at every
    call. Tokens that stand for no text (end of document) count for the loss, not for the bytes.
    """
    held_out = [name for name in validation_sources(pack) if name in set(sources)]
    if not held_out or max_tokens == 0:
        return None
    per_batch = max(1, min(max_tokens, exec.micro_tokens) // context) * context
    bytes_v = token_bytes(tokenizer)

    def validate(model: Phi) -> dict[str, float]:
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
        batches = validation_batches(
            pack, context, per_batch, held_out, max_batches=-(-max_tokens // per_batch)
        )
        for source, batch in batches:
            for part in rows_step(batch, exec.micro_tokens).parts:
                counted = _count(model, part, bytes_v)
                for name in (source, ""):
                    sums[name] = [a + b for a, b in zip(sums[name], counted, strict=True)]
        found = {}
        for name in ("", *held_out):
            nats, num_tokens, text_nats, num_bytes = sums[name]
            suffix = f"_{name}" if name else ""
            found[f"validation_loss{suffix}"] = nats / num_tokens
            found[f"bits_per_byte{suffix}"] = bits_per_byte(text_nats, int(num_bytes))
        return found

    return validate


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """UTF-8 bytes of text that each token stands for, [v]; 0 for special tokens."""
    sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    for index, token in tokenizer.backend.get_added_tokens_decoder().items():
        if token.special:
            sizes[index] = 0
    return torch.tensor(sizes)


def _count(model: Phi, rows: Rows, bytes_v: Tensor) -> list[float]:
    """[nats, targets, nats of text tokens, bytes] of some rows."""
    rows = rows.to(model.embedding.weight.device)
    x_btd = model.hidden(
        rows.token_ids_bt, positions_bt=rows.positions_bt, documents_bt=rows.documents_bt
    )
    targets_n = rows.targets_bt.flatten()
    losses_n = token_losses(x_btd.flatten(0, 1), head_weight(model), targets_n, model.kernels)
    losses_n = losses_n.double()
    valid_n = targets_n != IGNORE
    bytes_n = bytes_v.to(targets_n.device)[targets_n.clamp(min=0)] * valid_n
    sums = (losses_n.sum(), valid_n.sum(), losses_n[bytes_n > 0].sum(), bytes_n.sum())
    return [float(value) for value in sums]
