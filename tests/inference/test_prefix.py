"""The prefix tree matches to the token, holds what it names, and lets go of the oldest first."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.inference.engine.blocks import BlockPool
from phiforge.inference.engine.prefix import PrefixTree
from phiforge.inference.engine.runner import BLOCK


def ids(*parts: tuple[int, int]) -> np.ndarray:
    """Tokens as (token, how many) runs."""
    return np.concatenate([np.full(count, token, np.int32) for token, count in parts])


def add(pool: BlockPool, tree: PrefixTree, row: np.ndarray) -> int:
    """A row that is computed and leaves at once, as the scheduler does it; how much was known."""
    match = tree.match(row)
    assert match.pending is None
    pool.hold(match.blocks)
    whole = match.length // BLOCK
    taken = [pool.take() for _ in range(-(-len(row) // BLOCK) - whole)]
    table = match.blocks[:whole] + taken
    node = tree.insert(row, table, match.length) if match.length < len(row) else None
    if node is not None:
        tree.advance(node, len(row))
    pool.release(match.blocks[whole:])
    pool.release(table)
    return match.length


def test_matches_end_inside_blocks():
    pool = BlockPool(100)
    tree = PrefixTree(pool)
    assert add(pool, tree, ids((1, 150))) == 0
    assert add(pool, tree, ids((1, 100), (2, 50))) == 100
    assert add(pool, tree, ids((1, 100), (2, 20), (3, 9))) == 120
    assert add(pool, tree, ids((1, 99))) == 99
    assert add(pool, tree, ids((2, 5))) == 0
    match = tree.match(ids((1, 100), (2, 50)))
    assert (match.length, len(match.blocks)) == (150, 3)


def test_what_is_not_ready_is_waited_for():
    pool = BlockPool(10)
    tree = PrefixTree(pool)
    row = ids((1, 100))
    node = tree.insert(row, [pool.take(), pool.take()], 0)
    assert node is not None
    match = tree.match(ids((1, 80), (2, 5)))
    assert (match.length, match.pending, match.needed) == (0, node, 80)
    node.waiting.append((80, "later"))
    assert tree.advance(node, 64) == []
    assert tree.match(ids((1, 60))).length == 60
    assert tree.match(ids((1, 64), (3, 1))).pending is None
    assert tree.advance(node, 90) == ["later"]
    assert tree.abandon(node) == []
    assert tree.match(row).length == 90


def test_a_lost_row_takes_its_unfinished_part_with_it():
    pool = BlockPool(10)
    tree = PrefixTree(pool)
    table = [pool.take() for _ in range(3)]
    node = tree.insert(ids((1, 180)), table, 0)
    assert node is not None
    node.waiting.append((180, "other"))
    tree.advance(node, 70)
    assert tree.abandon(node) == ["other"]
    pool.release(table)
    assert tree.match(ids((1, 180))).length == 70
    assert pool.num_free == pool.num_usable - 2


def test_the_oldest_goes_first_and_ends_go_before_starts():
    pool = BlockPool(100)
    tree = PrefixTree(pool)
    for token in (1, 2, 3):
        add(pool, tree, ids((token, 128)))
    tree.match(ids((1, 128)))
    assert tree.evict(1) == 1
    assert [tree.match(ids((token, 128))).length for token in (2, 1, 3)] == [64, 128, 128]
    assert tree.evict(3) == 3
    assert [tree.match(ids((token, 128))).length for token in (1, 2, 3)] == [0, 0, 128]


def test_rows_keep_their_blocks_from_eviction():
    pool = BlockPool(10)
    tree = PrefixTree(pool)
    add(pool, tree, ids((1, 128)))
    match = tree.match(ids((1, 64)))
    pool.hold(match.blocks)
    assert tree.evict(9) == 1
    assert tree.match(ids((1, 128))).length == 64
    pool.release(match.blocks)
    assert tree.evict(9) == 1
    assert pool.num_free == pool.num_usable


runs = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 90)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(runs, st.integers(1, 9)), max_size=15))
def test_what_is_known_is_the_longest_start_of_any_row(script):
    """Rows come, blocks are evicted: matches are right and every block is accounted for."""
    pool = BlockPool(400)
    tree = PrefixTree(pool)
    rows: list[list[int]] = []
    for action in script:
        if isinstance(action, int):
            tree.evict(action)
            rows = [row[: tree.match(np.array(row, np.int32)).length] for row in rows]
            continue
        row = ids(*action)
        known = [sum(np.cumprod([a == b for a, b in zip(row, r, strict=False)])) for r in rows]
        assert add(pool, tree, row) == max(known, default=0)
        rows.append(row.tolist())
    tree.clear()
    assert pool.num_free == pool.num_usable
