"""Training that must stop: damaged checkpoints and numbers that are not finite.

The message names step, last checkpoint and remedy; after it the weights equal an undisturbed run's.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import Result, output_hashes
from undisturbed import Undisturbed


@pytest.fixture
def stopped(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed
) -> tuple[Path, list[Path]]:
    """A run killed in pretraining after two checkpoints; the checkpoints, oldest first."""
    shutil.rmtree(finished / "pretrain")
    at = {"stage": "pretrain", "operation": undisturbed.operations["pretrain"] - 8}
    assert run(kill_at=at).code == -9
    folder = finished / "pretrain.partial" / "state" / "checkpoints"
    checkpoints = sorted(folder.iterdir())
    assert len(checkpoints) == 2
    return finished, checkpoints


def damaging(kind: str, checkpoint: Path) -> Path:
    """Damage a checkpoint; the file that a message must name."""
    tensors = max(checkpoint.iterdir(), key=lambda f: f.stat().st_size)
    if kind == "missing tensors":
        tensors.unlink()
    elif kind == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif kind == "changed byte":
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif kind == "missing loop.json":
        tensors = checkpoint / "loop.json"
        tensors.unlink()
    else:
        tensors = checkpoint / "manifest.json"
        tensors.write_text("{" if kind == "cut manifest" else "[]")
    return tensors


KINDS = ["cut tensors", "missing loop.json", "cut manifest", "other manifest"]


@pytest.mark.parametrize(
    "kind",
    ["changed byte", "missing tensors", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)],
)
def test_a_damaged_newest_checkpoint_is_passed_over_saying_so(
    run: Callable[..., Result],
    stopped: tuple[Path, list[Path]],
    undisturbed: Undisturbed,
    kind: str,
):
    folder, (older, newest) = stopped
    file = damaging(kind, newest)
    result = run("--until", "pretrain")
    assert result.code == 0, result.error
    assert f"checkpoint damaged, trying the one before: {file}" in result.error
    assert f"resumed at step {int(older.name.split('-')[1])}" in result.error
    assert output_hashes(folder) == undisturbed.hashes


def test_when_no_checkpoint_is_whole_every_damage_and_the_remedy_are_named(
    run: Callable[..., Result], stopped: tuple[Path, list[Path]], undisturbed: Undisturbed
):
    folder, checkpoints = stopped
    files = [damaging("missing tensors", checkpoint) for checkpoint in checkpoints]
    result = run()
    assert result.code == 1
    last = result.error.splitlines()[-1]
    assert last.startswith(f"error: no whole checkpoint in {checkpoints[0].parent}")
    assert all(f"{file}: missing" in last for file in files)
    assert f"delete {checkpoints[0].parent} to train this stage from its beginning" in last
    shutil.rmtree(checkpoints[0].parent)
    assert run("--until", "pretrain").code == 0
    assert output_hashes(folder) == undisturbed.hashes


def test_a_checkpoint_cut_while_it_was_written_is_no_checkpoint(
    run: Callable[..., Result], stopped: tuple[Path, list[Path]], undisturbed: Undisturbed
):
    folder, (_, newest) = stopped
    newest.rename(newest.with_name(f"{newest.name}.tmp"))
    assert run("--until", "pretrain").code == 0
    assert output_hashes(folder) == undisturbed.hashes


def test_not_a_number_stops_with_step_checkpoint_and_remedy(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed
):
    shutil.rmtree(finished / "pretrain")
    wild = ("--set", "pretrain.lr=1e30", "--set", "pretrain.dtype=fp32")
    wild += ("--set", "pretrain.warmup_steps=0", "--set", "pretrain.checkpoint_every=1")
    stopped = run("--until", "pretrain", *wild)
    assert stopped.code == 1, stopped
    last = stopped.error[stopped.error.index("error: ") :]
    assert last.startswith("error: step ")
    assert "not a finite number" in last
    assert "Lower lr" in last
    partial = finished / "pretrain.partial"
    checkpoint = last.split("Last checkpoint: ")[1].split(". ")[0]
    assert Path(checkpoint).is_dir(), last
    steps = [json.loads(line)["step"] for line in (partial / "metrics.jsonl").open()]
    assert steps == list(range(1, int(checkpoint[-8:]) + 1))
    again = run("--until", "pretrain", *wild)
    assert again.error[again.error.index("error: ") :] == last, "it stops at the same step"

    mended = run("--until", "pretrain")
    assert mended.code == 0, mended.error
    assert "begun with other settings, so made from its beginning" in mended.error
    assert "config.lr: 1e+30 → 0.004" in mended.error
    assert output_hashes(finished) == undisturbed.hashes
