"""Continuous batching: answers join and leave at any step, and share what they have in common.

`scheduler.submit(answer)`, then `scheduler.step()` until it returns False. Nothing is written.

A step lets waiting answers in while rows and blocks suffice, computes one pass (a token of every
row under way, and chunks of prompts), and draws a token for every row that is complete. Of answers
that share a start one computes it, the others wait for that. When blocks run out the youngest row
is put off: its blocks are freed, and it is computed again later, to the same tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.answer import Answer
from phiforge.inference.engine.blocks import BlockPool
from phiforge.inference.engine.choose import Chooser, damaged
from phiforge.inference.engine.memory import zeros
from phiforge.inference.engine.prefix import PrefixTree
from phiforge.inference.engine.rows import Rows
from phiforge.inference.engine.runner import BLOCK, Pass, Runner
from phiforge.inference.interface import FinishReason, PromptTokenizer

_PASS_TOKENS = {"cpu": 512, "cuda": 4096}  # of one pass: more make one step long, not many faster


class Scheduler:
    """The queue, the rows, the blocks and the prefix tree over one runner.

    `num_blocks` bounds the cache. Counters: `num_prefilled_tokens` computed of what rows came with,
    `num_cached_tokens` of it found in the cache, `num_generated_tokens` drawn.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PromptTokenizer,
        num_rows: int,
        num_blocks: int,
    ) -> None:
        self.num_prefilled_tokens = self.num_cached_tokens = self.num_generated_tokens = 0
        self._tokenizer, self._num_rows = tokenizer, num_rows
        self._queue: list[Answer] = []
        self.start(runner, num_blocks)

    def start(self, runner: Runner, num_blocks: int) -> None:
        """Begins anew on a runner with an empty cache. Raises MemoryError, with sizes."""
        self.runner = runner
        self._most_tokens = _PASS_TOKENS.get(runner.device.type, 512)
        runner.allocate(num_blocks + 1)
        shape = (runner.num_blocks, BLOCK, runner.config.hidden_size)
        self._x = zeros(shape, runner.dtype, runner.device, "the cache of last layers' outputs")
        self._chooser = Chooser(runner, self._tokenizer)
        self._empty()

    @property
    def num_blocks(self) -> int:
        """Blocks that rows can have."""
        return self._pool.num_usable

    @property
    def active(self) -> bool:
        """Whether a step would do something."""
        return bool(self._queue or self._rows.num_active)

    def submit(self, answers: Iterable[Answer]) -> None:
        """Queues answers, to be begun in their order."""
        for answer in answers:
            heapq.heappush(self._queue, answer)

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Ends answers that are not done; their blocks are free at once."""
        gone = {id(answer) for answer in answers if not answer.done}
        rows = [row for row, answer in enumerate(self._rows.answers) if id(answer) in gone]
        ended = [self._rows.answers[row] for row in rows]
        self._leave(np.array(rows, np.int64))
        queued = [answer for answer in self._waiting() if id(answer) in gone]
        self._queue = [answer for answer in self._queue if id(answer) not in gone]
        heapq.heapify(self._queue)
        for answer in {id(answer): answer for answer in (*ended, *queued)}.values():
            answer.finish("cancelled")

    def put_all_off(self) -> None:
        """Takes all rows back into the queue, forgetting the cache; their tokens stay."""
        for row, answer in enumerate(self._rows.answers):
            self._rows.settle(row)
            heapq.heappush(self._queue, answer)
        self.submit(self._tree.clear())
        self._empty()

    def step(self) -> bool:
        """One pass over all that is under way; False when nothing is left."""
        try:
            self._admit()
            self._find_blocks()
            found = self._rows.next_pass(self._most_tokens)
            if found is not None:
                self._compute(*found)
            self._draw()
        except BaseException:  # out of memory, or interrupted: nothing half done may remain
            self.put_all_off()
            raise
        return self.active

    def _empty(self) -> None:
        self._pool = BlockPool(self.runner.num_blocks)
        self._tree = PrefixTree(self._pool)
        self._too_large: Answer | None = None  # found no room; not asked again until a row leaves
        self._rows = Rows(self._num_rows, self.runner.context)

    def _waiting(self) -> list[Answer]:
        return [*self._queue, *self._tree.waiting()]

    # joining --------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begins answers while there are rows, blocks, and not too much waits to be computed."""
        rows = self._rows
        n = rows.num_active
        uncomputed = int((rows.length[:n] - rows.computed[:n]).sum()) if self._queue else 0
        for _ in range(2 * self._num_rows):  # of a long queue that waits for one prompt
            if (
                not self._queue
                or self._queue[0] is self._too_large
                or not rows.num_free
                or uncomputed - n >= self._most_tokens
            ):
                return
            answer = heapq.heappop(self._queue)
            if answer.done:  # cancelled while it waited
                continue
            try:
                num_tokens = self._begin(answer)
            except BaseException:
                heapq.heappush(self._queue, answer)
                raise
            if num_tokens is None:
                heapq.heappush(self._queue, answer)
                self._too_large = answer
                return
            uncomputed += num_tokens

    def _begin(self, answer: Answer) -> int | None:
        """Gives an answer a row and blocks, or lets it wait for a prompt that is being computed.

        How many tokens that leaves to compute; None when there are not enough blocks.
        """
        ids = answer.row_ids()
        match = self._tree.match(ids)
        if match.pending is not None:
            match.pending.waiting.append((match.needed, answer))
            return 0
        cached, blocks = match.length, match.blocks
        self._pool.hold(blocks)
        num_whole = cached // BLOCK
        needed = -(-len(ids) // BLOCK) - num_whole
        if not self._reserve(needed):
            self._pool.release(blocks[num_whole:])  # rather computed again than waited for
            cached, blocks = num_whole * BLOCK, blocks[:num_whole]
            if not self._reserve(needed):
                self._pool.release(blocks)
                return None
        taken = [self._pool.take() for _ in range(needed)]
        if cached % BLOCK:
            self._copy(blocks[-1], taken[0])
            self._pool.release(blocks[-1:])
        table = blocks[:num_whole] + taken
        node = self._tree.insert(ids, table, cached) if cached < len(ids) else None
        self._rows.add(answer, ids, cached, table, node, self._chooser.tail(answer))
        self.num_cached_tokens += cached
        return len(ids) - cached

    def _reserve(self, needed: int) -> bool:
        """Whether so many blocks are free, after letting go of unused ones if need be.

        Rows under way get a margin, so that they do not run out at once.
        """
        pool, active = self._pool, self._rows.num_active
        wanted = needed + active // 16
        if pool.num_free < wanted:
            self._evict(wanted)
        if pool.num_free < wanted and not active:
            self.submit(self._tree.clear())  # what branches hold twice is in the way of a lone row
        return pool.num_free >= wanted

    def _evict(self, wanted: int) -> None:
        """Lets the tree go until so many blocks are free, or an eighth: a search costs time."""
        missing = wanted - self._pool.num_free
        self._tree.evict(max(missing, self._pool.num_usable // 8))

    def _copy(self, source: int, target: int) -> None:
        self.runner.copy_block(source, target)
        self._x[target] = self._x[source]

    # computing ------------------------------------------------------------------------------------

    def _find_blocks(self) -> None:
        """A block for every row whose next token begins one; if short, puts the youngest off."""
        rows = self._rows
        while len(short := rows.without_block()):
            if self._pool.num_free < len(short):
                self._evict(len(short))
            if not self._pool.num_free and rows.num_active == 1:
                self.submit(self._tree.clear())
            for row in short[: self._pool.num_free].tolist():
                rows.add_block(row, self._pool.take())
            if len(rows.without_block()):
                self._put_off(max(range(rows.num_active), key=lambda row: rows.answers[row].order))

    def _put_off(self, row: int) -> None:
        answer = self._rows.answers[row]
        self._rows.settle(row)
        self._leave(np.array([row]))
        heapq.heappush(self._queue, answer)

    def _compute(self, batch: Pass, rows: np.ndarray) -> None:
        """One pass; what it computed is known to the rows and the tree afterwards."""
        x_nd = self.runner.forward(batch)
        counts = np.diff(batch.row_starts)
        rows_n = rows if len(rows) == len(batch.token_ids_n) else np.repeat(rows, counts)
        slots = torch.from_numpy(self._rows.slots(rows_n, batch.positions_n)).to(x_nd.device)
        self._x.view(-1, x_nd.shape[1]).index_copy_(0, slots, x_nd)
        before = self._rows.computed[rows]
        self._rows.computed[rows] = before + counts
        self.num_prefilled_tokens += int(counts[before < self._rows.known[rows]].sum())
        # a sum is NaN or infinite if any part is; one that only overflowed is looked at closely
        if not np.isfinite(float(x_nd.sum(dtype=torch.float32))):
            self._drop_damaged(x_nd, batch, rows)
        elif self._rows.fills_node[rows].any():
            self._tell_tree(rows[self._rows.fills_node[rows]])

    def _tell_tree(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            node, computed = self._rows.nodes[row], int(self._rows.computed[row])
            assert node is not None
            self.submit(self._tree.advance(node, computed))
            if computed >= node.end:
                self._rows.nodes[row], self._rows.fills_node[row] = None, False

    def _drop_damaged(self, x_nd: Tensor, batch: Pass, rows: np.ndarray) -> None:
        """Ends the rows whose numbers are not finite, and cleans what they wrote."""
        finite_n = x_nd.isfinite().all(dim=-1).cpu().numpy()
        finite_b = np.logical_and.reduceat(finite_n, batch.row_starts[:-1])
        self._forget_prefixes()
        if not finite_b.all():
            self._fail_damaged(rows[~finite_b])

    def _forget_prefixes(self) -> None:
        """Empties the tree: a damaged row's blocks may be in it."""
        self.submit(self._tree.clear())
        self._rows.nodes = [None] * self._rows.num_active
        self._rows.fills_node[:] = False

    def _fail_damaged(self, rows: np.ndarray) -> None:
        failed = [(self._rows.answers[row], int(self._rows.count[row])) for row in rows.tolist()]
        for block in self._leave(rows):
            self._copy(0, block)  # zeros: attention weighs unused slots with 0, and 0 x NaN is NaN
        for answer, count in failed:
            answer.fail(damaged(answer, count))

    # drawing --------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """A token for every row that is computed to its end; rows that end with it leave."""
        state = self._rows
        rows = state.ready()
        if not len(rows):
            return
        failed: dict[int, Exception] = {}
        ended: dict[int, FinishReason] = {}
        owing = rows[state.owes_logprobs[rows]]
        if len(owing):
            failed |= self._chooser.score(state, owing, self._x)
        if len(owing) or state.is_closed[rows].any():
            for row in rows[state.is_closed[rows]].tolist():
                ended[row] = state.answers[row].closed or "stop"
            rows = np.array([row for row in rows.tolist() if row not in failed | ended], np.int64)
        if len(rows):
            drawn, unable = self._chooser.draw(state, rows, self._x)
            failed |= unable
            ended |= drawn
            self.num_generated_tokens += len(rows) - len(unable)
        if failed or ended:
            self._end(ended, failed)

    def _end(self, ended: dict[int, FinishReason], failed: dict[int, Exception]) -> None:
        outcome = ended | failed
        answers = [self._rows.answers[row] for row in outcome]
        for row in outcome:
            self._rows.settle(row)
            if row in ended and row not in failed and self._rows.is_streamed[row]:
                self._remember(row)
        self._leave(np.array(list(outcome), np.int64))
        for answer, result in zip(answers, outcome.values(), strict=True):
            if isinstance(result, Exception):
                answer.fail(result)
            else:
                answer.finish(result)

    def _remember(self, row: int) -> None:
        """Keeps an answer in the tree: a chat's next turn begins with it."""
        answer, computed = self._rows.answers[row], int(self._rows.computed[row])
        ids = np.concatenate((answer.prompt_ids, np.array(answer.tokens, np.int32)))[:computed]
        if self._tree.match(ids).pending is None:
            self._tree.insert(ids, self._rows.table(row), computed)

    def _leave(self, rows: np.ndarray) -> list[int]:
        """Takes rows out; the blocks that nobody holds then."""
        freed: list[int] = []
        self._too_large = None
        for row in rows.tolist():
            node = self._rows.nodes[row]
            if node is not None:
                self.submit(self._tree.abandon(node))
            freed += self._pool.release(self._rows.table(row))
        if len(rows):
            self._rows.remove(rows)
        return freed
