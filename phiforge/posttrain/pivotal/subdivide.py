"""The report's `Subdivide` (arXiv 2412.08905, Fig. 4): bisection at log-probability midpoints.

`subdivide(logprobs, gap)` is a generator: it yields the prefix lengths whose p(success) it needs,
takes them through `send`, and returns the positions of the pivotal tokens. It draws nothing itself.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

# Estimates are ratios of small counts; 0.5 - 0.3 must count as a gap of 0.2.
TOLERANCE = 1e-9

Values = Mapping[int, float | None]


@dataclass(frozen=True)
class Found:
    """What one path's bisection ends with.

    `pivotal` are the positions of tokens with |p after - p before| >= gap, in order; `undecided`
    the (start, stop) segments left alone because an end had no scored rollout.
    """

    pivotal: tuple[int, ...]
    undecided: tuple[tuple[int, int], ...]


def reaches(difference: float, gap: float) -> bool:
    """Whether |difference| is at least `gap`, up to rounding."""
    return abs(difference) >= gap - TOLERANCE


def midpoint(logprobs: Sequence[float]) -> int:
    """Where the cumulative log-probability reaches half of its total: a cut in 1..len-1.

    `logprobs` are natural logarithms of the tokens' probabilities, at least two of them. A segment
    of certain tokens (total 0) is cut in its middle.
    """
    length = len(logprobs)
    assert length >= 2, "a single token cannot be cut"
    total = sum(logprobs)
    if total == 0:
        return length // 2
    cumulative = 0.0
    for position, logprob in enumerate(logprobs, 1):
        cumulative += logprob
        if cumulative <= total / 2:
            return min(position, length - 1)
    return length - 1


def subdivide(logprobs: Sequence[float], gap: float) -> Generator[list[int], Values, Found]:
    """Bisect a path of `len(logprobs)` tokens.

    Yields sorted prefix lengths (0 = before the first token); expects a mapping with at least these
    lengths, None where p is unknown. All open segments advance together, level by level, so that
    one round of rollouts serves them all. A cut never asks again for a length it was given, and two
    opposite jumps that cancel inside a segment stay unseen, as in the report.
    """
    known: dict[int, float | None] = {}
    pivotal: list[int] = []
    undecided: list[tuple[int, int]] = []
    segments = [(0, len(logprobs))] if len(logprobs) else []
    while segments:
        wanted = {length for segment in segments for length in segment} - known.keys()
        if wanted:
            given = yield sorted(wanted)
            known |= {length: given[length] for length in wanted}
        halves = []
        for start, stop in segments:
            before, after = known[start], known[stop]
            if before is None or after is None:
                undecided.append((start, stop))
            elif not reaches(after - before, gap):
                continue
            elif stop - start == 1:
                pivotal.append(start)
            else:
                cut = start + midpoint(logprobs[start:stop])
                halves += [(start, cut), (cut, stop)]
        segments = halves
    return Found(tuple(sorted(pivotal)), tuple(sorted(undecided)))
