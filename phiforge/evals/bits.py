"""Bits per byte of a model on texts: how well it predicts them, whatever its tokenizer.

Call `bits_per_byte(model, tokenizer, texts, context=512)`. Writes nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from phiforge.core.stats import cluster_interval
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte with an interval over documents; `forward_tokens` is what it cost."""

    bits_per_byte: float
    low: float
    high: float
    num_documents: int
    num_tokens: int
    num_bytes: int
    forward_tokens: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class _Window:
    """Token ids that enter the model at once; the first `given` targets were scored before."""

    document: int
    token_ids: list[int]
    given: int


def bits_per_byte(
    model: Phi,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int,
    max_tokens: int = 32_768,
    document_tokens: int = 2048,
    micro_tokens: int = 4096,
) -> BitsPerByte:
    """Teacher-forced bits per UTF-8 byte over the starts of `texts`, at most `max_tokens` in all.

    A document gives at most `document_tokens` tokens, read in windows of `context` tokens that
    overlap by half, so that only a document's first tokens are predicted from little. It starts
    after the end-of-document token. The interval clusters by document.
    Raises ValueError when there is no text.
    """
    documents = _token_documents(tokenizer, texts, max_tokens, document_tokens)
    if not documents:
        raise ValueError("bits_per_byte: no held-out text to score; give documents that have text")
    nats = [0.0] * len(documents)
    windows = [w for i, ids in enumerate(documents) for w in _windows(i, ids, context, tokenizer)]
    rows = max(1, micro_tokens // context)
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        for window, loss in zip(batch, _losses(model, batch, tokenizer.pad_id), strict=True):
            nats[window.document] += loss
    num_bytes = [sum(len(tokenizer.token_bytes(i)) for i in ids) for ids in documents]
    forward = sum(len(window.token_ids) for window in windows)
    return _summary(nats, num_bytes, sum(map(len, documents)), forward)


def _token_documents(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, document_tokens: int
) -> list[list[int]]:
    left, documents = max_tokens, []
    for text in texts:
        # No token is shorter than a byte, nor longer than 64 in practice: long files stay cheap.
        ids = tokenizer.encode(text[: 64 * document_tokens])[: min(document_tokens, left)]
        if ids:
            documents.append(ids)
            left -= len(ids)
        if left <= 0:
            break
    return documents


def _windows(
    document: int, token_ids: list[int], context: int, tokenizer: Tokenizer
) -> Iterator[_Window]:
    sequence = [tokenizer.eod_id, *token_ids]
    step = max(1, context // 2)
    yield _Window(document, sequence[: context + 1], 0)
    for start in range(step, len(sequence) - 1, step):
        if start + context - step >= len(sequence) - 1:
            return  # the window before reached the end
        yield _Window(document, sequence[start : start + context + 1], context - step)


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
    interval = cluster_interval(parts)
    return BitsPerByte(
        bits_per_byte=ratio,
        low=max(0.0, interval.low),
        high=interval.high,
        num_documents=len(nats),
        num_tokens=num_tokens,
        num_bytes=total_bytes,
        forward_tokens=forward_tokens,
    )
