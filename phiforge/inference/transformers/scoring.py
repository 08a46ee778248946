"""Log-probabilities of given tokens: their prompts computed once, or row by row.

`score_shared(...)` and `score_alone(...)` fill the `logprobs` of answers whose tokens are given,
and end them. Nothing is written.

Shapes: b rows, q new tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.answer import Answer
from phiforge.inference.engine.choose import damaged
from phiforge.inference.engine.sample import token_logprobs
from phiforge.inference.transformers.network import Network

_LOGITS = 1 << 25  # logits held at a time (fp32: 128 MiB)
_NONE = np.zeros(0, np.int64)


def score_shared(
    network: Network, prefixes: Any, answers: Sequence[Answer], num_rows: int, temperature: float
) -> None:
    """Fills in answers on their prompts' keys and values, `num_rows` at a time."""
    ordered = sorted(answers, key=_prompt, reverse=True)
    for start in range(0, len(ordered), num_rows):
        _score_rows(network, prefixes, ordered[start : start + num_rows], temperature)


def _score_rows(
    network: Network, prefixes: Any, answers: Sequence[Answer], temperature: float
) -> None:
    from phiforge.inference.transformers.cache import RowCache

    groups = [(prompt, list(group)) for prompt, group in groupby(answers, key=_prompt)]
    begun = prefixes.find([prompt for prompt, _ in groups])
    rows = RowCache(network)
    rows.change(
        _NONE,
        [
            ((prefix, len(prompt) - 1), len(group))
            for prefix, (prompt, group) in zip(begun, groups, strict=True)
        ],
    )
    left = [answer for _, group in groups for answer in group]
    fed = {id(answer): [int(answer.prompt_ids[-1]), *answer.tokens[:-1]] for answer in left}
    while left:
        done = len(left[0].logprobs)
        longest = max(len(answer.tokens) for answer in left) - done
        size = max(1, min(longest, _LOGITS // (network.vocab_size * len(left))))
        ids_bq = np.zeros((len(left), size), np.int64)
        for row, answer in enumerate(left):
            new = fed[id(answer)][done : done + size]
            ids_bq[row, : len(new)] = new
        logits_bqv = rows.compute(ids_bq, num_last=size)
        for row, answer in enumerate(left):
            _write(answer, logits_bqv[row], done, temperature)
        going = [row for row, answer in enumerate(left) if not answer.done]
        if going and len(going) < len(left):
            rows.change(np.array(going))
        left = [left[row] for row in going]


def score_alone(network: Network, answers: Sequence[Answer], temperature: float) -> None:
    """Fills in answers by a plain pass over each whole row."""
    for answer in answers:
        ids = [*answer.prompt_ids.tolist(), *answer.tokens[:-1]]
        logits_qv = network.forward(network.row(ids), num_last=len(answer.tokens), use_cache=False)[
            0
        ][0]
        _write(answer, logits_qv, 0, temperature)


def _write(answer: Answer, logits_qv: Tensor, done: int, temperature: float) -> None:
    """Log-probabilities of the answer's tokens from place `done` on; ends it with the last."""
    tokens = answer.tokens[done : done + len(logits_qv)]
    ids_q = torch.tensor(tokens, device=logits_qv.device)
    scaled_qv = logits_qv[: len(tokens)]
    if temperature != 1.0:
        scaled_qv = scaled_qv / temperature
    found = token_logprobs(scaled_qv, ids_q).tolist()
    for place, value in enumerate(found):
        if value != value:
            raise damaged(answer, done + place)
    answer.logprobs += found
    if len(answer.logprobs) == len(answer.tokens):
        assert answer.closed is not None
        answer.finish(answer.closed)


def _prompt(answer: Answer) -> tuple[int, ...]:
    return tuple(answer.prompt_ids.tolist())
