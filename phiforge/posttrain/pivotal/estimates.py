"""p(success | prefix) with its counts, memoised per prefix of token ids, one ledger per question.

`Ledger.missing(prefix, n)` says which rollouts are still to be drawn, `Ledger.add` stores them,
`Ledger.estimate` gives (n, successes); a finished prefix is exact and needs none. A detour is a
rollout whose first token must not be the path's: it leaves the path at once.
"""

import math
from dataclasses import dataclass, field

from phiforge.core.stats import wilson

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled continuation of a prefix.

    `success` is the oracle's word, None when the oracle failed: such a rollout is unscored and
    counts for nothing. `logprobs` (natural, per token) are kept where a path may be made of it.
    """

    token_ids: Prefix
    success: bool | None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Estimate:
    """Successes among n scored rollouts; `exact`: a finished prefix, p is the oracle's 0 or 1."""

    n: int
    successes: int
    exact: bool = False

    @property
    def p(self) -> float:
        """The share of successes. Raises ZeroDivisionError when nothing was scored."""
        return self.successes / self.n

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.n + other.n, self.successes + other.successes)


@dataclass(frozen=True)
class Request:
    """Rollouts to draw: `n` samples of `prefix`, numbered from `first_index`.

    With `forbidden` they are detours: the first token is any but that one, by the sampler's law.
    """

    prefix: Prefix
    first_index: int
    n: int
    purpose: str = "search"
    forbidden: int | None = None


def difference_interval(
    before: Estimate, after: Estimate, confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's interval for p_after - p_before of independent samples.

    Built from both Wilson intervals (Newcombe 1998, Statistics in Medicine 17, method 10); an exact
    estimate adds no width.
    """
    delta = after.p - before.p
    low_before, high_before = _bounds(before, confidence)
    low_after, high_after = _bounds(after, confidence)
    low = delta - math.hypot(after.p - low_after, high_before - before.p)
    high = delta + math.hypot(high_after - after.p, before.p - low_before)
    return low, high


def _bounds(estimate: Estimate, confidence: float) -> tuple[float, float]:
    if estimate.exact:
        return estimate.p, estimate.p
    interval = wilson(estimate.successes, estimate.n, confidence)
    return interval.low, interval.high


PURPOSES = ("filter", "search", "confirm", "pair")


@dataclass
class Ledger:
    """All rollouts of one question, by the path prefix (without the prompt) they continue.

    `rollouts` are free continuations, `detours` those that avoid a first token; `history` has every
    answered request in order, so that several paths can learn from what was drawn for one.
    """

    rollouts: dict[Prefix, list[Rollout]] = field(default_factory=dict)
    detours: dict[tuple[Prefix, int], list[Rollout]] = field(default_factory=dict)
    finished: dict[Prefix, Estimate] = field(default_factory=dict)
    history: list[tuple[Request, list[Rollout]]] = field(default_factory=list)
    num_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PURPOSES, 0))

    def missing(self, prefix: Prefix, n: int, purpose: str = "search") -> Request | None:
        """The rollouts still needed for `n` draws at `prefix`; None when there are enough."""
        have = len(self.rollouts.get(prefix, ()))
        if prefix in self.finished or have >= n:
            return None
        return Request(prefix, have, n - have, purpose)

    def num_drawn(self, prefix: Prefix, forbidden: int | None = None) -> int:
        """How many there are: the next request's first index."""
        if forbidden is None:
            return len(self.rollouts.get(prefix, ()))
        return len(self.detours.get((prefix, forbidden), ()))

    def fresh(self, prefix: Prefix, n: int, purpose: str, forbidden: int | None = None) -> Request:
        """A request for `n` rollouts that nothing has been decided by."""
        return Request(prefix, self.num_drawn(prefix, forbidden), n, purpose, forbidden)

    def add(self, request: Request, rollouts: list[Rollout]) -> None:
        """Store the rollouts of a request, in sample order."""
        if request.forbidden is None:
            drawn = self.rollouts.setdefault(request.prefix, [])
        else:
            drawn = self.detours.setdefault((request.prefix, request.forbidden), [])
        self.history.append((request, rollouts))
        assert len(drawn) == request.first_index, "rollouts must be added in sample order"
        assert len(rollouts) == request.n, "a request is answered as a whole"
        drawn += rollouts
        self.num_tokens[request.purpose] += sum(len(r.token_ids) for r in rollouts)

    def finish(self, path: Prefix, success: bool) -> None:
        """Note that nothing can follow `path`: its p is the oracle's verdict, free of rollouts."""
        self.finished[path] = Estimate(1, int(success), exact=True)

    def estimate(self, prefix: Prefix) -> Estimate | None:
        """The counts at `prefix`; None when nothing was drawn or nothing could be scored."""
        if prefix in self.finished:
            return self.finished[prefix]
        scored = [r.success for r in self.rollouts.get(prefix, ()) if r.success is not None]
        return Estimate(len(scored), sum(scored)) if scored else None

    def p(self, prefix: Prefix) -> float | None:
        """p(success | prefix) as estimated, None when unknown."""
        estimate = self.estimate(prefix)
        return estimate.p if estimate else None

    def first_tokens(self, prefix: Prefix) -> dict[int, Estimate]:
        """The rollouts drawn at `prefix`, grouped by their first token (the report's footnote 7).

        A group is pooled with the rollouts drawn at prefix + token where there are any: both are
        samples of the same thing.
        """
        groups: dict[int, Estimate] = {}
        for rollout in self.rollouts.get(prefix, ()):
            if rollout.success is None or not rollout.token_ids:
                continue
            first = rollout.token_ids[0]
            groups[first] = groups.get(first, Estimate(0, 0)) + Estimate(1, int(rollout.success))
        for token in groups:
            longer = self.estimate((*prefix, token))
            if longer is not None and not longer.exact:
                groups[token] += longer
        return groups

    @property
    def prefixes(self) -> list[Prefix]:
        """The prefixes with rollouts, short ones first: the same order however they were drawn."""
        return sorted(self.rollouts, key=lambda prefix: (len(prefix), prefix))

    @property
    def num_unscored(self) -> int:
        """Rollouts whose oracle failed."""
        return sum(r.success is None for _, drawn in self.history for r in drawn)
