"""Plans which prompt tokens are computed, each shared prefix once.

`plan(prompts)` gives segments of a prefix tree, parents first, and where each prompt ends in it.
Pure Python, nothing is written.

Prompts that extend one another (the prefixes of a path, arXiv 2412.08905 section 4.2.1) are one
segment: the longest is computed, the others end inside it. Prompts that part ways share what comes
before, if that is long enough to be worth a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_SHARED_TOKENS = 32  # a shorter common start is computed by each prompt: cheaper than a pass

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Tokens `start` .. `end - 1` of a row, computed after those of its parent (-1: none)."""

    parent: int
    start: int
    end: int
    token_ids: TokenIds  # of the whole row, from 0 to `end`

    @property
    def num_new(self) -> int:
        """Tokens that this segment computes."""
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """Segments, parents before children; `ends[i]` is the segment that holds prompt i's last token.

    `prompts` are distinct and sorted.
    """

    prompts: list[TokenIds]
    segments: list[Segment]
    ends: list[int]

    def chain(self, segment: int) -> list[int]:
        """A segment and its ancestors, the outermost first."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.segments[segment].parent
        return found[::-1]


def plan(prompts: Sequence[TokenIds], min_shared: int = MIN_SHARED_TOKENS) -> Plan:
    """The plan for distinct, non-empty prompts, in any order."""
    ordered = sorted(prompts)
    leaves, leaf_of = _leaves(ordered)
    segments: list[Segment] = []
    last_of_leaf = [-1] * len(leaves)
    pending = [(0, len(leaves), 0, -1)]
    while pending:
        low, high, start, parent = pending.pop()
        if high - low == 1:
            segments.append(Segment(parent, start, len(leaves[low]), leaves[low]))
            last_of_leaf[low] = len(segments) - 1
            continue
        common = _common(leaves[low], leaves[high - 1])
        if common - start >= min_shared:
            segments.append(Segment(parent, start, common, leaves[low][:common]))
            start, parent = common, len(segments) - 1
        parts = [(a, b, start, parent) for a, b in _split(leaves, low, high, common)]
        pending.extend(reversed(parts))
    result = Plan(ordered, segments, [])
    for prompt, leaf in zip(ordered, leaf_of, strict=True):
        chain = result.chain(last_of_leaf[leaf])
        result.ends.append(next(i for i in chain if segments[i].end >= len(prompt)))
    return result


def _leaves(ordered: list[TokenIds]) -> tuple[list[TokenIds], list[int]]:
    """Prompts that no other extends, and which of them each prompt begins.

    In sorted order whatever extends a prompt comes right after it.
    """
    leaves: list[TokenIds] = []
    leaf_of: list[int] = []
    for index, prompt in enumerate(ordered):
        leaf_of.append(len(leaves))
        following = ordered[index + 1] if index + 1 < len(ordered) else ()
        if following[: len(prompt)] != prompt:
            leaves.append(prompt)
    return leaves, leaf_of


def _common(a: TokenIds, b: TokenIds) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(leaves: list[TokenIds], low: int, high: int, place: int) -> list[tuple[int, int]]:
    """Runs of leaves with the same token at `place`."""
    borders = [low]
    borders += [i for i in range(low + 1, high) if leaves[i][place] != leaves[i - 1][place]]
    return list(zip(borders, [*borders[1:], high], strict=True))
