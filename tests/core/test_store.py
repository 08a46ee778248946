"""The run store: skip, resume, diff, rebuild, locks, damage; every commit is whole or absent."""

import json
import os
import subprocess
import sys

import pytest

from phiforge.core.store import (
    Request,
    Run,
    StageChanged,
    StageDir,
    check_outputs,
    differences,
    open_run,
    read_manifest,
)


def request(stage="toy", version=1, inputs=None, **config):
    return Request(stage, version, config, inputs or {})


def writes(text, calls=None):
    def work(out: StageDir):
        if calls is not None:
            calls.append(text)
        (out.path / "text.txt").write_text(text)
        return {"length": len(text), "loss": float("nan")}

    return work


def test_stage_is_made_once_then_skipped(tmp_path):
    calls = []
    with open_run(tmp_path / "r") as run:
        first = run.stage(request(a=1), writes("x", calls), {})
        second = run.stage(request(a=1), writes("x", calls), {})
    assert calls == ["x"]
    assert first == second
    assert first["metrics"] == {"length": 1, "loss": None}
    assert [row["path"] for row in first["outputs"]] == ["text.txt"]
    assert not (tmp_path / "r" / "toy.partial").exists()
    assert not (tmp_path / "r" / "toy" / "state").exists()


def test_other_settings_stop_with_the_fields_that_differ(tmp_path):
    with open_run(tmp_path) as run:
        run.stage(request(steps=10, lr=0.1), writes("x"), {})
        with pytest.raises(StageChanged, match=r"config.lr: 0.1 → 0.2(.|\n)*--rebuild toy"):
            run.stage(request(steps=10, lr=0.2), writes("y"), {})
        assert (tmp_path / "toy" / "text.txt").read_text() == "x"
        run.stage(request(steps=10, lr=0.2), writes("y"), {}, rebuild=True)
    assert (tmp_path / "toy" / "text.txt").read_text() == "y"
    assert not (tmp_path / "toy.previous").exists()


def test_version_and_inputs_enter_the_fingerprint():
    base = request(a=1)
    assert base.fingerprint != request(a=1, version=2).fingerprint
    assert base.fingerprint != request(a=1, inputs={"x": "0"}).fingerprint
    with pytest.raises(ValueError, match="fingerprint"):
        _ = request(a=float("nan")).fingerprint


def test_failed_stage_keeps_state_and_the_next_run_resumes(tmp_path):
    def fails(out: StageDir):
        (out.state / "half").write_text("work")
        raise RuntimeError("boom")

    def finishes(out: StageDir):
        return {"found": (out.state / "half").read_text()}

    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError):
            run.stage(request(a=1), fails, {})
        assert run.decide(request(a=1), rebuild=False)[0] == "resume"
        manifest = run.stage(request(a=1), finishes, {})
    assert manifest["metrics"] == {"found": "work"}
    assert manifest["resumed"] is True


def test_partial_work_of_other_settings_is_not_resumed(tmp_path):
    def fails(out: StageDir):
        (out.state / "half").write_text("old")
        raise RuntimeError

    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError):
            run.stage(request(a=1), fails, {})
        manifest = run.stage(request(a=2), lambda out: {"half": (out.state / "half").exists()}, {})
    assert manifest["metrics"] == {"half": False}


def test_crash_between_manifest_and_rename_is_finished_on_the_next_run(tmp_path):
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("old"), {})
    (tmp_path / "toy").rename(tmp_path / "toy.partial")
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("never called"), {})
    assert (tmp_path / "toy" / "text.txt").read_text() == "old"


def test_crash_while_swapping_keeps_one_whole_folder(tmp_path):
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("old"), {})
    (tmp_path / "toy").rename(tmp_path / "toy.previous")
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("never called"), {})
    assert (tmp_path / "toy" / "text.txt").read_text() == "old"


@pytest.mark.parametrize("content", ["{", "[]", '{"stage": "toy"}', "\udcff"])
def test_damaged_manifest_names_the_file_and_the_remedy(tmp_path, content):
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("x"), {})
        (tmp_path / "toy" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"toy/manifest.json: damaged .*--rebuild toy"):
            run.stage(request(a=1), writes("y"), {})
        run.stage(request(a=1), writes("y"), {}, rebuild=True)
    assert read_manifest(tmp_path / "toy") is not None


def test_truncated_missing_and_altered_outputs_are_found(tmp_path):
    with open_run(tmp_path) as run:
        manifest = run.stage(request(a=1), writes("abc"), {})
        text = tmp_path / "toy" / "text.txt"
        text.write_text("ab")
        with pytest.raises(ValueError, match=r"text.txt: 2 bytes, but its manifest says 3"):
            run.stage(request(a=1), writes("abc"), {})
        text.write_text("xyz")
        check_outputs(tmp_path / "toy", manifest)
        with pytest.raises(ValueError, match="contents changed"):
            check_outputs(tmp_path / "toy", manifest, hashes=True)
        text.unlink()
        with pytest.raises(ValueError, match="missing output"):
            run.stage(request(a=1), writes("abc"), {})


def test_second_process_is_refused(tmp_path):
    code = (
        "import sys\nfrom phiforge.core.store import open_run\n"
        "try:\n    open_run(sys.argv[1]).__enter__()\n"
        "except ValueError as error:\n    print(error); sys.exit(3)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with open_run(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 3
    assert f"in use by process {os.getpid()}" in second.stdout
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_output_hash_ignores_logs_and_times(tmp_path):
    def work(out: StageDir):
        out.log(step=1, seconds=os.getpid())
        (out.path / "a").write_text("a")
        return {}

    hashes = set()
    for name in ("one", "two"):
        with open_run(tmp_path / name) as run:
            hashes.add(run.stage(request(a=1), work, {})["output_hash"])
        (tmp_path / name / "toy" / "metrics.jsonl").read_text()
    assert len(hashes) == 1


def test_seconds_add_up_over_interruptions(tmp_path):
    def fails(out: StageDir):
        (out.state / "seconds").write_text("100")
        raise RuntimeError

    with open_run(tmp_path) as run:
        with pytest.raises(RuntimeError):
            run.stage(request(a=1), fails, {})
        (tmp_path / "toy.partial" / "state" / "seconds").write_text("100")
        assert run.stage(request(a=1), writes("x"), {})["seconds"] >= 100


def test_differences_name_full_paths():
    old = {"config": {"a": {"b": 1}, "c": 2}, "inputs": {"x": "1" * 64}}
    new = {"config": {"a": {"b": 2}, "d": 3}, "inputs": {"x": "2" * 64}}
    assert differences(old, new) == [
        "config.a.b: 1 → 2",
        "config.c: 2 → (absent)",
        "config.d: (absent) → 3",
        "inputs.x: its contents changed (111111111111 → 222222222222)",
    ]


def test_request_file_left_by_a_kill_is_no_manifest(tmp_path):
    partial = tmp_path / "toy.partial"
    partial.mkdir()
    (partial / "request.json").write_text('{"stage": "to')
    run = Run(tmp_path, StageDir.scratch(tmp_path / "s").exec)
    assert run.decide(request(a=1), rebuild=False)[0] == "run"


def test_manifest_is_readable_json(tmp_path):
    with open_run(tmp_path) as run:
        run.stage(request(a=1), writes("x"), {})
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    assert manifest["environment"]["python"]
    assert manifest["code"]["phiforge"]
    assert manifest["request"]["config"] == {"a": 1}
