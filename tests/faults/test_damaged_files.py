"""Damaged run folders: every message names the file and the remedy, and the remedy works.

After it, a run ends with the same bytes as one that nothing disturbed.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from micro import Forks, Result, output_hashes
from undisturbed import Undisturbed


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scribble(file: Path) -> None:
    """Other bytes, same length."""
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut manifest": ("pretrain/manifest.json", truncate, "damaged manifest"),
    "empty manifest": ("curate/manifest.json", empty, "damaged manifest"),
    "binary manifest": ("sft/manifest.json", scribble, "damaged manifest"),
    "no manifest": ("tokenizer/manifest.json", Path.unlink, "is missing although"),
    "cut tokens": ("pack/problems/tokens.bin", truncate, "bytes, but its manifest says"),
    "cut mask": ("pack/chats/mask.bin", truncate, "bytes, but its manifest says"),
    "no offsets": ("pack/docs/documents.parquet", Path.unlink, "missing output of stage pack"),
    "no weights": ("pretrain/model/model.safetensors", Path.unlink, "missing output of stage"),
    "cut weights": ("midtrain/model/model.safetensors", truncate, "truncated or changed"),
    "no config": ("sft/model/config.json", Path.unlink, "missing output of stage sft"),
    "cut tokenizer": ("tokenizer/tokenizer.json", truncate, "truncated or changed"),
    "cut pairs": ("pivotal/pairs.jsonl", truncate, "truncated or changed"),
    "cut documents": ("synthesize/documents.jsonl", truncate, "truncated or changed"),
    "no transcripts": ("evaluate/transcripts/sft.jsonl", Path.unlink, "missing output"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_mended(
    forks: Forks,
    run: Callable[..., Result],
    finished: Path,
    undisturbed: Undisturbed,
    name: str,
):
    path, damage, message = DAMAGES[name]
    stage = path.split("/")[0]
    damage(finished / path)
    stopped = run()
    assert stopped.code == 1, stopped
    assert stopped.error.splitlines()[-1].startswith(f"error: {finished / path}")
    assert message in stopped.error
    assert f"run again with --rebuild {stage}" in stopped.error
    if stage in ("curate", "evaluate"):
        # Others take longer; what the remedy does is the same for every stage.
        status = forks.phiforge("status", finished)
        assert status.code == 1
        assert "damaged" in status.out
        assert run("--rebuild", stage).code == 0
        assert output_hashes(finished) == undisturbed.hashes
        assert forks.phiforge("status", finished, "--verify").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    ["synthesize", "tokenizer", "pack", "pretrain", "midtrain", "sft", "pivotal", "dpo-pivotal"],
)
def test_a_rebuilt_stage_comes_out_the_same_and_nothing_after_it_runs(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed, stage: str
):
    (finished / stage / "manifest.json").write_text("{")
    later = {f: f.stat().st_mtime_ns for f in finished.glob("*/manifest.json")}
    assert run().code == 1
    result = run("--rebuild", stage)
    assert result.code == 0, result.error
    assert output_hashes(finished) == undisturbed.hashes
    changed = {f.parent.name for f, time in later.items() if f.stat().st_mtime_ns != time}
    assert changed == {stage}


def test_bytes_that_changed_in_place_are_found_by_verify(forks: Forks, finished: Path):
    scribble(finished / "pack" / "problems" / "tokens.bin")
    assert forks.phiforge("status", finished).code == 0, "sizes alone are right"
    status = forks.phiforge("status", finished, "--verify")
    assert status.code == 1
    shown = "".join(status.out.split())
    assert "pack/problems/tokens.bin:itscontentschanged" in shown
    assert "--rebuildpack" in shown


ADOPTED = {
    "cut weights": ("midtrain", "model/model.safetensors", truncate, "truncated or damaged"),
    "no weights": ("midtrain", "model/model.safetensors", Path.unlink, "neither model.safetensors"),
    "no config": ("midtrain", "model/config.json", Path.unlink, "holds no model"),
    "cut config": ("midtrain", "model/config.json", truncate, "config.json"),
    "cut tokenizer": ("midtrain", "model/tokenizer.json", truncate, "tokenizer.json"),
    "no tokenizer": ("midtrain", "model/tokenizer.json", Path.unlink, "tokenizer.json"),
    "cut tokens": ("pack", "chats/tokens.bin", truncate, "the shard was cut short or changed"),
    "no tokens": ("pack", "chats/tokens.bin", Path.unlink, "the shard was cut short or changed"),
    "no mask": ("pack", "chats/mask.bin", Path.unlink, "the shard was cut short or changed"),
    "cut meta": ("pack", "chats/meta.json", truncate, "the shard was cut short or changed"),
    "cut offsets": ("pack", "chats/documents.parquet", truncate, "the shard was cut short or"),
    "binary offsets": ("pack", "chats/documents.parquet", scribble, "the shard was cut short or"),
}


@pytest.mark.parametrize("name", ADOPTED)
def test_a_stage_on_a_damaged_folder_of_ones_own_names_the_file(
    forks: Forks, finished: Path, tmp_path: Path, name: str
):
    """Folders given by hand have no manifest that would find it first."""
    stage, path, damage, message = ADOPTED[name]
    for manifest in (finished / "midtrain", finished / "pack"):
        (manifest / "manifest.json").unlink()
    damage(finished / stage / path)
    inputs = [f"--input={s}={finished / s}" for s in ("pack", "tokenizer", "midtrain")]
    settings = ["--set", "context=256", "--set", "tokens_per_step=1024"]
    result = forks.phiforge("stage", "sft", "--run", tmp_path / "own", *inputs, *settings)
    assert result.code == 1, result
    assert "Traceback" not in result.error
    last = result.error[result.error.index("error: ") :]
    assert message in last
    assert str(finished / stage / Path(path).parent) in last
