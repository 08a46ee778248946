"""The sampling loop on a batch: rows join, draw, end, leave.

`draw_all(batch, answers, ...)` fills and ends the answers of one `generate` call, which have one
`Sampling`; random numbers, filters and log-probabilities are the engine's. Nothing is written.

Shapes: b rows, p prompts, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.answer import Answer, text_bytes
from phiforge.inference.engine.choose import damaged
from phiforge.inference.engine.constrain import check_mask
from phiforge.inference.engine.sample import BLOCK_STEPS, Laws, draw, token_logprobs, uniforms
from phiforge.inference.interface import PromptTokenizer, Sampling
from phiforge.inference.transformers.batch import Batch, TokenIds


class Row:
    """An answer under way: its random numbers and, for stop strings, the end of its text."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.tail = answer, b""
        self.prompt: TokenIds = tuple(answer.prompt_ids.tolist())

    def uniform(self) -> float:
        """The random number of the next draw."""
        step = len(self.answer.tokens)
        if step % BLOCK_STEPS == 0:
            self._uniforms = uniforms(self.answer.key, step // BLOCK_STEPS)
        return float(self._uniforms[step % BLOCK_STEPS])


def draw_all(
    batch: Batch,
    answers: Sequence[Answer],
    sampling: Sampling,
    num_rows: int,
    tokenizer: PromptTokenizer,
    collect: Callable[[], object],
) -> None:
    """Draws every answer to its end, `num_rows` at a time; `collect` is called as some have ended.

    Answers come with those of one prompt together, and prompts before their beginnings. Raises
    NonFiniteLogits for a damaged model, ValueError for a mask that leaves no token.
    """
    pen = Pen(sampling, tokenizer)
    waiting = [Row(answer) for answer in answers]
    rows: list[Row] = []
    while waiting or rows:
        free = num_rows - len(rows)
        # Joining copies the rows' caches: not for each one that leaves, unless nobody is left.
        if waiting and (not rows or (batch.mixes and free >= max(1, num_rows // 8))):
            joining, waiting = _next(waiting, free if batch.mixes else num_rows, batch.mixes)
            rows += _join(batch, joining, pen)
            collect()
            continue
        logits_bv = batch.step([row.answer.tokens[-1] for row in rows])
        pen.write(rows, logits_bv, logits_bv)
        going = [place for place, row in enumerate(rows) if not row.answer.done]
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            batch.keep(going)
            collect()


def _next(waiting: list[Row], most: int, mixes: bool) -> tuple[list[Row], list[Row]]:
    """The rows that join next, and those that stay: `most` at once, of one prompt unless mixed."""
    joining = waiting[:most]
    if not mixes:
        joining = [row for row in joining if row.prompt == joining[0].prompt]
    return joining, waiting[len(joining) :]


def _join(batch: Batch, joining: Sequence[Row], pen: Pen) -> list[Row]:
    """Draws the first token of some rows; those that go on join the batch."""
    groups = [list(group) for _, group in groupby(joining, key=lambda row: row.prompt)]
    logits_pv = batch.begin([group[0].prompt for group in groups])
    of_b = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    logits_bv = logits_pv[torch.from_numpy(of_b).to(logits_pv.device)]
    pen.write(joining, logits_bv, _masked(joining, logits_bv))
    going = [[row for row in group if not row.answer.done] for group in groups]
    going = [group for group in going if group]
    if going:
        batch.join([group[0].prompt for group in going], [len(group) for group in going])
    return [row for group in going for row in group]


def _masked(rows: Sequence[Row], logits_bv: Tensor) -> Tensor:
    """The logits of first tokens without those that are forbidden."""
    masked_bv = logits_bv
    for place, row in enumerate(rows):
        if row.answer.mask is None:
            continue
        allowed = check_mask(row.answer.mask(()), logits_bv.shape[-1], row.answer.name)
        if allowed is not None:
            masked_bv = logits_bv.clone() if masked_bv is logits_bv else masked_bv
            forbidden = torch.from_numpy(~allowed).to(logits_bv.device)
            masked_bv[place].masked_fill_(forbidden, -torch.inf)
    return masked_bv


class Pen:
    """Draws tokens into answers and ends them."""

    def __init__(self, sampling: Sampling, tokenizer: PromptTokenizer) -> None:
        self._sampling, self._tokenizer = sampling, tokenizer
        self._stops = tuple(text.encode() for text in sampling.stop)
        self._tail = max(map(len, self._stops), default=1) - 1

    def write(self, rows: Sequence[Row], logits_bv: Tensor, masked_bv: Tensor) -> None:
        """One token for each row: drawn from `masked_bv`, its log-probability of `logits_bv`."""
        laws = Laws.of(self._sampling, len(rows))
        ids_b, finite_b = draw(masked_bv, laws, np.array([row.uniform() for row in rows]))
        ids, finite = ids_b.tolist(), finite_b.tolist()
        logprobs = token_logprobs(logits_bv, ids_b).tolist() if self._sampling.logprobs else None
        for place, row in enumerate(rows):
            answer = row.answer
            if not finite[place]:
                raise damaged(answer, len(answer.tokens))
            answer.tokens.append(ids[place])
            if logprobs is not None:
                answer.logprobs.append(logprobs[place])
            self._end(row, ids[place])

    def _end(self, row: Row, token: int) -> None:
        answer = row.answer
        if token in self._tokenizer.stop_ids or (self._stops and self._meets_stop(row, token)):
            answer.finish("stop")
        elif len(answer.tokens) >= answer.limit:
            answer.finish("length")

    def _meets_stop(self, row: Row, token: int) -> bool:
        """Whether the text now holds a stop string; a match always ends in the newest token."""
        data = row.tail + text_bytes(self._tokenizer, token)
        row.tail = data[max(0, len(data) - self._tail) :]
        return any(stop in data for stop in self._stops)
