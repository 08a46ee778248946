"""The loader: a pure function of (seed, step) that gives each token its share and its epochs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.data.loader import (
    IGNORE,
    Loader,
    steps_per_epoch,
    validation_batches,
    validation_sources,
)
from phiforge.data.mixture import MixturePart, Schedule, combine
from phiforge.data.shards import Packed, open_shard, write_shard

EOD, PAD = 0, 1
META = {"eod_id": EOD, "pad_id": PAD, "vocab_size": 10_000}


def write(folder: Path, lengths: list[int], kind: str = "documents", first: int = 2) -> Path:
    """A shard whose tokens are all different, so that each can be followed."""
    documents = []
    for number, length in enumerate(lengths):
        ids = [*range(first, first + length - 1), EOD]
        first += length - 1
        mask = [0] * (length // 2) + [1] * (length - length // 2)
        documents.append(Packed(f"d{number}", ids, mask if kind == "chats" else None, length))
    write_shard(folder, documents, {**META, "kind": kind})
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    rng = np.random.default_rng(0)
    write(folder / "docs", (rng.lognormal(3.5, 1, 150).astype(int) + 2).tolist())
    write(folder / "code", (rng.lognormal(3, 1, 90).astype(int) + 2).tolist(), first=20_000)
    write(folder / "long", [40, 70, 90, 130, 200, 260, 300], first=40_000)
    write(folder / "chats", [6, 9, 20, 31, 33, 60], kind="chats", first=60_000)
    write(folder / "docs" / "validation", [30, 50, 10], first=80_000)
    return folder


def same(a: object, b: object) -> bool:
    names = ("token_ids_bt", "targets_bt", "documents_bt", "positions_bt")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


MIXTURE = [MixturePart("docs", 0.7), MixturePart("code", 0.3)]


def test_shapes_and_types(pack: Path):
    batch = Loader(pack, 32, 256, 5, MIXTURE).batch(0)
    assert batch.token_ids_bt.shape == batch.targets_bt.shape == (8, 32)
    assert batch.token_ids_bt.dtype == batch.targets_bt.dtype == torch.int64
    assert batch.documents_bt.dtype == torch.int32
    assert batch.num_targets == int((batch.targets_bt != IGNORE).sum())
    padding = batch.documents_bt == -1
    assert (batch.token_ids_bt[padding] == PAD).all()
    assert (batch.targets_bt[padding] == IGNORE).all()


@pytest.mark.parametrize("source", ["docs", "code", "long"])
def test_an_epoch_holds_every_token_once_as_input_and_target(pack: Path, source: str):
    steps = steps_per_epoch(pack, source, 32, 32, seed=3)
    loader = Loader(pack, 32, 32, steps, [MixturePart(source, 1)], seed=3)
    inputs: Counter[int] = Counter()
    targets: Counter[int] = Counter()
    for step in range(steps):
        batch = loader.batch(step)
        inputs.update(batch.token_ids_bt[batch.documents_bt >= 0].tolist())
        targets.update(batch.targets_bt[batch.targets_bt != IGNORE].tolist())
    shard = open_shard(pack / source)
    assert inputs == Counter(shard.tokens.tolist())
    firsts = Counter(shard.tokens[shard.offsets[:-1]].tolist())
    assert targets == inputs - firsts


def test_pieces_never_cross_documents(pack: Path):
    shard = open_shard(pack / "docs")
    starts = set(shard.tokens[shard.offsets[:-1]].tolist())
    loader = Loader(pack, 32, 256, 20, [MixturePart("docs", 1)])
    for step in range(20):
        batch = loader.batch(step)
        for tokens, targets, documents, positions in zip(
            batch.token_ids_bt.tolist(), batch.targets_bt.tolist(), batch.documents_bt.tolist(),
            batch.positions_bt.tolist(), strict=True,
        ):  # fmt: skip
            for t, token in enumerate(tokens):
                if documents[t] < 0:
                    continue
                begins = t == 0 or documents[t] != documents[t - 1]
                assert positions[t] == (0 if begins else positions[t - 1] + 1)
                assert begins or token not in starts
                assert (targets[t] == IGNORE) == (token == EOD)
                if not begins:
                    assert targets[t - 1] == token


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 39), seed=st.integers(0, 3), world=st.sampled_from([1, 2, 4, 8]))
def test_a_batch_is_a_function_of_seed_and_step(pack: Path, step: int, seed: int, world: int):
    straight = Loader(pack, 32, 256, 40, MIXTURE, seed)
    for earlier in range(0, step, 7):
        straight.batch(earlier)
    batch = straight.batch(step)
    # Another loader, no history, more steps to come: the same bits; ranks share its rows out.
    fresh = Loader(pack, 32, 256, 90, MIXTURE, seed)
    assert same(fresh.batch(step), batch)
    parts = [fresh.batch(step, rank, world) for rank in range(world)]
    assert sum(part.num_targets for part in parts) == batch.num_targets
    for rank, part in enumerate(parts):
        assert torch.equal(part.token_ids_bt, batch.token_ids_bt[rank::world])


def test_seeds_and_steps_differ(pack: Path):
    loader = Loader(pack, 32, 256, 10, MIXTURE)
    assert not same(loader.batch(0), loader.batch(1))
    assert not same(loader.batch(0), Loader(pack, 32, 256, 10, MIXTURE, seed=1).batch(0))


def test_rows_do_not_depend_on_the_step_they_are_cut_into(pack: Path):
    one = Schedule([0.7, 0.3], 64, 10, 5)
    other = Schedule([0.7, 0.3], 64, 3, 5)
    assert np.array_equal(one.rows(0, 192), other.rows(0, 192))
    whole = np.stack(one.rows(0, 192), 1)
    parts = np.concatenate([np.stack(one.rows(a, a + 24), 1) for a in range(0, 192, 24)])
    assert np.array_equal(whole, parts)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.01),
    rows=st.integers(1, 100),
    steps=st.integers(1, 60),
)
def test_each_source_is_within_a_block_of_its_share(weights: list[float], rows: int, steps: int):
    schedule = Schedule(weights, rows, steps, 0)
    total = steps * rows
    counts = schedule.drawn(total)
    assert counts.sum() == total
    wanted = np.array(weights) / sum(weights) * total
    assert (np.abs(counts - wanted) <= schedule.block_rows).all()
    source, draw = schedule.rows(0, total)
    for number, count in enumerate(counts):
        assert draw[source == number].tolist() == list(range(count))


def test_planned_and_drawn_tokens(pack: Path):
    loader = Loader(pack, 32, 512, 64, MIXTURE)
    drawn: Counter[str] = Counter()
    for step in range(64):
        batch = loader.batch(step)
        tokens = batch.token_ids_bt[batch.documents_bt >= 0]
        starts = [0, 20_000]
        for name, low, high in zip(("docs", "code"), starts, (20_000, 40_000), strict=True):
            drawn[name] += int(((tokens >= max(low, 2)) & (tokens < high)).sum())
    table = {row["source"]: row for row in loader.drawn()}
    block_tokens = loader.schedule.block_rows * 32
    for name, row in table.items():
        num_ends = row["drawn_tokens"] - drawn[name]  # end tokens belong to no one source here
        assert 0 <= num_ends < 0.1 * row["drawn_tokens"]
        assert abs(row["planned_tokens"] - row["drawn_tokens"]) < block_tokens
        assert row["epochs"] == pytest.approx(row["drawn_tokens"] / row["unique_tokens"])
    total = sum(row["drawn_tokens"] for row in table.values())
    assert table["docs"]["drawn_tokens"] / total == pytest.approx(0.7, abs=0.02)
    assert sum(row["drawn_tokens"] for row in loader.drawn(1)) <= 512


def test_long_documents_are_filtered_and_upweighted(pack: Path):
    part = MixturePart("long", 1, min_tokens=100, upweight_from_tokens=250, upweight=3)
    row = Loader(pack, 512, 512, 4, [part]).drawn()[0]
    assert row["unique_tokens"] == 130 + 200 + 260 + 300
    assert row["epoch_tokens"] == 130 + 200 + 3 * (260 + 300)
    with pytest.raises(ValueError, match="none of its 7 documents has at least 900"):
        Loader(pack, 512, 512, 4, [MixturePart("long", 1, min_tokens=900)])


def test_a_fractional_upweight_is_right_on_average(tmp_path: Path):
    write(tmp_path / "long", [50] * 1000)
    part = MixturePart("long", 1, upweight_from_tokens=50, upweight=1.5)
    row = Loader(tmp_path, 64, 64, 4, [part]).drawn()[0]
    assert row["epoch_tokens"] / row["unique_tokens"] == pytest.approx(1.5, abs=0.05)


def test_combine_gives_groups_their_shares():
    parts = combine([(0.3, [MixturePart("long", 5, min_tokens=9)]), (0.7, MIXTURE)])
    assert [(p.source, round(p.share, 6)) for p in parts] == [
        ("long", 0.3),
        ("docs", 0.49),
        ("code", 0.21),
    ]
    assert parts[0].min_tokens == 9


def test_chats_learn_only_masked_tokens_and_stay_whole(pack: Path):
    steps = steps_per_epoch(pack, "chats", 32, 32)
    loader = Loader(pack, 32, 32, steps, [MixturePart("chats", 1)])
    shard = open_shard(pack / "chats")
    assert shard.mask is not None
    targets: Counter[int] = Counter()
    for step in range(steps):
        batch = loader.batch(step)
        targets.update(batch.targets_bt[batch.targets_bt != IGNORE].tolist())
    kept = shard.offsets[4]  # the last two are longer than 32 and left out
    learned = shard.tokens[:kept][shard.mask[:kept] == 1]
    assert targets == Counter(learned.tolist())
    assert loader.parts[0].dropped_documents == 2


def test_validation_walks_each_token_once(pack: Path):
    assert validation_sources(pack) == ["docs"]
    batches = list(validation_batches(pack, 32, 64))
    assert {source for source, _ in batches} == {"docs"}
    seen = sum(int((batch.documents_bt >= 0).sum()) for _, batch in batches)
    assert seen == 90
    assert len(list(validation_batches(pack, 32, 64, max_batches=1))) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((32, 100, 5, MIXTURE), "tokens_per_step: 100 is no multiple of context 32; try 96"),
        ((32, 64, 0, MIXTURE), "steps: 0 is below 1"),
        ((1, 64, 5, MIXTURE), "context: 1 is below 2"),
        ((32, 64, 5, [MixturePart("none", 1)]), "packed sources are chats, code, docs, long"),
        ((32, 64, 5, [MixturePart("docs", 0)]), "no part has a share above 0"),
    ],
)
def test_mistakes_are_named(pack: Path, arguments: tuple, error: str):
    with pytest.raises(ValueError, match=error):
        Loader(pack, *arguments)


def test_steps_and_ranks_out_of_range(pack: Path):
    loader = Loader(pack, 32, 96, 5, MIXTURE)
    with pytest.raises(IndexError, match=r"step 5 is outside 0\.\.4"):
        loader.batch(5)
    with pytest.raises(ValueError, match="3 rows per step do not divide among 2 ranks"):
        loader.batch(0, 0, 2)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.parquet", "mask.bin", "meta.json"])
def test_a_truncated_shard_is_found_on_opening(tmp_path: Path, name: str):
    write(tmp_path / "chats", [10, 20], kind="chats")
    path = tmp_path / "chats" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{name}: .*--rebuild pack"):
        Loader(tmp_path, 32, 32, 1, [MixturePart("chats", 1)])
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: .*--rebuild pack"):
        open_shard(tmp_path / "chats")


def test_document_ids_and_offsets_are_kept(pack: Path):
    shard = open_shard(pack / "long")
    assert shard.document_ids() == [f"d{number}" for number in range(7)]
    assert shard.lengths.tolist() == [40, 70, 90, 130, 200, 260, 300]
    assert shard.offsets.dtype == np.int64
