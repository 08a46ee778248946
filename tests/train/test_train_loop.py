"""The loop: resume is exact, guards act, checkpoints survive damage, a tiny batch is learned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import random_rows, tiny_model

from phiforge.train import checkpoint
from phiforge.train.batch import StepBatch, rows_step
from phiforge.train.guard import TrainingError
from phiforge.train.loop import TrainConfig, train
from phiforge.train.losses import LossSum
from phiforge.train.pretrain import language_model_loss

CONTEXT = 24
SETTINGS = {"lr": 3e-3, "steps": 9, "tokens_per_step": 96, "warmup_steps": 2, "checkpoint_every": 2}


def batch(step: int) -> StepBatch:
    return rows_step(random_rows(seed=step, context=CONTEXT), 48)


def run(stage, batches=batch, loss=language_model_loss, model=None, validate=None, **changes):
    model = model or tiny_model()
    config = TrainConfig(**{**SETTINGS, **changes})
    metrics = train(
        model,
        config,
        config.steps,
        batches,
        loss,
        stage,
        context=CONTEXT,
        planned_tokens=config.steps * config.tokens_per_step,
        validate=validate,
    )
    return model, metrics


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def interrupted_at(step: int):
    def batches(n: int) -> StepBatch:
        if n == step:
            raise KeyboardInterrupt
        return batch(n)

    return batches


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("at", [1, 5])
def test_resumed_equals_straight(stage, dtype: str, at: int) -> None:
    straight, first = run(stage("straight"), dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(stage("resumed"), interrupted_at(at), dtype=dtype)
    resumed, second = run(stage("resumed"), dtype=dtype)
    assert_same_bits(weights(straight), weights(resumed))
    for key in ("loss", "steps", "tokens", "flops", "skipped_steps"):
        assert first[key] == second[key]
    lines = [
        [json.loads(line) for line in (stage(n).path / "metrics.jsonl").read_text().splitlines()]
        for n in ("straight", "resumed")
    ]
    for a, b in zip(*lines, strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}
    assert lines[0][0].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"}


_CHILD = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from phiforge.core.config import Exec
from phiforge.core.store import StageDir
import test_train_loop as t
out = StageDir.scratch(Path(sys.argv[1]), Exec(device="cpu", threads=1, compile="off"))
model, _ = t.run(out, steps=int(sys.argv[2]))
torch.save(t.weights(model), out.path / "weights.pt")
"""


@pytest.mark.slow
def test_kill_9_then_rerun_equals_straight(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    steps = "60"

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", _CHILD.format(paths=paths), str(tmp_path / name), steps]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    assert start("straight").wait() == 0
    killed = 0
    for wait_for in (4, 20, 40):
        child = start("killed")
        folder = tmp_path / "killed" / "state" / "checkpoints"
        while child.poll() is None and not any(
            int(path.name[5:13]) >= wait_for for path in folder.glob("step-*")
        ):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    assert killed
    assert start("killed").wait() == 0
    a, b = (
        torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("straight", "killed")
    )
    assert_same_bits(a, b)


def test_only_two_checkpoints_are_kept(stage) -> None:
    out = stage()
    run(out)
    found = checkpoint.checkpoints(out.state / "checkpoints")
    assert [p.name for p in found] == ["step-00000008", "step-00000009"]
    assert all(checkpoint.damage(p) is None for p in found)


def test_damaged_checkpoint_falls_back_and_says_so(stage, capsys) -> None:
    straight, _ = run(stage("straight"))
    out = stage("damaged")
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupted_at(7))
    newest = checkpoint.checkpoints(out.state / "checkpoints")[-1]
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    resumed, _ = run(stage("damaged"))
    printed = capsys.readouterr().err
    assert f"{data}: its bytes changed" in printed
    assert "resumed at step 4" in printed
    assert_same_bits(weights(straight), weights(resumed))


def test_no_whole_checkpoint_is_an_error(stage) -> None:
    out = stage()
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupted_at(5))
    first, second = checkpoint.checkpoints(out.state / "checkpoints")
    next(first.glob("*.distcp")).unlink()
    (second / "loop.json").write_text("{")
    with pytest.raises(ValueError, match=r"no whole checkpoint.*loop\.json.*missing.*delete"):
        run(stage())


def test_unfinished_checkpoint_is_ignored(stage) -> None:
    out = stage()
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupted_at(5))
    leftover = out.state / "checkpoints" / "step-00000006.tmp"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    straight, _ = run(stage("straight"))
    resumed, _ = run(stage())
    assert not leftover.exists()
    assert_same_bits(weights(straight), weights(resumed))


def test_full_disk_names_file_and_remedy(stage, monkeypatch) -> None:
    out = stage()
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupted_at(3))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(TrainingError, match=r"step-00000004: .*No space left.*step-00000002"):
        run(stage())
    monkeypatch.undo()
    straight, _ = run(stage("straight"))
    resumed, _ = run(stage())
    assert_same_bits(weights(straight), weights(resumed))


def test_other_settings_are_refused(stage) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stage(), interrupted_at(5))
    with pytest.raises(ValueError, match=r"other settings:\n  lr: 0\.003 → 0\.004"):
        run(stage(), lr=4e-3)


def test_nan_stops_before_the_step(stage) -> None:
    model = tiny_model()

    def loss(m, part) -> LossSum:
        found = language_model_loss(m, part)
        return LossSum(found.total * (float("nan") if stage_step["n"] == 5 else 1.0))

    stage_step = {"n": -1}

    def batches(step: int) -> StepBatch:
        stage_step["n"] = step
        stage_step["before"] = weights(model)
        return batch(step)

    with pytest.raises(TrainingError, match=r"step 5: loss nan.*step-00000004.*Lower lr"):
        run(stage(), batches, loss, model)
    assert_same_bits(stage_step["before"], weights(model))


def test_spike_is_skipped_and_logged(stage, capsys) -> None:
    rows = random_rows(context=CONTEXT, masked=False)
    scale = {"now": 1.0}

    def batches(step: int) -> StepBatch:
        scale["now"] = 50.0 if step == 40 else 1.0
        return rows_step(rows, 96)

    def loss(m, part) -> LossSum:
        return LossSum(language_model_loss(m, part).total * scale["now"])

    out = stage()
    _, metrics = run(out, batches, loss, steps=45, lr=1e-5, checkpoint_every=100)
    assert metrics["skipped_steps"] == 1
    lines = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [41]
    assert "step 41 skipped" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_overfits_a_tiny_batch(stage, dtype: str) -> None:
    rows = random_rows(num_rows=2, context=CONTEXT, masked=False)
    out = stage()
    changes = {"dtype": dtype, "steps": 60, "lr": 1e-2, "checkpoint_every": 60}
    _, metrics = run(out, lambda step: rows_step(rows, 96), **changes)
    last = json.loads((out.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < 0.1
    assert metrics["tokens"] == 60 * 48
    assert metrics["flops"] > 0


def test_validation_is_logged_and_returned(stage) -> None:
    out = stage()
    calls = []

    def validate(model) -> dict[str, float]:
        calls.append(torch.is_grad_enabled())
        return {"validation_loss": 1.5}

    _, metrics = run(out, validate=validate, validate_every=4)
    assert metrics["validation_loss"] == 1.5
    lines = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8, 9]
    assert calls == [False] * 3


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CXX") == "none", reason="no C++ compiler")
def test_compiled_trains_and_resumes(stage) -> None:
    straight, _ = run(stage("straight", compile="on"), steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(stage("resumed", compile="on"), interrupted_at(3), steps=4)
    resumed, metrics = run(stage("resumed", compile="off"), steps=4)
    assert metrics["compiled"]
    assert_same_bits(weights(straight), weights(resumed))
    eager, _ = run(stage("eager"), steps=4)
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(straight)[name], value, rtol=0.1, atol=2e-2)
