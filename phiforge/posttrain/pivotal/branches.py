"""What is known of one path: where rollouts left it and how those ended, and so p all along it.

`Branches(logprobs, success, gap)`, then `add(start, leave, success)` for every rollout;
`p_along()`, `probabilities(...)` and `allocate(...)` guide the search. Nothing is drawn here.

With pi_i the sampler's probability of path token i, q_i the success of leaving the path there, and
y the path's own outcome, p_i = pi_i p_(i+1) + (1 - pi_i) q_i: p is linear in the q and y, so every
rollout tells of every prefix before it, and a token moves p by (1 - pi_i)(p_(i+1) - q_i), never by
more than 1 - pi_i. Tokens that could reach the gap are groups of their own; runs of others are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ERFC = np.vectorize(math.erfc, otypes=[float])
_LGAMMA = np.vectorize(math.lgamma, otypes=[float])

SHRINK = 2.0  # pseudo-rollouts that say "leaving the path here changes nothing"
_LEAST_VARIANCE = 0.02
_LEAST_SPREAD = 0.05  # how much a harmless fork may still differ from what follows it
_MOST_EQUIVALENT = 60.0  # rollouts that the knowledge of p after a token may count for


@dataclass(frozen=True)
class Belief:
    """What the rollouts say of each group; arrays [g], in path order."""

    off: np.ndarray  # success of leaving the path in the group
    after: np.ndarray  # p after the group
    variance: np.ndarray  # of `off`
    root: float  # p before the first token


class Branches:
    """One path's groups and their counts."""

    def __init__(self, logprobs: Sequence[float], success: bool, gap: float) -> None:
        self.length = len(logprobs)
        self.success = float(success)
        self.gap = gap
        self.pi = np.exp(np.minimum(np.asarray(logprobs, dtype=float), 0.0))
        self.cumulative = np.concatenate([[0.0], np.cumsum(np.minimum(logprobs, 0.0))])
        self.starts, self.stops = _groups(self.pi <= 1 - gap + 1e-9)
        self.stay = np.exp(self.cumulative[self.stops] - self.cumulative[self.starts])
        self.leave = 1 - self.stay
        single = (self.stops - self.starts == 1) & (self.pi[self.starts] <= 1 - gap + 1e-9)
        self.candidates = np.flatnonzero(single)
        self.n = np.zeros(len(self.starts))
        self.k = np.zeros(len(self.starts))
        self.cost = np.maximum(self._expected_rest(), 1.0)
        self._weights = self._after_weights()
        own = np.eye(len(self.starts))[self.candidates]
        self._slopes = self.leave[self.candidates, None] * (self._weights[self.candidates] - own)
        self._group_of = np.repeat(np.arange(len(self.starts)), self.stops - self.starts)
        self._visits = np.zeros(self.length + 1, dtype=int)

    def leave_law(self, group: int) -> np.ndarray:
        """Where a rollout that leaves in the group does so: probabilities of its positions."""
        inside = slice(self.starts[group], self.stops[group])
        before = np.exp(self.cumulative[inside] - self.cumulative[self.starts[group]])
        law = before * (1 - self.pi[inside])
        total = law.sum()
        return law / total if total > 0 else np.full(len(law), 1 / len(law))

    def _expected_rest(self) -> np.ndarray:
        """Tokens of a rollout that leaves in each group, from there to the path's length."""
        return np.array(
            [
                (self.leave_law(g) * (self.length - np.arange(a, b))).sum()
                for g, (a, b) in enumerate(zip(self.starts, self.stops, strict=True))
            ]
        )

    def _after_weights(self) -> np.ndarray:
        """[g, h]: how much leaving in group h counts in p after group g."""
        num = len(self.starts)
        weights = np.zeros((num, num))
        for g in range(num - 1):
            reach = np.concatenate([[1.0], np.cumprod(self.stay[g + 1 : -1])])
            weights[g, g + 1 :] = reach * self.leave[g + 1 :]
        return weights

    # -------------------------------------------------------------------------------- counting

    def add(self, start: int, leave: int, success: bool) -> None:
        """A rollout that was on the path from prefix length `start` to `leave`, then off it.

        `leave` = the path's length: it followed the path to its end and tells nothing new.
        """
        self._visits[start : leave + 1] += 1
        if leave < self.length:
            group = self._group_of[leave]
            self.n[group] += 1
            self.k[group] += success

    def visits(self, length: int) -> int:
        """Rollouts that were on the path at a prefix length: samples of p there."""
        return int(self._visits[length])

    # ------------------------------------------------------------------------------- estimating

    def belief(self) -> Belief:
        """Backwards along the path: p after a group is what leaving it is compared with."""
        num = len(self.starts)
        off, after = np.empty(num), np.empty(num)
        p = self.success
        for g in range(num - 1, -1, -1):
            after[g] = p
            off[g] = (self.k[g] + SHRINK * p + 0.25) / (self.n[g] + SHRINK + 0.5)
            p = self.stay[g] * p + self.leave[g] * off[g]
        variance = np.maximum(off * (1 - off), _LEAST_VARIANCE) / (self.n + SHRINK + 1.5)
        return Belief(off, after, variance, p)

    def p_at(self, length: int, belief: Belief | None = None) -> float:
        """p after `length` path tokens."""
        if length == self.length:
            return self.success
        known = belief or self.belief()
        g = self._group_of[length]
        stay = math.exp(self.cumulative[self.stops[g]] - self.cumulative[length])
        return float(stay * known.after[g] + (1 - stay) * known.off[g])

    def p_along(self) -> list[float]:
        """p after 0, 1, ... tokens: length + 1 values."""
        known = self.belief()
        return [self.p_at(i, known) for i in range(self.length + 1)]

    def can_reach(self, start: int, stop: int) -> bool:
        """Whether the tokens of a segment could together move p by the gap."""
        return 1 - math.exp(self.cumulative[stop] - self.cumulative[start]) >= self.gap - 1e-9

    def probabilities(self, prior: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each candidate: P(it is pivotal), its effect, the effect's standard deviation.

        A fork is harmless with probability 1 - `prior` (its q is p after the token, give or take);
        else its q may be anything. Effects far from the gap need few rollouts to be decided.
        """
        known = self.belief()
        c = self.candidates
        leave, after, n, k = self.leave[c], known.after[c], self.n[c], self.k[c]
        after_variance = (self._weights[c] ** 2) @ known.variance
        free = (k + 1) / (n + 2)
        free_variance = free * (1 - free) / (n + 3)
        effect = leave * (after - free)
        spread = leave * np.sqrt(free_variance + after_variance) + 1e-9
        pivotal = _tail((effect - self.gap) / spread) + _tail((-self.gap - effect) / spread)
        mean = after.clip(0.02, 0.98)
        size = mean * (1 - mean) / np.maximum(after_variance + _LEAST_SPREAD**2, 1e-6) - 1
        size = size.clip(2, _MOST_EQUIVALENT)
        log_free = _log_beta(k + 1, n - k + 1)
        log_harmless = _log_beta(size * mean + k, size * (1 - mean) + n - k)
        log_harmless -= _log_beta(size * mean, size * (1 - mean))
        odds = prior / (1 - prior) * np.exp((log_free - log_harmless).clip(-40, 40))
        shrunk = leave * (after - known.off[c])
        deviation = leave * np.sqrt(known.variance[c] + after_variance)
        return pivotal * odds / (1 + odds), shrunk, deviation

    def allocate(self, open_: np.ndarray, probability: np.ndarray, batch: int) -> np.ndarray:
        """How many of `batch` rollouts should leave the path in each group, [g].

        `open_` [c] marks the undecided candidates. Each rollout goes where it lowers the undecided
        effects' variance most for its cost in tokens.
        """
        known = self.belief()
        unsure = np.where(open_, probability * (1 - probability) + 1e-3, 0.0)
        worth = (unsure[:, None] * self._slopes**2).sum(0)
        worth *= np.maximum(known.off * (1 - known.off), 0.05) / self.cost
        worth[self.leave <= 1e-9] = 0.0
        given = np.zeros(len(self.starts), dtype=int)
        size = self.n + SHRINK
        for _ in range(batch):
            best = int((worth / ((size + 0.5) * (size + 1.5))).argmax())
            given[best] += 1
            size[best] += 1
        return given


def _groups(candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut positions into single candidates and runs of others: (starts, stops)."""
    edge = np.ones(len(candidate), dtype=bool)
    edge[1:] = candidate[1:] | candidate[:-1]
    starts = np.flatnonzero(edge)
    return starts, np.append(starts[1:], len(candidate))


def _tail(x: np.ndarray) -> np.ndarray:
    """The normal law's distribution function."""
    return 0.5 * _ERFC(-x / math.sqrt(2))


def _log_beta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _LGAMMA(a) + _LGAMMA(b) - _LGAMMA(a + b)
