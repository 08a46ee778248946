"""The curate, tokenizer and pack stages together: from files to shards a loader reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from phiforge.core.config import Exec
from phiforge.core.records import Chat, Document, read_records, write_records
from phiforge.core.store import StageDir
from phiforge.data import curate, pack, vocabulary
from phiforge.data.loader import Loader, validation_sources
from phiforge.data.mixture import MixturePart
from phiforge.data.shards import open_shard
from phiforge.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished curate, synthesize (by hand), tokenizer and pack."""
    root = tmp_path_factory.mktemp("run")
    raw = root / "raw"
    for name, count in (("texts", 40), ("code", 12)):
        (raw / name).mkdir(parents=True)
        for number in range(count):
            text = f"{name} {number}: the value of {number} and {number * 7} is known. " * 4
            (raw / name / f"{number:03}.txt").write_text(text)
    (raw / "texts" / "again.txt").write_bytes((raw / "texts" / "005.txt").read_bytes())
    (raw / "texts" / "short.txt").write_text("short")
    (raw / "texts" / "z.txt").write_bytes(b"a\0b")
    config = curate.CurateConfig.model_validate(
        {
            "sources": [
                {"name": "texts", "path": raw / "texts", "on_error": "skip"},
                {"name": "code", "path": raw / "code", "licence": "MIT"},
            ],
            "validation_fraction": 0.1,
        }
    )
    curate.run(config, {}, StageDir.scratch(root / "curate"))
    made = [
        Document(id=f"w{n}", text=f"Q {n} A {n}", metadata={"source": "worked"}) for n in range(9)
    ]
    long = [Document(id=f"l{n}", text="long " * 200, metadata={"source": "long"}) for n in range(3)]
    chats = [
        Chat(id=f"c{n}", messages=[{"role": "user", "content": f"{n}?"},
                                   {"role": "assistant", "content": "<|im_end|> 42"}])
        for n in range(4)
    ]  # fmt: skip
    write_records(root / "synthesize" / "documents.jsonl", made)
    write_records(root / "synthesize" / "long_documents.jsonl", long)
    write_records(root / "synthesize" / "chats.jsonl", chats)
    inputs = {name: root / name for name in ("curate", "synthesize")}
    settings = vocabulary.TokenizerConfig(vocab_size=400)
    vocabulary.run(settings, inputs, StageDir.scratch(root / "tokenizer"))
    inputs["tokenizer"] = root / "tokenizer"
    pack.run(pack.PackConfig(), inputs, StageDir.scratch(root / "pack"))
    return root


def test_curate_keeps_and_drops_with_reasons(run: Path):
    kept = list(read_records(run / "curate" / "documents.jsonl", Document))
    assert len(kept) == len({document.id for document in kept}) == 52
    assert {document.metadata["source"] for document in kept} == {"texts", "code"}
    dropped = list(read_records(run / "curate" / "dropped.jsonl", Document))
    assert {document.metadata["reason"] for document in dropped} == {
        "too short",
        "duplicate",
        "unusable",
    }
    unusable = next(d for d in dropped if d.metadata["reason"] == "unusable")
    assert unusable.metadata["where"] == "z.txt"
    assert "binary" in unusable.metadata["error"]


def test_each_source_holds_documents_out_whatever_the_seed(run: Path):
    kept = list(read_records(run / "curate" / "documents.jsonl", Document))
    for source in ("texts", "code"):
        own = [d for d in kept if d.metadata["source"] == source]
        held_out = [d for d in own if d.metadata["split"] == "validation"]
        assert 1 <= len(held_out) < len(own) / 2
    assert validation_sources(run / "pack") == ["code", "texts"]


def test_curate_gives_the_same_bytes_with_any_number_of_workers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(curate, "_BYTES_PER_WORKER", 1)
    config = curate.CurateConfig.model_validate(
        {"sources": [{"name": "texts", "path": run / "raw" / "code"}]}
    )
    for workers in (1, 2):
        out = StageDir.scratch(tmp_path / str(workers), Exec(workers=workers))
        curate.run(config, {}, out)
    one, two = (tmp_path / name / "documents.jsonl" for name in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()


def test_curate_refuses_a_source_without_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    config = curate.CurateConfig.model_validate({"sources": [{"name": "a", "path": tmp_path}]})
    with pytest.raises(ValueError, match="source 'a': no document is left"):
        curate.run(config, {}, StageDir.scratch(tmp_path / "out"))
    with pytest.raises(ValidationError, match="two sources are named 'a'"):
        curate.CurateConfig.model_validate({"sources": [{"name": "a", "path": "x"}] * 2})


def test_shards_hold_the_documents_and_their_ends(run: Path):
    tokenizer = Tokenizer.load(run / "tokenizer")
    shard = open_shard(run / "pack" / "worked")
    assert shard.document_ids() == [f"w{n}" for n in range(9)]
    for number in range(9):
        ids = shard.tokens[shard.offsets[number] : shard.offsets[number + 1]].tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids) == f"Q {number} A {number}"
    plan = json.loads((run / "pack" / "mixture.json").read_text())
    assert set(plan["sources"]) == {"texts", "code", "worked", "long_documents", "chats"}
    texts = plan["sources"]["texts"]
    kept = list(read_records(run / "curate" / "documents.jsonl", Document))
    own = [document for document in kept if document.metadata["source"] == "texts"]
    counted = texts["train"]["num_documents"] + texts["validation"]["num_documents"]
    assert counted == len(own)
    assert texts["train"]["num_bytes"] + texts["validation"]["num_bytes"] == sum(
        len(document.text.encode()) for document in own
    )


def test_chats_are_packed_with_their_masks(run: Path):
    tokenizer = Tokenizer.load(run / "tokenizer")
    shard = open_shard(run / "pack" / "chats")
    assert shard.mask is not None
    learned = np.asarray(shard.tokens)[np.asarray(shard.mask) == 1]
    assert tokenizer.decode(learned.tolist(), skip_special=False) == "<|im_end|> 42<|im_end|>" * 4
    assert (learned == tokenizer.eos_id).sum() == 4
    loader = Loader(run / "pack", 64, 64, 2, [MixturePart("chats", 1)])
    assert loader.batch(0).num_targets > 0


def test_pack_gives_the_same_bytes_with_any_number_of_workers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "_CHARACTERS_PER_WORKER", 1)
    monkeypatch.setattr(pack, "_BATCH_CHARACTERS", 2000)
    inputs = {name: run / name for name in ("curate", "synthesize", "tokenizer")}
    pack.run(pack.PackConfig(), inputs, StageDir.scratch(tmp_path / "pack", Exec(workers=2)))
    for file in sorted((run / "pack").rglob("*")):
        if file.is_file() and file.name != "metrics.jsonl":
            assert (
                file.read_bytes()
                == (tmp_path / "pack" / file.relative_to(run / "pack")).read_bytes()
            )


def test_pack_takes_further_files_and_refuses_doubles(run: Path, tmp_path: Path):
    write_records(tmp_path / "own.jsonl", [Document(id="a", text="own text")])
    inputs = {"tokenizer": run / "tokenizer", "synthesize": run / "synthesize"}
    config = pack.PackConfig.model_validate(
        {"files": [{"name": "own", "path": tmp_path / "own.jsonl"}]}
    )
    metrics = pack.run(config, inputs, StageDir.scratch(tmp_path / "a"))
    assert metrics["sources"]["own"]["documents"] == 1
    config = pack.PackConfig.model_validate(
        {"files": [{"name": "worked", "path": tmp_path / "own.jsonl"}]}
    )
    with pytest.raises(ValueError, match="source 'worked' of record 'a' is also in"):
        pack.run(config, inputs, StageDir.scratch(tmp_path / "b"))


def test_pack_names_what_is_missing(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer"):
        pack.run(pack.PackConfig(), {}, StageDir.scratch(tmp_path / "a"))
    with pytest.raises(ValueError, match="nothing to pack"):
        pack.run(pack.PackConfig(), {"tokenizer": run / "tokenizer"}, StageDir.scratch(tmp_path))


def test_the_tokenizer_stage_adopts_a_folder(run: Path, tmp_path: Path):
    config = vocabulary.TokenizerConfig(folder=run / "tokenizer")
    metrics = vocabulary.run(config, {}, StageDir.scratch(tmp_path / "t"))
    assert metrics["vocab_size"] == 400
    assert Tokenizer.load(tmp_path / "t").encode("99") == Tokenizer.load(run / "tokenizer").encode(
        "99"
    )
    with pytest.raises(ValidationError, match="vocab_size: has no effect on a finished tokenizer"):
        vocabulary.TokenizerConfig(folder=run / "tokenizer", vocab_size=400)


def test_the_tokenizer_stage_samples_and_needs_text(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no text to train on"):
        vocabulary.run(vocabulary.TokenizerConfig(), {}, StageDir.scratch(tmp_path / "t"))
    config = vocabulary.TokenizerConfig(vocab_size=370, max_characters=3000)
    metrics = vocabulary.run(config, {"curate": run / "curate"}, StageDir.scratch(tmp_path / "u"))
    assert 3000 <= metrics["trained_characters"] < 4000
