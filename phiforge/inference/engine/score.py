"""Log-probabilities of given tokens: one pass over prompts and completions, shared parts once.

`score(fused, prompts, completions)` on checked token ids. Nothing is written.

Shapes: n rows, d model dim, v vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from phiforge.inference.engine.forward import Fused
from phiforge.inference.engine.prefill import PromptPool
from phiforge.inference.engine.prefix import Plan, TokenIds, plan
from phiforge.inference.engine.sample import NonFiniteLogits, token_logprobs

_LOGITS = 1 << 25  # logits held at a time (fp32: 128 MiB)


class _Scorer:
    """Collects x where a token is to be scored, and scores them many at a time."""

    def __init__(self, fused: Fused, wanted: dict[int, list[tuple[int, int, TokenIds]]]) -> None:
        self._fused, self._wanted = fused, wanted
        self._rows_limit = max(16, _LOGITS // fused.config.vocab_size)
        self._pending: list[tuple[int, int, Tensor, TokenIds]] = []
        self._num_pending = 0
        self.found: dict[int, dict[int, list[float]]] = defaultdict(dict)

    def on_hidden(self, segment: int, first: int, x_td: Tensor) -> None:
        """Takes from a piece of a segment the places some sequence wants."""
        for sequence, start, targets in self._wanted.get(segment, ()):
            low = max(start, first)
            high = min(start + len(targets), first + x_td.shape[0])
            if low < high:
                x = x_td[low - first : high - first].clone()
                self._pending.append((sequence, low, x, targets[low - start : high - start]))
                self._num_pending += high - low
        if self._num_pending >= self._rows_limit:
            self.flush()

    def flush(self) -> None:
        """Scores what was collected."""
        if not self._pending:
            return
        x_nd = torch.cat([x for _, _, x, _ in self._pending])
        targets = [target for *_, ids in self._pending for target in ids]
        ids_n = torch.tensor(targets, device=self._fused.device)
        scores: list[float] = []
        for start in range(0, len(targets), self._rows_limit):
            part = slice(start, start + self._rows_limit)
            scores += token_logprobs(self._fused.logits(x_nd[part]), ids_n[part]).tolist()
        place = 0
        for sequence, low, _, ids in self._pending:
            self.found[sequence][low] = scores[place : place + len(ids)]
            place += len(ids)
        self._pending, self._num_pending = [], 0


def score(
    fused: Fused,
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    budget_slots: int,
) -> tuple[list[list[float]], int]:
    """(per sequence the log-probability of each completion token, tokens computed).

    Raises NonFiniteLogits, naming the sequence.
    """
    rows = [(p + c)[:-1] for p, c in zip(prompts, completions, strict=True)]
    scored = [i for i, completion in enumerate(completions) if completion]
    if not scored:
        return [[] for _ in prompts], 0
    planned = plan(list({rows[i] for i in scored}))
    number = {row: i for i, row in enumerate(planned.prompts)}
    wanted: dict[int, list[tuple[int, int, TokenIds]]] = defaultdict(list)
    for i in scored:
        for segment, start, targets in _wants(planned, number[rows[i]], prompts[i], completions[i]):
            wanted[segment].append((i, start, targets))
    scorer = _Scorer(fused, wanted)
    pool = PromptPool(fused, planned, budget_slots, scorer.on_hidden)
    for prompt in range(len(planned.prompts)):
        pool.take(prompt)
        pool.release(prompt)
    scorer.flush()
    results = [_join(scorer.found[i]) if completions[i] else [] for i in range(len(prompts))]
    for i, values in enumerate(results):
        if any(value != value for value in values):
            raise NonFiniteLogits(
                f"completion {i}: the model's logits are NaN or infinite; its weights are damaged, "
                "or its training diverged"
            )
    return results, pool.num_computed_tokens


def _wants(
    planned: Plan, number: int, prompt: TokenIds, completion: TokenIds
) -> list[tuple[int, int, TokenIds]]:
    """(segment, first position, tokens to score there) along a sequence's segments."""
    first = len(prompt) - 1
    pieces = []
    for index in planned.chain(planned.ends[number]):
        segment = planned.segments[index]
        low, high = max(first, segment.start), min(first + len(completion), segment.end)
        if low < high:
            pieces.append((index, low, completion[low - first : high - first]))
    return pieces


def _join(pieces: dict[int, list[float]]) -> list[float]:
    return [value for start in sorted(pieces) for value in pieces[start]]
