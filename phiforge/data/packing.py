"""Packs documents into rows of one context length: best fit, nothing dropped, nothing crossed.

Call `pack_rows(lengths, context)`; it gives `Rows` of pieces (document, start, length). Pure
arithmetic on lengths, no tokens are touched. Writes nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of pieces: row r holds pieces[offsets[r] : offsets[r + 1]].

    `document`, `start` and `length` describe each piece: tokens start..start+length of that
    document. `tokens` counts the tokens of each row; the rest of the context is padding.
    """

    context: int
    offsets: Ints
    document: Ints
    start: Ints
    length: Ints
    tokens: Ints

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def padding(self) -> float:
        """Share of positions that hold no token."""
        return 1.0 - self.num_tokens / (self.num_rows * self.context) if self.num_rows else 0.0


def pack_rows(lengths: Ints, context: int, order_key: int = 0) -> Rows:
    """Pack documents of `lengths` tokens into rows of `context`.

    A document longer than the context is cut into whole contexts and a rest; every other one stays
    whole. Each row takes the longest piece left and then the longest that still fit, the last two
    of them so that the row is exactly full where the lengths allow it.
    Pieces of equal length are taken in an order drawn from `order_key`.
    """
    document, start, length = _cut(np.asarray(lengths, dtype=np.int64), context)
    piece_of_length = _by_length(length, context, order_key)
    counts = np.bincount(length, minlength=context + 1)
    taken = np.zeros(context + 1, dtype=np.int64)
    row_pieces: list[Ints] = []  # per strategy: (rows, pieces per row)
    while (strategy := _strategy(counts, context)) is not None:
        sizes, repeats = strategy
        rows = int((counts[sizes] // repeats).min())
        columns = []
        for size, repeat in zip(sizes, repeats, strict=True):
            first = taken[size]
            chosen = piece_of_length[size][first : first + rows * repeat]
            columns.append(chosen.reshape(rows, repeat))
            taken[size] += rows * repeat
            counts[size] -= rows * repeat
        row_pieces.append(np.concatenate(columns, axis=1))
    widths = np.concatenate(
        [np.zeros(1, np.int64), *(np.full(len(p), p.shape[1], np.int64) for p in row_pieces)]
    )
    pieces = np.concatenate([np.zeros(0, np.int64), *(p.reshape(-1) for p in row_pieces)])
    offsets = np.cumsum(widths)
    sums = np.concatenate([[0], np.cumsum(length[pieces])])
    return Rows(
        context,
        offsets,
        document[pieces],
        start[pieces],
        length[pieces],
        sums[offsets[1:]] - sums[offsets[:-1]],
    )


def _cut(lengths: Ints, context: int) -> tuple[Ints, Ints, Ints]:
    """Pieces of documents: (document, start, length), none longer than the context."""
    num_pieces = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    start = (np.arange(len(document)) - first[document]) * context
    return document, start, np.minimum(lengths[document] - start, context)


def _by_length(length: Ints, context: int, order_key: int) -> list[Ints]:
    """The pieces of each length, in an order drawn from the key."""
    order = np.lexsort((scramble(order_key, np.arange(len(length))), length))
    borders = np.searchsorted(length[order], np.arange(context + 2))
    return [order[borders[size] : borders[size + 1]] for size in range(context + 1)]


def _strategy(counts: Ints, context: int) -> tuple[Ints, Ints] | None:
    """How to fill one row from the lengths left: (sizes, how many of each), or None at the end.

    Starts with the longest piece; ends with one or two pieces that fill the row exactly where
    there are such. The same filling serves for many rows at once, which makes packing fast.
    """
    left = counts.copy()
    chosen: dict[int, int] = {}
    room = context
    while len(fitting := np.flatnonzero(left[: room + 1])):
        longest = int(fitting[-1])
        pair = _exact_pair(left, fitting, room) if chosen else ()
        # Far from the end many of one length go in at once; near it one by one, so that an exact
        # ending is not overlooked.
        sizes = pair or (longest,) * max(1, min(room // longest - 2, int(left[longest])))
        for size in sizes:
            chosen[size] = chosen.get(size, 0) + 1
            left[size] -= 1
            room -= size
    if not chosen:
        return None
    return np.array(list(chosen)), np.array(list(chosen.values()))


def _exact_pair(left: Ints, fitting: Ints, room: int) -> tuple[int, ...]:
    """One length, or two, that fill the room exactly, the longest first; () when there are none."""
    if fitting[-1] == room:
        return (room,)
    other = room - fitting
    possible = (other > 0) & (left[other] > (other == fitting))
    if not possible.any():
        return ()
    size = int(fitting[possible][-1])
    return (size, room - size)


def scramble(key: int, values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """A 64-bit hash (splitmix64's finaliser, twice) of each value under a key.

    Own arithmetic rather than NumPy's generators, whose streams may change between versions:
    which row comes when must never depend on a library's version.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(np.uint64(key & (2**64 - 1)) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + mixed)


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def permutation(key: int, size: int) -> Ints:
    """A permutation of 0..size-1, a function of the key alone."""
    return np.argsort(scramble(key, np.arange(size)), kind="stable")
