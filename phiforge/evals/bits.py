"""Bits per byte of a model on held-out text: how well it predicts it, whatever its tokenizer.

Call `bits_per_byte(model, tokenizer, documents, context=512)` with documents as token ids, for
example from `held_out(pack_folder, ...)`. Writes nothing.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from phiforge.core.stats import cluster_interval
from phiforge.data.loader import validation_sources
from phiforge.data.shards import open_shard
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte with an interval over documents; `forward_tokens` is what it cost."""

    bits_per_byte: float
    low: float | None
    high: float | None
    num_documents: int
    num_tokens: int
    num_bytes: int
    forward_tokens: int

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class _Window:
    """Token ids that enter the model at once; the first `given` targets were scored before."""

    document: int
    token_ids: list[int]
    given: int


def held_out(
    pack_folder: Path, *, max_tokens: int, document_tokens: int, seed: int
) -> dict[str, list[list[int]]]:
    """Held-out documents of each packed source: `max_tokens` tokens, in an order drawn by seed.

    A document gives its first `document_tokens` tokens, without its end-of-document token.
    """
    found: dict[str, list[list[int]]] = {}
    for source in validation_sources(pack_folder):
        shard = open_shard(pack_folder / source / "validation")
        if shard.meta["kind"] != "documents":
            continue
        order = list(range(len(shard.offsets) - 1))
        random.Random(f"{seed}/{source}").shuffle(order)
        left = max_tokens
        for index in order:
            start, end = int(shard.offsets[index]), int(shard.offsets[index + 1])
            taken = shard.tokens[start : min(end - 1, start + min(document_tokens, left))]
            if len(taken):
                found.setdefault(source, []).append(taken.tolist())
                left -= len(taken)
            if left <= 0:
                break
    return found


def bits_per_byte(
    model: Phi,
    tokenizer: Tokenizer,
    documents: Sequence[Sequence[int]],
    *,
    context: int,
    micro_tokens: int = 4096,
) -> BitsPerByte:
    """Teacher-forced bits per UTF-8 byte of documents given as token ids.

    Every token but a document's first is predicted, as in training, where documents start without
    a mark; documents are read in windows of `context` tokens that overlap by half. The interval
    clusters by document; one document has none. Raises ValueError when there is no text.
    """
    documents = [list(ids) for ids in documents if len(ids) > 1]
    if not documents:
        raise ValueError("bits_per_byte: no held-out text to score; give documents that have text")
    nats = [0.0] * len(documents)
    windows = [w for i, ids in enumerate(documents) for w in _windows(i, ids, context)]
    rows = max(1, micro_tokens // context)
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        for window, loss in zip(batch, _losses(model, batch, tokenizer.pad_id), strict=True):
            nats[window.document] += loss
    num_bytes = [sum(len(tokenizer.token_bytes(i)) for i in ids[1:]) for ids in documents]
    num_tokens = sum(len(ids) - 1 for ids in documents)
    forward = sum(len(window.token_ids) - 1 for window in windows)
    return _summary(nats, num_bytes, num_tokens, forward)


def _windows(document: int, token_ids: list[int], context: int) -> Iterator[_Window]:
    last = len(token_ids) - 1
    start = scored = 0  # tokens 1..scored have their loss
    while scored < last:
        end = min(start + context, last)
        yield _Window(document, token_ids[start : end + 1], scored - start)
        scored = end
        start += max(1, context // 2)


@torch.inference_mode()
def _losses(model: Phi, windows: list[_Window], pad_id: int) -> list[float]:
    """Summed negative log-likelihood (nats) of the new targets of each window."""
    device = next(model.parameters()).device
    length = max(len(window.token_ids) for window in windows)
    token_ids_bt = torch.full((len(windows), length), pad_id, dtype=torch.int64)
    targets_bt = torch.full((len(windows), length), -100, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids = torch.tensor(window.token_ids)
        token_ids_bt[row, : len(ids)] = ids
        targets_bt[row, window.given : len(ids) - 1] = ids[window.given + 1 :]
    # Padding stands at the end, where causal attention keeps it from what is scored.
    logits_btv = model(token_ids_bt[:, :-1].to(device)).float()
    losses_bt = F.cross_entropy(
        logits_btv.transpose(1, 2), targets_bt[:, :-1].to(device), reduction="none"
    )
    return losses_bt.double().sum(dim=1).tolist()


def _summary(
    nats: list[float], num_bytes: list[int], num_tokens: int, forward_tokens: int
) -> BitsPerByte:
    total_bytes = sum(num_bytes)
    ratio = sum(nats) / math.log(2) / total_bytes
    # The interval of a ratio of sums: each document's linearised contribution to it.
    mean_bytes = total_bytes / len(nats)
    parts = [
        ratio + (loss / math.log(2) - ratio * size) / mean_bytes
        for loss, size in zip(nats, num_bytes, strict=True)
    ]
    interval = cluster_interval(parts) if len(parts) > 1 else None
    return BitsPerByte(
        bits_per_byte=ratio,
        low=max(0.0, interval.low) if interval else None,
        high=interval.high if interval else None,
        num_documents=len(nats),
        num_tokens=num_tokens,
        num_bytes=total_bytes,
        forward_tokens=forward_tokens,
    )
