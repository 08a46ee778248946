"""The command line: help, exit codes 0 done / 1 failed / 2 misused, --json, who prints where."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from phiforge import __version__, cli
from phiforge.core.store import Request, Run, open_run
from phiforge.recipe import load_recipe

COMMANDS = (
    "run",
    "status",
    "explain",
    "stages",
    "stage",
    "report",
    "compare",
    "chat",
    "ask",
    "serve",
    "convert",
    "bench",
    "sandbox",
    "pivotal",
    "doctor",
    "init",
)


class Result(NamedTuple):
    code: int
    out: str
    error: str


Command = Callable[..., Result]


@pytest.fixture
def phiforge(monkeypatch, capsys, tmp_path) -> Command:
    """Calls main() in this process, in an empty folder, and gives code and both streams."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["phiforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capsys.readouterr()
        code = stopped.value.code
        return Result(code if isinstance(code, int) else 0, found.out, found.err)

    return call


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Three stages that take a blink: a text, a tokenizer, tokens."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"Text {name}. The quick fox jumps. " * 20)
    file = tmp_path / "small.yaml"
    blocks: dict[str, Any] = {
        "curate": {"sources": [{"name": "texts", "path": "texts"}]},
        "tokenizer": {"vocab_size": 272, "whole_numbers_below": 1},
        "pack": {},
    }
    file.write_text(yaml.safe_dump(blocks))
    return file


# -------------------------------------------------------------------------------------- help


def test_help_lists_every_command(phiforge):
    result = phiforge("--help")
    assert result.code == 0
    assert not result.error
    for name in COMMANDS:
        assert f" {name} " in result.out
    assert "phiforge run nano" in result.out
    assert set(COMMANDS) == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example(phiforge, name):
    result = phiforge(name, "--help")
    assert result.code == 0
    assert f"Example: phiforge {name}" in " ".join(result.out.split())


def test_version(phiforge):
    assert phiforge("--version") == Result(0, f"phiforge {__version__}\n", "")


def test_help_starts_fast_and_without_torch(record_property):
    """Measured, not asserted: a busy machine must not fail a test."""
    script = "import sys, phiforge.cli as c; sys.argv = ['phiforge', '--help']\n"
    script += "try: c.main()\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'pydantic', 'yaml'} & set(sys.modules), 'a heavy import'"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    record_property("help_seconds", round(time.perf_counter() - begin, 2))


# -------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ""),
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument"),
        (["run", "ci", "--no-such-option"], "No such option"),
        (["run", "nnao"], "no recipe file nnao and no shipped recipe of that name"),
        (["explain", "nnao"], "did you mean 'nano'?"),
        (["explain", "ci", "--set", "pretrain.steps"], "write it as KEY=VALUE"),
        (["explain", "ci", "--set", "=3"], "write it as KEY=VALUE"),
        (["explain", "ci", "--set", "seed=1", "--set", "seed=2"], "--set seed is given twice"),
        (["explain", "ci", "--set", "seed=[1"], "is not valid YAML"),
        (["explain", "ci", "--set", "pretrain.stpes=1"], "did you mean 'pretrain.steps'?"),
        (["run", "ci", "--until", "sfd"], "did you mean 'sft'?"),
        (["run", "ci", "--rebuild", "sfd"], "did you mean 'sft'?"),
        (["stage", "sfd", "--run", "r"], "unknown stage 'sfd'; did you mean 'sft'?"),
        (["stage", "sft", "--run", "r", "--input", "midtrain"], "write it as STAGE=FOLDER"),
        (["stage", "sft", "--run", "r", "--input", "pivotal=x"], "unknown input of sft"),
        (["status", "nowhere"], "nowhere: no such run folder"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["init", "mine", "--from", "nnao"], "did you mean 'nano'?"),
    ],
)
def test_a_misused_command_exits_with_2_and_says_why(phiforge, tmp_path, arguments, expected):
    result = phiforge(*arguments)
    assert result.code == 2
    assert expected in " ".join(result.error.split())
    assert "Traceback" not in result.error
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_a_failed_command_exits_with_1_and_names_the_remedy(phiforge, recipe, tmp_path):
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff\xfe")
    result = phiforge("run", recipe)
    assert result.code == 1
    assert result.error.splitlines()[-1].startswith("error: texts/b.txt: not UTF-8 text")
    assert "on_error: skip" in result.error
    assert "Traceback" not in result.error


def test_a_traceback_on_demand(phiforge, monkeypatch):
    def broken(name: str) -> None:
        raise RuntimeError("step 3: loss nan")

    monkeypatch.setattr("phiforge.recipe.find_recipe", broken)
    assert phiforge("init", "x").error.splitlines() == [
        "error: step 3: loss nan",
        "(PHIFORGE_TRACEBACK=1 shows where)",
    ]
    monkeypatch.setenv("PHIFORGE_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["phiforge", "init", "x"])
    with pytest.raises(RuntimeError, match="step 3"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "f"), "error: f: the disk is full. Free some"),
        (PermissionError(13, "Permission denied", "f"), "error: f: no permission (Permission"),
        (FileNotFoundError("f: no such file; run the stage before"), "error: f: no such file; run"),
        (FileNotFoundError(2, "No such file or directory", "f"), "error: f: No such file or dir"),
    ],
)
def test_errors_of_the_system_say_what_to_do(phiforge, monkeypatch, error, expected):
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr("phiforge.recipe.find_recipe", broken)
    result = phiforge("init", "x")
    assert result.code == 1
    assert result.error.startswith(expected)


def test_ctrl_c_is_clean(phiforge, monkeypatch):
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("phiforge.recipe.find_recipe", interrupted)
    result = phiforge("init", "x")
    assert result.code == 130
    assert "the same command goes on from here" in result.error


# ------------------------------------------------------------- run, status, explain, report


def test_a_run_is_made_kept_and_shown(phiforge, recipe):
    first = phiforge("run", recipe)
    assert first.code == 0
    assert [line.split()[:2] for line in first.out.splitlines()[1:4]] == [
        ["curate", "done"],
        ["tokenizer", "done"],
        ["pack", "done"],
    ]
    assert "curate       done" in first.error
    assert "chat:" not in first.out, "there is no model to talk to"

    again = phiforge("run", recipe, "--json")
    assert again.code == 0
    found = json.loads(again.out)
    assert found["run"] == "runs/small"
    assert [row["state"] for row in found["stages"]] == ["done"] * 3
    assert again.error.count("kept") == 3

    assert json.loads(phiforge("status", "runs/small", "--json").out) == found["stages"]
    rows = json.loads(phiforge("explain", recipe, "--json").out)
    assert [row["action"] for row in rows] == ["skip"] * 3
    report = phiforge("report", "runs/small")
    assert report.code == 0
    assert Path(report.out.strip()).is_file()


def test_until_stops_and_rebuild_makes_anew(phiforge, recipe):
    assert phiforge("run", recipe, "--until", "curate").code == 0
    assert [row["stage"] for row in json.loads(phiforge("status", "runs/small", "--json").out)] == [
        "curate"
    ]
    assert phiforge("run", recipe).code == 0
    result = phiforge("run", recipe, "--rebuild", "curate")
    # The same text came out, so nothing behind it is made again.
    states = [line.split()[1] for line in result.error.splitlines()]
    assert [state for state in states if state in ("done", "kept")] == ["done", "kept", "kept"]


def test_other_settings_stop_the_run_and_name_the_fields(phiforge, recipe):
    assert phiforge("run", recipe).code == 0
    change = ("--set", "tokenizer.vocab_size=280")
    result = phiforge("run", recipe, *change)
    assert result.code == 1
    assert "config.vocab_size: 272 → 280" in result.error
    assert "--rebuild tokenizer" in result.error
    said = phiforge("explain", recipe, *change)
    assert said.code == 0
    assert "tokenizer    changed  config.vocab_size: 272 → 280" in said.out
    assert "--rebuild tokenizer" in said.error
    assert phiforge("run", recipe, *change, "--rebuild", "tokenizer").code == 0


def test_a_second_run_on_the_folder_is_refused(phiforge, recipe, tmp_path):
    with open_run(tmp_path / "runs" / "small"):
        result = phiforge("run", recipe)
    assert result.code == 1
    assert "is in use by process" in result.error


def test_status_of_a_damaged_folder(phiforge, recipe, tmp_path):
    phiforge("run", recipe)
    run = tmp_path / "runs" / "small"
    (run / "pack" / "mixture.json").write_text("{}")
    (run / "tokenizer" / "manifest.json").write_text("{")
    result = phiforge("status", run, "--json")
    assert result.code == 1
    rows = {row["stage"]: row for row in json.loads(result.out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "curate": "done",
        "tokenizer": "damaged",
        "pack": "damaged",
    }
    assert "manifest.json: damaged manifest" in rows["tokenizer"]["facts"]
    assert "mixture.json: 2 bytes, but its manifest says" in rows["pack"]["facts"]
    assert "--rebuild pack" in rows["pack"]["facts"]
    assert phiforge("status", run).code == 1


def test_verify_finds_what_sizes_do_not_show(phiforge, recipe, tmp_path):
    phiforge("run", recipe)
    file = tmp_path / "runs" / "small" / "curate" / "documents.jsonl"
    file.write_bytes(file.read_bytes().replace(b"quick", b"slow!"))
    assert phiforge("status", "runs/small").code == 0
    result = phiforge("status", "runs/small", "--verify")
    assert result.code == 1
    assert "documents.jsonl: its contents" in " ".join(result.out.split())


def test_status_of_an_unfinished_and_of_an_empty_folder(phiforge, recipe, tmp_path):
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    empty = phiforge("status", run)
    assert (empty.code, empty.out) == (0, "")
    assert "no stage has begun here" in empty.error
    assert json.loads(phiforge("status", run, "--json").out) == []

    def stops(out):
        out.log(step=3, loss=2.5)
        raise ValueError("stopped")

    config = load_recipe(recipe).configs["curate"].model_dump(mode="json")
    with pytest.raises(ValueError, match="stopped"):
        Run(run, load_recipe(recipe).exec).stage(Request("curate", 1, config), stops, {})
    (row,) = json.loads(phiforge("status", run, "--json").out)
    assert row["state"] == "unfinished"
    assert row["facts"].startswith("step 3  loss 2.5  (last line 0:0")


def test_one_stage_alone(phiforge, recipe, tmp_path):
    sources = "sources=[{name: texts, path: texts}]"
    result = phiforge("stage", "curate", "--run", "alone", "--set", sources)
    assert (result.code, result.out) == (0, "alone/curate\n")
    found = phiforge("stage", "curate", "--run", "alone", "--set", sources, "--json")
    assert json.loads(found.out)["stage"] == "curate"


# ---------------------------------------------------------------------- stages, doctor, init


def test_the_stage_table_fits_a_terminal(phiforge):
    result = phiforge("stages")
    assert result.code == 0
    assert "tokenizer    curate?, synthesize?" in result.out
    assert len(result.out.splitlines()) < 20
    rows = json.loads(phiforge("stages", "--json").out)
    assert {"stage": "pivotal", "reads": "sft, synthesize"}.items() <= rows[7].items()


def test_doctor(phiforge):
    result = phiforge("doctor", "--json")
    rows = {row["check"]: row for row in json.loads(result.out)}
    assert result.code == 0
    assert {"python", "torch", "bf16", "gpu", "compiler", "memory", "disk", "[hub]"} <= set(rows)
    assert {row["state"] for row in rows.values()} <= {"ok", "note"}
    assert "[transformers]" in phiforge("doctor").out, "names in brackets are no markup"


def test_doctor_fails_where_something_is_missing(phiforge, monkeypatch):
    from importlib.util import find_spec

    def without_torch(name: str, *more: Any) -> Any:
        return None if name == "torch" else find_spec(name, *more)

    monkeypatch.setattr("importlib.util.find_spec", without_torch)
    result = phiforge("doctor")
    assert result.code == 1
    assert "pip install 'torch" in result.out


def test_init_writes_a_recipe_with_a_run_folder_of_its_own(phiforge, tmp_path):
    result = phiforge("init", "my-model", "--from", "ci")
    assert result.code == 0
    assert "phiforge run my-model/recipe.yaml" in result.out
    found = load_recipe(tmp_path / "my-model" / "recipe.yaml", {"seed": 3})
    assert found.name == "my-model-s3"
    assert found.configs == load_recipe("ci", {"seed": 3}).configs


def test_init_never_overwrites(phiforge, tmp_path):
    file = tmp_path / "mine" / "recipe.yaml"
    file.parent.mkdir()
    file.write_text("mine")
    result = phiforge("init", "mine")
    assert result.code == 2
    assert "exists already" in " ".join(result.error.split())
    assert file.read_text() == "mine"
