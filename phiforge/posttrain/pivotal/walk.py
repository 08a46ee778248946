"""One path under an adaptive search: a coarse bisection, then detours where they settle most.

`Walk(...).coarse(...)` and `.refine(...)` are coroutines that yield requests for rollouts; whoever
drives them adds the rollouts to the ledger. `together(...)` advances several side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from phiforge.posttrain.pivotal.branches import Branches
from phiforge.posttrain.pivotal.estimates import Ledger, Prefix, Request, Rollout
from phiforge.posttrain.pivotal.subdivide import midpoint

Rounds = Generator[list[Request], None, None]


@dataclass(frozen=True)
class Effort:
    """How much certainty is bought. The values of a name were tuned on simulated paths."""

    num_coarse: int  # rollouts on the path at each prefix that the coarse bisection visits
    prior: float  # share of pivotal tokens among those that could be
    low: float  # a candidate less likely pivotal than this is settled
    high: float  # and one more likely than this
    deviation: float  # and one whose effect is known this well
    batch: int = 4  # detours a path and round
    max_rollouts: int = 4000  # detours a path
    confirm: tuple[int, ...] = (12, 12)  # fresh rollouts on each side, in blocks
    futile: float = 0.35  # share of the gap below which the first block ends a confirmation
    keep: float = 0.75  # share of the gap that a confirmed effect must have


EFFORTS = {
    "fast": Effort(num_coarse=8, prior=0.15, low=0.1, high=0.8, deviation=0.06),
    "balanced": Effort(num_coarse=10, prior=0.2, low=0.1, high=0.8, deviation=0.04),
    "thorough": Effort(
        num_coarse=16, prior=0.1, low=0.02, high=0.8, deviation=0.04, confirm=(16, 16)
    ),
}


class Walk:
    """A path under search: its tokens, and what its branches have learnt from the ledger."""

    def __init__(self, rollout: Rollout, index: int | None, gap: float) -> None:
        """`index`: the path's place among the rollouts of the bare prompt, if it is one of them."""
        assert rollout.logprobs is not None, "paths are rollouts drawn with logprobs"
        self.ids = rollout.token_ids
        self.logprobs = rollout.logprobs
        self.branches = Branches(self.logprobs, bool(rollout.success), gap)
        self._own = index
        self._read = 0
        self.num_detours = 0

    def learn(self, ledger: Ledger) -> None:
        """Count all rollouts that were drawn since, whichever path they were drawn for."""
        for request, rollouts in ledger.history[self._read :]:
            place = len(request.prefix)
            if self.ids[:place] != request.prefix or place >= len(self.ids):
                continue
            free_start = not place and request.forbidden is None
            for index, rollout in enumerate(rollouts, request.first_index):
                is_path = free_start and index == self._own  # chosen for its outcome
                if not is_path and rollout.success is not None:
                    self._count(place, request.forbidden, rollout)
        self._read = len(ledger.history)

    def _count(self, place: int, forbidden: int | None, rollout: Rollout) -> None:
        leave = place
        for ours, theirs in zip(self.ids[place:], rollout.token_ids, strict=False):
            if ours != theirs:
                break
            leave += 1
        start = place
        if forbidden is not None:
            if leave > place:  # made for another path, and went ours: free from there on
                start = place + 1
            elif forbidden != self.ids[place]:
                return  # left by a law that avoids another token: not ours
        self.branches.add(start, leave, bool(rollout.success))

    def coarse(self, ledger: Ledger, least: int) -> Rounds:
        """Bisection at log-probability midpoints; every prefix visited gets `least` rollouts."""
        branches = self.branches
        segments = [(0, len(self.ids))] if branches.can_reach(0, len(self.ids)) else []
        while segments:
            ends = sorted({end for segment in segments for end in segment} - {len(self.ids)})
            short = {end: least - branches.visits(end) for end in ends}
            requests = [
                ledger.fresh(self.ids[:end], n, "search") for end, n in short.items() if n > 0
            ]
            if requests:
                yield requests
                self.learn(ledger)
            known = branches.belief()
            halves = []
            for start, stop in segments:
                change = branches.p_at(stop, known) - branches.p_at(start, known)
                if stop - start > 1 and abs(change) >= branches.gap:
                    cut = start + midpoint(self.logprobs[start:stop])
                    halves += [(start, cut), (cut, stop)]
            segments = [segment for segment in halves if branches.can_reach(*segment)]

    def refine(self, ledger: Ledger, effort: Effort, seed: int) -> Rounds:
        """Detours where they settle most, until every candidate is settled or the budget is out."""
        branches = self.branches
        while self.num_detours < effort.max_rollouts:
            probability, _, deviation = branches.probabilities(effort.prior)
            unsettled = (probability > effort.low) & (probability < effort.high)
            open_ = unsettled & (deviation > effort.deviation)
            open_ |= (branches.n[branches.candidates] < 2) & (probability > effort.low)
            if not open_.any():
                return
            given = branches.allocate(open_, probability, effort.batch)
            positions = [
                place
                for group in np.flatnonzero(given).tolist()
                for place in self._places(group, int(given[group]), seed)
            ]
            self.num_detours += len(positions)
            known = branches.n.sum()
            counts = {place: positions.count(place) for place in dict.fromkeys(positions)}
            yield [
                ledger.fresh(self.ids[:place], n, "search", forbidden=self.ids[place])
                for place, n in counts.items()
            ]
            self.learn(ledger)
            if branches.n.sum() == known:
                return  # nothing could be scored, or a record has no more

    def _places(self, group: int, n: int, seed: int) -> list[int]:
        """Where `n` detours of a group leave: by its law, reproducibly."""
        start, stop = int(self.branches.starts[group]), int(self.branches.stops[group])
        if stop - start == 1:
            return [start] * n
        key = f"{seed} {self.num_detours} {group} {self.ids[:stop]}"
        digest = hashlib.sha256(key.encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        law = self.branches.leave_law(group)
        return [start + int(i) for i in generator.choice(len(law), size=n, p=law)]

    def flagged(self, effort: Effort) -> list[int]:
        """Positions of the tokens that are more likely pivotal than not."""
        probability, _, _ = self.branches.probabilities(effort.prior)
        return [
            int(self.branches.starts[c])
            for c, p in zip(self.branches.candidates, probability, strict=True)
            if p >= 0.5
        ]


def together(rounds: Sequence[Rounds]) -> Rounds:
    """Advance coroutines side by side: one round of requests serves them all.

    Where two ask for rollouts of the same kind, the larger request serves both.
    """
    waiting = {}
    for i, coroutine in enumerate(rounds):
        waiting[i] = next(coroutine, None)
    while any(requests is not None for requests in waiting.values()):
        merged: dict[tuple[Prefix, int | None], Request] = {}
        for requests in waiting.values():
            for request in requests or ():
                kind = (request.prefix, request.forbidden)
                if kind not in merged or merged[kind].n < request.n:
                    merged[kind] = request
        yield list(merged.values())
        for i, requests in waiting.items():
            if requests is not None:
                waiting[i] = next(rounds[i], None)
