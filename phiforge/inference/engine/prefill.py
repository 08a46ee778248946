"""Runs prompts through the model, each shared prefix once, and keeps their keys and values.

`PromptPool(fused, plan, budget_slots)` computes segments as they are asked for;
`compute(...)` is one batch of them. Nothing is written.

Shapes: b rows, t tokens, d model dim.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phiforge.inference.engine.cache import KVCache, round_slots
from phiforge.inference.engine.forward import ROW_BLOCK, Fused, attended_slots, round_rows
from phiforge.inference.engine.prefix import Plan, Segment

_FORWARD_TOKENS = 4096  # tokens of one forward pass, padding included
_CHUNK_TOKENS = 512  # of one row at a time, so that long prompts need little memory
_SCORES = 1 << 25  # attention scores held at a time (fp32: 128 MiB)

# (segment, position of the first token, x of its tokens [t, d]); pieces of a segment in order
OnHidden = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Stored:
    """Where the keys and values of a row's tokens lie."""

    cache: KVCache
    row: int


class PromptPool:
    """The prompts of a plan, computed group by group in order, each kept until it is released.

    A group takes about `budget_slots` cache slots. Prefixes that later groups build on are kept
    besides, one row each.
    """

    def __init__(
        self,
        fused: Fused,
        plan: Plan,
        budget_slots: int,
        on_hidden: OnHidden = lambda segment, first, x_td: None,
    ) -> None:
        self._fused, self._plan, self._on_hidden = fused, plan, on_hidden
        self._groups = groups(plan, budget_slots)
        self._stored: dict[int, Stored] = {}
        self._parents: dict[int, Stored] = {}
        self._x_d: dict[int, Tensor] = {}
        self._prompts_left = Counter(plan.ends)
        self._children_left = Counter(segment.parent for segment in plan.segments)
        self._ending: dict[int, list[int]] = defaultdict(list)
        for prompt, segment in enumerate(plan.ends):
            self._ending[segment].append(prompt)
        self.num_computed_tokens = 0

    def take(self, prompt: int) -> tuple[Stored, Tensor]:
        """Where a prompt's keys and values lie, and x [d] of its last token."""
        while prompt not in self._x_d:
            self._advance(next(self._groups))
        return self._stored[self._plan.ends[prompt]], self._x_d[prompt]

    def release(self, prompt: int) -> None:
        """Says that a prompt is needed no more."""
        del self._x_d[prompt]
        segment = self._plan.ends[prompt]
        self._prompts_left[segment] -= 1
        if not self._prompts_left[segment]:
            del self._stored[segment]

    def _advance(self, group: list[int]) -> None:
        segments = self._plan.segments
        self.num_computed_tokens += sum(segments[i].num_new for i in group)
        stored = compute(self._fused, segments, group, self._parents, self._keep_ends)
        for index in group:
            if self._prompts_left[index]:
                self._stored[index] = stored[index]
            self._finish_child(segments[index].parent)
        for index in group:
            if self._children_left[index]:
                cache = stored[index].cache.one_row(stored[index].row, segments[index].end)
                self._parents[index] = Stored(cache, 0)

    def _finish_child(self, parent: int) -> None:
        self._children_left[parent] -= 1
        if not self._children_left[parent]:
            self._parents.pop(parent, None)

    def _keep_ends(self, segment: int, first: int, x_td: Tensor) -> None:
        self._on_hidden(segment, first, x_td)
        for prompt in self._ending[segment]:
            place = len(self._plan.prompts[prompt]) - 1 - first
            if 0 <= place < x_td.shape[0]:
                self._x_d[prompt] = x_td[place].clone()


def groups(plan: Plan, budget_slots: int) -> Iterator[list[int]]:
    """Consecutive segments whose rows take at most `budget_slots` together, at least one."""
    group: list[int] = []
    slots = 0
    for index, segment in enumerate(plan.segments):
        needed = round_slots(segment.end + ROW_BLOCK)
        if group and slots + needed > budget_slots:
            yield group
            group, slots = [], 0
        group.append(index)
        slots += needed
    if group:
        yield group


def compute(
    fused: Fused,
    segments: list[Segment],
    group: list[int],
    parents: dict[int, Stored],
    on_hidden: OnHidden,
) -> dict[int, Stored]:
    """Computes a group of segments, those that build on others of the group after them."""
    stored = dict(parents)
    waiting = list(group)
    while waiting:
        ready = [i for i in waiting if segments[i].parent < 0 or segments[i].parent in stored]
        assert ready, "a segment's parent is neither in the group nor kept"
        waiting = [i for i in waiting if i not in set(ready)] if len(ready) < len(waiting) else []
        for batch in _batches(fused, segments, ready):
            stored |= _run(fused, segments, batch, stored, on_hidden)
    return stored


def _batches(fused: Fused, segments: list[Segment], ready: list[int]) -> Iterator[list[int]]:
    """Segments of similar length together, within the limits of one forward pass."""
    batch: list[int] = []
    longest, end = 0, 0
    for index in sorted(ready, key=lambda i: -segments[i].num_new):
        longest = longest or round_rows(segments[index].num_new)
        end = max(end, segments[index].end)
        rows = len(batch) + 1
        scores = rows * fused.config.num_heads * ROW_BLOCK * round_slots(end + longest)
        too_large = rows * min(longest, _CHUNK_TOKENS) > _FORWARD_TOKENS or scores > _SCORES
        too_short = 2 * round_rows(segments[index].num_new) < longest
        if batch and (too_large or too_short):
            yield batch
            batch = []
            longest, end = round_rows(segments[index].num_new), segments[index].end
        batch.append(index)
    if batch:
        yield batch


def _run(
    fused: Fused,
    segments: list[Segment],
    batch: list[int],
    stored: dict[int, Stored],
    on_hidden: OnHidden,
) -> dict[int, Stored]:
    """One batch, in chunks along the tokens; short rows are padded on the right."""
    rows = [segments[i] for i in batch]
    num_columns = round_rows(max(row.num_new for row in rows))
    starts_b = torch.tensor([row.start for row in rows], device=fused.device)
    slots = max(row.start for row in rows) + num_columns
    cache = KVCache(fused.config, len(rows), slots, fused.dtype, fused.device)
    _copy_parents(cache, rows, stored)
    ids_bt = torch.zeros(len(rows), num_columns, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids_bt[place, : row.num_new] = torch.tensor(row.token_ids[row.start :])
    ids_bt = ids_bt.to(fused.device)
    per_token = len(rows) * fused.config.num_heads * cache.slots
    chunk = min(_CHUNK_TOKENS, max(1, _SCORES // per_token // ROW_BLOCK) * ROW_BLOCK)
    for first in range(0, num_columns, chunk):
        ids = ids_bt[:, first : first + chunk]
        offsets_t = torch.arange(first, first + ids.shape[1], device=fused.device)
        positions_bt = starts_b[:, None] + offsets_t
        s = attended_slots(int(positions_bt.max()))
        x_btd = fused.hidden(ids, positions_bt, cache, s)
        for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
            num_real = min(ids.shape[1], row.num_new - first)
            if num_real > 0:
                on_hidden(index, row.start + first, x_btd[place, :num_real])
    return {index: Stored(cache, place) for place, index in enumerate(batch)}


def _copy_parents(cache: KVCache, rows: list[Segment], stored: dict[int, Stored]) -> None:
    of_parent: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row.parent >= 0:
            of_parent[row.parent].append(place)
    for parent, places in of_parent.items():
        source = stored[parent]
        index = torch.tensor(places, device=cache.keys.device)
        rows_of_source = torch.full_like(index, source.row)
        cache.copy_rows(index, source.cache, rows_of_source, rows[places[0]].start)
