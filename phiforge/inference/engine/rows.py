"""The rows being computed and sampled, as arrays: a step costs the same Python whatever their
number.

`rows.add(answer, ...)`, `rows.next_pass(...)`, `rows.record(...)`, `rows.remove(...)`. Active rows
are always the first `num_active`; removing moves the last ones into the gaps. Nothing is written.

A row has `length` tokens (prompt and answer), of which `computed` lie in the cache; its last token
is drawn once they are equal. `known` of them came with it.
"""

from __future__ import annotations

import numpy as np

from phiforge.inference.engine.answer import Answer
from phiforge.inference.engine.prefix import Node
from phiforge.inference.engine.runner import BLOCK, Pass
from phiforge.inference.engine.sample import BLOCK_STEPS, Laws, uniforms


class Rows:
    """Room for `num_rows` rows of at most `context` tokens."""

    def __init__(self, num_rows: int, context: int) -> None:
        self.num_active = 0
        self.answers: list[Answer] = []
        self.ids: list[np.ndarray] = []  # the tokens each came with
        self.nodes: list[Node | None] = []  # of the prefix tree, while the row fills it
        self.tails: list[bytes] = []  # last bytes of the text, for stop strings
        self.length = np.zeros(num_rows, np.int32)
        self.computed = np.zeros(num_rows, np.int32)
        self.known = np.zeros(num_rows, np.int32)
        self.count = np.zeros(num_rows, np.int32)  # tokens of the answer
        self.limit = np.zeros(num_rows, np.int32)
        self.last_token = np.zeros(num_rows, np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.tables = np.zeros((num_rows, -(-context // BLOCK)), np.int32)
        self.tokens = np.zeros((num_rows, 64), np.int32)
        self.logprobs = np.zeros((num_rows, 64), np.float32)
        self.laws = Laws.empty(num_rows)
        self.fills_node = np.zeros(num_rows, bool)
        self.wants_logprobs = np.zeros(num_rows, bool)
        self.num_top = np.zeros(num_rows, np.int32)  # alternatives told beside each token
        self.owes_logprobs = np.zeros(num_rows, bool)
        self.is_closed = np.zeros(num_rows, bool)
        self.is_streamed = np.zeros(num_rows, bool)
        self.has_mask = np.zeros(num_rows, bool)
        self.has_stop = np.zeros(num_rows, bool)
        self._uniforms = np.zeros((num_rows, BLOCK_STEPS))
        self._keys = np.zeros((num_rows, 2), np.uint64)

    @property
    def num_free(self) -> int:
        """Rows that could be added."""
        return len(self.length) - self.num_active

    def add(
        self,
        answer: Answer,
        ids: np.ndarray,
        num_cached: int,
        table: list[int],
        node: Node | None,
        tail: bytes,
    ) -> None:
        """Lets an answer join: `ids` its tokens, the first `num_cached` of them in the cache."""
        row, count = self.num_active, len(answer.tokens)
        self.num_active += 1
        self.answers.append(answer)
        self.ids.append(ids)
        self.nodes.append(node)
        self.tails.append(tail)
        self.length[row] = self.known[row] = len(ids)
        self.computed[row] = num_cached
        self.count[row], self.limit[row] = count, answer.limit
        self.last_token[row] = ids[-1]
        self.set_table(row, table)
        self._make_room_for_tokens(count)
        self.tokens[row, :count] = answer.tokens
        self.logprobs[row, : len(answer.logprobs)] = answer.logprobs
        self.laws.set(row, answer.sampling)
        self.fills_node[row] = node is not None
        self.wants_logprobs[row] = answer.sampling.logprobs
        self.num_top[row] = answer.sampling.top_logprobs
        self.owes_logprobs[row] = answer.owes_logprobs
        self.is_closed[row] = answer.closed is not None
        self.is_streamed[row] = answer.streamed
        self.has_mask[row] = answer.mask is not None
        self.has_stop[row] = bool(answer.sampling.stop)
        self._keys[row] = answer.key
        self._uniforms[row] = uniforms(answer.key, count // BLOCK_STEPS)

    def set_table(self, row: int, table: list[int]) -> None:
        """Names a row's blocks."""
        self.num_blocks[row] = len(table)
        self.tables[row, : len(table)] = table

    def table(self, row: int) -> list[int]:
        """A row's blocks."""
        return self.tables[row, : self.num_blocks[row]].tolist()

    def add_block(self, row: int, block: int) -> None:
        """One more block for a row that grows."""
        self.tables[row, self.num_blocks[row]] = block
        self.num_blocks[row] += 1

    def without_block(self) -> np.ndarray:
        """Rows whose last token has no block yet."""
        n = self.num_active
        return np.flatnonzero(self.length[:n] > self.num_blocks[:n] * BLOCK)

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where positions of rows lie in the cache, counted in tokens."""
        return self.tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK

    def next_pass(self, most_tokens: int) -> tuple[Pass, np.ndarray] | None:
        """What to compute next, and whose row each part is; None when nothing waits.

        Every row with one token left takes part, then chunks of longer ones, the oldest first,
        until there are `most_tokens` (at least one block's worth of them).
        """
        n = self.num_active
        left = self.length[:n] - self.computed[:n]
        singles = np.flatnonzero(left == 1)
        longer = np.flatnonzero(left > 1)
        if not len(longer):
            return self._decode_pass(singles) if len(singles) else None
        room = max(BLOCK, most_tokens - len(singles))
        token_ids, positions = [self.last_token[singles]], [self.length[singles] - 1]
        chosen, counts = [singles], [np.ones(len(singles), np.int32)]
        for row in sorted(longer.tolist(), key=lambda row: self.answers[row].order):
            start, size = int(self.computed[row]), min(room, int(left[row]))
            if not size:
                break
            room -= size
            token_ids.append(self.ids[row][start : start + size])
            positions.append(np.arange(start, start + size, dtype=np.int32))
            chosen.append(np.array([row]))
            counts.append(np.array([size], np.int32))
        rows = np.concatenate(chosen)
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(np.concatenate(counts), out=starts[1:])
        tables = self._tables(rows)
        return Pass(np.concatenate(token_ids), np.concatenate(positions), starts, tables), rows

    def _decode_pass(self, rows: np.ndarray) -> tuple[Pass, np.ndarray]:
        starts = np.arange(len(rows) + 1, dtype=np.int32)
        batch = Pass(self.last_token[rows], self.length[rows] - 1, starts, self._tables(rows))
        return batch, rows

    def _tables(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.tables[rows, : self.num_blocks[rows].max()])

    def ready(self) -> np.ndarray:
        """Rows whose tokens are all computed."""
        n = self.num_active
        return np.flatnonzero(self.length[:n] == self.computed[:n])

    def next_uniforms(self, rows: np.ndarray) -> np.ndarray:
        """The random number of each row's next draw."""
        places = self.count[rows] % BLOCK_STEPS
        for row in rows[(places == 0) & (self.count[rows] > 0)]:
            self._uniforms[row] = uniforms(self._keys[row], int(self.count[row]) // BLOCK_STEPS)
        return self._uniforms[rows, places]

    def record(self, rows: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray | None) -> None:
        """Adds a drawn token to each row."""
        counts = self.count[rows]
        self._make_room_for_tokens(int(counts.max()) + 1)
        self.tokens[rows, counts] = token_ids
        if logprobs is not None:
            self.logprobs[rows, counts] = logprobs
        self.last_token[rows] = token_ids
        self.count[rows] += 1
        self.length[rows] += 1

    def settle(self, row: int) -> None:
        """Copies a row's tokens into its answer."""
        answer, count = self.answers[row], int(self.count[row])
        if not answer.streamed:  # a streamed answer has them already
            answer.tokens = self.tokens[row, :count].tolist()
            if answer.sampling.logprobs and not self.owes_logprobs[row]:
                answer.logprobs = self.logprobs[row, :count].tolist()

    def remove(self, gone: np.ndarray) -> None:
        """Takes rows out, in any order; the last rows move into their places."""
        n = self.num_active
        stays = np.ones(n, bool)
        stays[gone] = False
        self.num_active = n - len(gone)
        holes = np.flatnonzero(~stays[: self.num_active])
        movers = self.num_active + np.flatnonzero(stays[self.num_active :])
        for array in self._arrays():
            array[holes] = array[movers]
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.answers[hole], self.ids[hole] = self.answers[mover], self.ids[mover]
            self.nodes[hole], self.tails[hole] = self.nodes[mover], self.tails[mover]
        for values in (self.answers, self.ids, self.nodes, self.tails):
            del values[self.num_active :]

    def _make_room_for_tokens(self, count: int) -> None:
        while count > self.tokens.shape[1]:
            more = ((0, 0), (0, self.tokens.shape[1]))
            self.tokens, self.logprobs = np.pad(self.tokens, more), np.pad(self.logprobs, more)

    def _arrays(self) -> list[np.ndarray]:
        laws = self.laws
        return [
            *(self.length, self.computed, self.known, self.count, self.limit, self.last_token),
            *(self.num_blocks, self.tables, self.tokens, self.logprobs),
            *(laws.temperature, laws.top_p, laws.top_k, laws.min_p),
            *(self.fills_node, self.wants_logprobs, self.num_top, self.owes_logprobs),
            self.is_closed,
            *(self.is_streamed, self.has_mask, self.has_stop, self._uniforms, self._keys),
        ]
