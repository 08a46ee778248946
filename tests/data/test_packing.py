"""Packing: nothing lost, nothing longer than a row, little padding, fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.data.packing import pack_rows, permutation, scramble


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), max_size=40),
    context=st.integers(2, 40),
    key=st.integers(0),
)
def test_every_token_of_every_document_once(lengths: list[int], context: int, key: int):
    rows = pack_rows(np.array(lengths, dtype=np.int64), context, key)
    assert rows.num_tokens == sum(lengths)
    assert all(0 < tokens <= context for tokens in rows.tokens)
    found = [(d, s + t) for d, s, n in zip(rows.document, rows.start, rows.length, strict=True)
             for t in range(n)]  # fmt: skip
    expected = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert sorted(found) == expected


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_documents_that_fit_stay_whole(lengths: list[int]):
    rows = pack_rows(np.array(lengths), 30)
    assert sorted(rows.length) == sorted(lengths)
    assert not rows.start.any()


@pytest.mark.parametrize(
    ("mean", "sigma", "context"), [(5.5, 1.0, 1024), (7, 1.2, 128), (6, 1, 512)]
)
def test_padding_is_below_three_percent(mean: float, sigma: float, context: int):
    lengths = np.random.default_rng(0).lognormal(mean, sigma, 3000).astype(np.int64) + 1
    assert pack_rows(lengths, context).padding < 0.03


def test_ten_million_tokens_take_seconds():
    lengths = np.random.default_rng(0).lognormal(5, 1, 45_000).astype(np.int64) + 1
    assert lengths.sum() > 10_000_000
    begin = time.process_time()
    pack_rows(lengths, 2048)
    assert time.process_time() - begin < 3


def test_equal_lengths_come_in_an_order_of_the_key():
    lengths = np.full(100, 10)
    one, same, other = (pack_rows(lengths, 40, key).document for key in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()


def test_no_documents_make_no_rows():
    assert pack_rows(np.zeros(0, np.int64), 8).num_rows == 0


def test_scramble_and_permutation_never_change():
    assert [int(x) for x in scramble(1, np.arange(2))] == [
        int(x) for x in scramble(1, np.array([0, 1, 2]))[:2]
    ]
    assert sorted(permutation(5, 50)) == list(range(50))
    assert permutation(7, 8).tolist() == PERMUTATION_OF_8_UNDER_7


# Written down once: a change would silently reorder the data of every resumed run.
PERMUTATION_OF_8_UNDER_7 = [6, 5, 0, 3, 4, 2, 1, 7]
