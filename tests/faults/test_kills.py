"""kill -9 inside every stage, Ctrl-C, and two runs on one folder: the same command goes on.

Every output of every stage but the report must equal an undisturbed run's, bit for bit.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import Forks, Result, output_hashes
from undisturbed import Undisturbed

from phiforge.stages import STAGES


def assert_equal(run: Path, undisturbed: Undisturbed) -> None:
    found = output_hashes(run)
    expected = undisturbed.hashes
    wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    assert not wrong
    assert not list(run.glob("*.partial")) + list(run.glob("*.previous"))
    assert not list(run.rglob("*.tmp"))


def test_the_undisturbed_run_made_what_matters(undisturbed: Undisturbed):
    assert set(undisturbed.operations) == {stage.name for stage in STAGES}
    for name in ("pretrain", "midtrain", "sft", "dpo-pivotal"):
        assert f"{name}/model/model.safetensors" in undisturbed.hashes
    assert (undisturbed.run / "pivotal" / "pairs.jsonl").stat().st_size, "DPO needs pairs"
    assert (
        undisturbed.hashes["sft/model/model.safetensors"]
        != (undisturbed.hashes["dpo-pivotal/model/model.safetensors"])
    )


SHARES = [
    0.5,
    pytest.param(0.05, marks=pytest.mark.slow),
    pytest.param(0.98, marks=pytest.mark.slow),
]
SHARES += [pytest.param(share, marks=pytest.mark.slow) for share in (0.25, 0.75, 0.9)]


@pytest.mark.parametrize("share", SHARES)
def test_a_kill_inside_each_stage_changes_nothing(
    run: Callable[..., Result], undisturbed: Undisturbed, tmp_path: Path, share: float
):
    for stage, operations in undisturbed.operations.items():
        where = {"stage": stage, "operation": max(1, round(share * operations))}
        killed = run(kill_at=where)
        assert killed.code == -9, (where, killed.error)
        # The last operation of all comes after the folder got its name.
        assert list((tmp_path / "micro").glob(f"{stage}*")), where
    assert run().code == 0
    assert_equal(tmp_path / "micro", undisturbed)


def test_a_kill_at_every_step_of_a_stage_changes_nothing(
    run: Callable[..., Result], undisturbed: Undisturbed, tmp_path: Path
):
    """Curate is short, so that each of its durable operations can be the last one, in turn."""
    operation = 0
    while True:
        operation += 1
        result = run("--until", "curate", kill_at={"stage": "curate", "operation": operation})
        if result.code == 0:
            break
        assert result.code == -9, result.error
    assert operation > 3
    made = {k: v for k, v in undisturbed.hashes.items() if k.startswith("curate/")}
    assert output_hashes(tmp_path / "micro") == made


@pytest.mark.slow
def test_a_kill_at_every_third_step_of_a_training_stage_changes_nothing(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed
):
    for operation in range(1, undisturbed.operations["pretrain"], 3):
        at = {"stage": "pretrain", "operation": operation}
        assert run("--rebuild", "pretrain", "--until", "pretrain", kill_at=at).code == -9
        assert run("--rebuild", "pretrain", "--until", "pretrain").code == 0
    assert run().code == 0
    assert_equal(finished, undisturbed)


def test_a_kill_while_the_old_result_is_replaced_keeps_a_whole_one(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed
):
    """--rebuild keeps the old folder until the new one has its name."""
    last = undisturbed.operations["tokenizer"]
    # One more than the first time: the old folder moves aside first.
    for operation in range(last - 3, last + 2):
        run("--rebuild", "tokenizer", kill_at={"stage": "tokenizer", "operation": operation})
        assert run().code == 0
        assert output_hashes(finished) == undisturbed.hashes
    assert run("--rebuild", "tokenizer").code == 0
    assert_equal(finished, undisturbed)


@pytest.mark.parametrize(
    "late", [0, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6, 8))]
)
def test_ctrl_c_exits_130_says_so_and_goes_on(
    run: Callable[..., Result], undisturbed: Undisturbed, tmp_path: Path, late: int
):
    """Also while a checkpoint is written, where torch turns it into an error of its own."""
    for stage in ("curate", "pretrain", "pivotal", "dpo-pivotal")[: 2 if late == 4 else 4]:
        where = {"stage": stage, "operation": undisturbed.operations[stage] // 2 + late}
        stopped = run(interrupt_at=where)
        assert stopped.code == 130, stopped.error
        assert "stopped; the same command goes on from here" in stopped.error
        assert "Traceback" not in stopped.error
    if late != 4:
        assert run().code == 0
        assert_equal(tmp_path / "micro", undisturbed)


def test_the_second_of_two_runs_on_one_folder_is_refused(
    forks: Forks, run: Callable[..., Result], undisturbed: Undisturbed, tmp_path: Path
):
    paused, lock = tmp_path / "paused", tmp_path / "micro" / ".lock"
    inject = {"pause_at": {"stage": "curate", "operation": 2, "file": str(paused)}}
    first = forks.start("run", undisturbed.recipe, "--runs", tmp_path, inject=inject)
    try:
        deadline = time.monotonic() + 60
        while not paused.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for command in (
            ["run", undisturbed.recipe, "--runs", tmp_path],
            ["run", undisturbed.recipe, "--runs", tmp_path, "--rebuild", "curate"],
            ["stage", "curate", "--run", tmp_path / "micro"],
        ):
            second = forks.phiforge(*command)
            assert second.code in (1, 2), second
            if command[0] == "run":
                assert f"{tmp_path / 'micro'} is in use by process {first} since" in second.error
                assert "use another run name" in second.error
        assert lock.read_text().startswith(f"process {first}")
        status = forks.phiforge("status", tmp_path / "micro")
        assert "unfinished" in status.out
    finally:
        forks.kill(first)
    assert run("--until", "curate").code == 0, "a dead process holds no lock"
