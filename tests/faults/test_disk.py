"""Full disks, limits and read-only folders: the file is named, and with room the run goes on.

What was made before is kept; the end is bit-identical to an undisturbed run.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import HERE, Forks, Result, output_hashes
from undisturbed import Undisturbed

from phiforge.core import store
from phiforge.core.files import write_json


def can_mount() -> bool:
    """Whether this user may mount a small disk in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=16k", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this user may not mount a disk (unshare -rm)")
def test_a_disk_that_fills_again_and_again_loses_nothing(undisturbed: Undisturbed, tmp_path: Path):
    command = ["unshare", "-rm", sys.executable, str(HERE / "growing_disk.py")]
    command += [str(tmp_path), str(undisturbed.recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["stops"]) > 5
    stages = set()
    for stop in found["stops"]:
        assert stop["code"] == 1, stop
        assert "Traceback" not in stop["error"], stop["error"]
        last = stop["error"][stop["error"].rindex("error: ") :]
        assert re.search(r"disk is full|No space left on device", last), last
        named = re.search(re.escape(str(tmp_path)) + r"/micro(/\S+)?", last)
        assert named, last
        assert re.search(r"Free (some|disk) space", last), last
        stages.add(named[0].removeprefix(f"{tmp_path}/micro").split("/")[1:2][0].split(".")[0])
    assert len(stages) >= 3, stages
    assert found["hashes"] == undisturbed.hashes


@pytest.mark.parametrize(
    "kilobytes", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (8, 40)), 120]
)
def test_files_that_may_not_grow_stop_the_run_with_their_name(
    run: Callable[..., Result], undisturbed: Undisturbed, tmp_path: Path, kilobytes: int
):
    """RLIMIT_FSIZE stops Python, C++ and Rust writers alike, for root too."""
    stopped = run(limit_file_size={"num_bytes": 1024 * kilobytes})
    assert stopped.code == 1, stopped
    assert "Traceback" not in stopped.error, stopped.error
    last = stopped.error[stopped.error.rindex("error: ") :]
    assert str(tmp_path / "micro") in last
    checkpoint = r"cannot write checkpoint .*: File too large. .* then run again: it goes on from"
    file = r"larger than this file system or `ulimit -f` allows. Raise .* run the same command"
    assert re.search(f"{checkpoint}|{file}", last), last
    if kilobytes in (8, 40):
        assert run().code == 0
        assert output_hashes(tmp_path / "micro") == undisturbed.hashes


def test_a_disk_that_fills_while_the_manifest_is_written_keeps_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hours of training may lie in the state: it goes only when the stage is whole."""

    def work(out: store.StageDir) -> dict[str, bool]:
        resumed = (out.state / "checkpoint").exists()
        (out.state / "checkpoint").write_text("hours of work")
        (out.path / "model").write_text("weights")
        return {"resumed": resumed}

    def full(path: Path, value: object) -> None:
        if path.name == store.MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    request = store.Request("train", 1, {})
    with store.open_run(tmp_path) as run:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json", full)
            with pytest.raises(OSError, match="No space left"):
                run.stage(request, work, {})
        manifest = run.stage(request, work, {})
    assert manifest["metrics"] == {"resumed": True}
    assert [row["path"] for row in manifest["outputs"]] == ["model"]
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["manifest.json", "model"]


def test_a_read_only_run_folder_is_named(
    run: Callable[..., Result], finished: Path, undisturbed: Undisturbed
):
    shutil.rmtree(finished / "report")
    shutil.rmtree(finished / "evaluate")
    finished.chmod(0o555)
    try:
        for lock_is_there in (True, False):
            if not lock_is_there:
                finished.chmod(0o755)
                (finished / ".lock").unlink(missing_ok=True)
                finished.chmod(0o555)
            stopped = run(obey_permissions={})
            assert stopped.code == 1, stopped
            assert stopped.error.splitlines()[-1].startswith(f"error: {finished}/"), stopped.error
            assert "Permission denied" in stopped.error
            assert "--runs" in stopped.error
    finally:
        finished.chmod(0o755)
    assert run().code == 0
    assert output_hashes(finished) == undisturbed.hashes


def test_a_read_only_runs_folder_is_named(run: Callable[..., Result], tmp_path: Path):
    tmp_path.chmod(0o555)
    stopped = run(obey_permissions={})
    tmp_path.chmod(0o755)
    assert stopped.code == 1
    assert f"error: {tmp_path / 'micro'}: no permission (Permission denied)" in stopped.error


def test_reading_commands_work_on_a_read_only_run(forks: Forks, finished: Path, undisturbed):
    folders = [finished, *(p for p in finished.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        readers = (
            ["status", finished, "--verify"],
            ["explain", undisturbed.recipe, "--runs", finished.parent],
        )
        for command in readers:
            result = forks.phiforge(*command, inject={"obey_permissions": {}})
            assert result.code == 0, result
        report = forks.phiforge("report", finished, inject={"obey_permissions": {}})
        assert report.code == 1
        assert f"{finished}/" in report.error
    finally:
        for folder in folders:
            folder.chmod(0o755)
