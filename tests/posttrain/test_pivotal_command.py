"""`phiforge pivotal ...` from files to files: every verb, kills, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phiforge.posttrain.pivotal import exact

pytestmark = pytest.mark.slow  # every command is a process that imports torch
FILES = ("tokens.jsonl", "pairs.jsonl", "paths.jsonl", "search.json", "rollouts.jsonl.gz")
ORACLE = "def right(problem, response):\n    return 'Y' in response\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose p is known, its questions as a file, an oracle as a file."""
    folder = tmp_path_factory.mktemp("pivotal")
    world = exact.build(folder / "model", seed=0, steps=20, levels=9)
    rows = [
        {"id": p.id, "ids": list(p.prompt), "gold": p.answer}
        for p in world.problems(0.2, 0.8, copies=4)
    ]
    assert len(rows) >= 8
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text)
    (folder / "judge.py").write_text(ORACLE)
    return folder


def arguments(place, out, *more, verb="search"):
    options = ["--prompt", "ids", "--answer", "gold", "--oracle", f"{place / 'judge.py'}:right"]
    options += ["--max-tokens", "30", "--threads", "1", "--n-filter", "16", "--out", str(out)]
    files = [str(place / "model"), str(place / "questions.jsonl")]
    return [sys.executable, "-m", "phiforge", "pivotal", verb, *files, *options, *map(str, more)]


def run(command, code=0):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def phiforge(*words, code=0):
    return run([sys.executable, "-m", "phiforge", "pivotal", *map(str, words)], code)


@pytest.fixture(scope="module")
def found(place):
    out = place / "found"
    planned = run(arguments(place, out, "--pilot", 4, "--json", verb="plan"))
    forecast = json.loads(planned.stdout)
    assert forecast["tokens"]["low"] <= forecast["tokens"]["total"] <= forecast["tokens"]["high"]
    done = run(arguments(place, out, "--json"))
    metrics = json.loads(done.stdout)
    assert {row["quantity"] for row in metrics["plan"]} >= {"tokens", "pivotal_tokens", "pairs"}
    assert metrics["pivotal_tokens"] > 0
    assert metrics["pairs"] > 0
    return out


def test_a_search_is_right_about_a_model_whose_p_is_known(place, found):
    world = exact.open(place / "model")
    right = 0
    rows = [json.loads(line) for line in (found / "tokens.jsonl").read_text().splitlines()]
    for row in rows:
        true = world.delta(row["prefix_token_ids"], row["token_id"])
        right += abs(true) >= 0.2 and true * row["delta"] > 0
    assert right >= 0.8 * len(rows)


def test_the_plan_s_rollouts_are_not_drawn_again(place, found, tmp_path):
    run(arguments(place, tmp_path / "straight"))
    for name in FILES:
        assert (tmp_path / "straight" / name).read_bytes() == (found / name).read_bytes(), name


def test_pairs_report_export_and_import(found, tmp_path):
    phiforge("pairs", found, "--gap", 0.4, "--out", tmp_path / "strong.jsonl")
    strong = (tmp_path / "strong.jsonl").read_text().splitlines()
    every = (found / "pairs.jsonl").read_text().splitlines()
    assert len(strong) < len(every)
    phiforge("report", found, "--out", tmp_path / "report.html")
    assert "Pivotal tokens" in (tmp_path / "report.html").read_text()
    for form, name in (("token-ids", "ids.jsonl"), ("trl", "trl.parquet"), ("codelion", "c.jsonl")):
        phiforge("export", found, "--to", form, "--out", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 0
    model = json.loads((found / "options.json").read_text())["tokenizer"]
    done = phiforge(
        "import", tmp_path / "c.jsonl", "--tokenizer", model, "--out", tmp_path / "back"
    )
    assert "pairs in" in done.stdout
    assert (tmp_path / "back" / "pairs.jsonl").read_text()


def test_killed_ten_times_it_ends_the_same(place, found, tmp_path):
    command = arguments(place, tmp_path / "killed", "--rows", 8)
    log = tmp_path / "killed" / "state" / "rollouts.jsonl"
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        size = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > size + 2000 * (kills % 3):
                break
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    run(command)
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (found / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--oracle", "nowhere:f"), 1, "nowhere"),
        (("--oracle", "mth"), 1, "did you mean 'math'"),
        (("--prompt", "question"), 1, "question"),
        (("--gap", 0), 2, "gap is 0"),
        (("--method", "quick"), 2, "method is 'quick'"),
        (("--max-tokens", 100000), 1, "no question can be searched"),
        (("--backend", "endpoint"), 1, "--endpoint URL"),
        (("--endpoint", "http://127.0.0.1:9/v1"), 1, "--tokenizer FOLDER"),
    ],
)
def test_mistakes_are_named(place, tmp_path, more, code, said):
    done = subprocess.run(
        arguments(place, tmp_path / "out", *more), capture_output=True, text=True, timeout=120
    )
    assert said in done.stderr
    assert done.returncode == code, done.stderr


def test_a_server_that_is_down_is_named(place, tmp_path):
    more = ("--endpoint", "http://127.0.0.1:9/v1", "--tokenizer", place / "model", "--limit", 2)
    done = subprocess.run(
        arguments(place, tmp_path / "out", *more), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr


def test_a_question_that_cannot_be_asked_is_left_out_and_the_rest_goes_on(place, tmp_path):
    rows = Path(place / "questions.jsonl").read_text().splitlines()[:3]
    long = json.loads(rows[0]) | {"id": "long", "ids": json.loads(rows[0])["ids"] * 400}
    (tmp_path / "questions.jsonl").write_text("\n".join([json.dumps(long), *rows]) + "\n")
    command = arguments(place, tmp_path / "out")
    command[6] = str(tmp_path / "questions.jsonl")
    done = run(command)
    assert "left out long" in done.stderr
    assert "questions_screened       3" in done.stdout
