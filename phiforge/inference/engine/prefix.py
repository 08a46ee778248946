"""What the cache knows: a tree over token ids whose nodes name the blocks that hold them.

`tree.match(ids)` finds how much of a row is known, `tree.insert(ids, table, ready)` adds a row,
`tree.evict(count)` frees the blocks used longest ago. Nothing is written.

Matching is exact to the token. A node spans tokens `start` .. `end - 1`; two nodes that meet inside
a block each have a copy of it, or share it where one row filled both. A row's tokens enter the tree
before they are computed, so that nobody else computes them too: `ready` says how far they are, and
who needs more waits. Only the node's own row advances it, and nothing hangs below tokens that are
not ready.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phiforge.inference.engine.blocks import BlockPool
from phiforge.inference.engine.runner import BLOCK


@dataclass(eq=False)
class Node:
    """Tokens `start` .. `end - 1` of some rows; `blocks` from the one that `start` lies in."""

    token_ids: np.ndarray  # of this span
    start: int
    blocks: list[int]
    parent: Node | None
    ready: int  # tokens up to here are computed
    last_used: int = 0
    children: dict[int, Node] = field(default_factory=dict)
    waiting: list[tuple[int, Any]] = field(default_factory=list)  # (tokens needed, who)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Match:
    """How much of a row is known: `length` tokens, in `blocks` (the last perhaps in part).

    `pending`: the node that is going to hold more of the row's tokens, `needed` of them in all.
    """

    length: int
    blocks: list[int]
    pending: Node | None
    needed: int


class PrefixTree:
    """The tree; it holds blocks of `pool` and gives them back when evicted."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._clock = 0
        self._root = Node(np.zeros(0, np.int32), 0, [], None, 0)

    def match(self, ids: np.ndarray) -> Match:
        """The longest start of `ids` that is in the tree."""
        self._clock += 1
        node, length, blocks = self._root, 0, []
        while length < len(ids):
            child = node.children.get(int(ids[length]))
            if child is None:
                break
            common = _common(child.token_ids, ids[length:])
            end = length + common
            if end > child.ready:
                return Match(length, blocks, child, end)
            first = child.start // BLOCK
            blocks[first:] = child.blocks[: -(-end // BLOCK) - first]
            child.last_used = self._clock
            node, length = child, end
            if common < len(child.token_ids):
                break
        return Match(length, blocks, None, length)

    def insert(self, ids: np.ndarray, table: list[int], ready: int) -> Node | None:
        """Adds a row whose tokens lie in the blocks of `table`; the node of what is new, if any.

        What is known already keeps its blocks. Call it only when `match` finds nothing pending.
        """
        node, length = self._root, 0
        while length < len(ids):
            child = node.children.get(int(ids[length]))
            if child is None:
                break
            common = _common(child.token_ids, ids[length:])
            length += common
            node = child if common == len(child.token_ids) else self._split(child, common)
        if length == len(ids):
            return None
        blocks = table[length // BLOCK : -(-len(ids) // BLOCK)]
        added = Node(ids[length:], length, blocks, node, max(ready, length), self._clock)
        assert node is self._root or node.ready == node.end
        node.children[int(ids[length])] = added
        self._pool.hold_by_tree(blocks)
        return added

    def advance(self, node: Node, ready: int) -> list[Any]:
        """Says how far a node's tokens are computed; returns who need wait no longer."""
        node.ready = max(node.ready, min(ready, node.end))
        released = [who for needed, who in node.waiting if needed <= ready]
        node.waiting = [item for item in node.waiting if item[0] > ready]
        return released

    def abandon(self, node: Node) -> list[Any]:
        """Cuts off what was not computed, as its row has gone; returns all who waited for it."""
        released = [who for _, who in node.waiting]
        node.waiting = []
        if node.ready < node.end:
            assert not node.children
            self._truncate(node, node.ready)
        return released

    def evict(self, num_blocks: int) -> int:
        """Lets go of blocks that no row uses, those used longest ago first; how many were freed."""
        freed = 0
        heap = [(node.last_used, id(node), node) for node in self._nodes() if self._is_loose(node)]
        heapq.heapify(heap)
        while heap and freed < num_blocks:
            node = heapq.heappop(heap)[2]
            parent = node.parent
            freed += self._evict_from(node, num_blocks - freed)
            if node.parent is None and parent is not None and self._is_loose(parent):
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return freed

    def clear(self) -> list[Any]:
        """Forgets everything; returns all who waited."""
        released = []
        for node in list(self._nodes()):
            released += [who for _, who in node.waiting]
            self._pool.release_by_tree(node.blocks)
            node.waiting, node.parent, node.children = [], None, {}
        self._root.children = {}
        return released

    def waiting(self) -> list[Any]:
        """All who wait for tokens to be computed."""
        return [who for node in self._nodes() for _, who in node.waiting]

    def _nodes(self) -> Iterator[Node]:
        pending = list(self._root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def _is_loose(self, node: Node) -> bool:
        """Whether a node is a leaf that no row uses to its end."""
        if node is self._root or node.children:
            return False
        return not self._pool.held_by_rows(node.blocks[-1])

    def _evict_from(self, node: Node, num_blocks: int) -> int:
        """Takes blocks off a leaf's end, at most so many; the leaf goes with its last one."""
        freed = 0
        end = node.end
        while end > node.start and freed < num_blocks:
            block = node.blocks[(end - 1) // BLOCK - node.start // BLOCK]
            if self._pool.held_by_rows(block):
                break
            end = max(node.start, (end - 1) // BLOCK * BLOCK)
            freed += self._truncate(node, end)
        return freed

    def _truncate(self, node: Node, end: int) -> int:
        """Shortens a leaf to `end`, removing it when nothing is left; how many blocks are free."""
        kept = -(-end // BLOCK) - node.start // BLOCK if end > node.start else 0
        gone, node.blocks = node.blocks[kept:], node.blocks[:kept]
        first = int(node.token_ids[0])
        node.token_ids = node.token_ids[: end - node.start]
        node.ready = min(node.ready, end)
        if not kept:
            assert node.parent is not None
            del node.parent.children[first]
            node.parent = None
        return len(self._pool.release_by_tree(gone))

    def _split(self, node: Node, common: int) -> Node:
        """Cuts a node in two; returns the new upper part. The lower part stays the same object."""
        place = node.start + common
        assert node.parent is not None
        assert place <= node.ready
        own = -(-place // BLOCK) - node.start // BLOCK
        upper = Node(
            node.token_ids[:common], node.start, node.blocks[:own], node.parent, place
        )  # fmt: skip
        upper.last_used = node.last_used
        upper.children[int(node.token_ids[common])] = node
        node.parent.children[int(node.token_ids[0])] = upper
        if place % BLOCK:
            self._pool.hold_by_tree(upper.blocks[-1:])  # both parts keep the block they meet in
        node.blocks = node.blocks[place // BLOCK - node.start // BLOCK :]
        node.token_ids, node.start, node.parent = node.token_ids[common:], place, upper
        return upper


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common start."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    place = int(differs.argmax())
    return place if differs[place] else size
