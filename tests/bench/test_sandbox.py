"""`phiforge bench sandbox`: small and whole, and what it says of contestants that go wrong."""

import json
import sys

import pytest

from phiforge import cli
from phiforge.bench import runners, sandbox
from phiforge.bench.runners import BARE, FORK, NOTHING, Runner
from phiforge.verify.sandbox import Sandbox, SandboxUnavailable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs the command in this process and gives code and what was printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["phiforge", "bench", "sandbox", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capsys.readouterr()
        code = stopped.value.code or 0
        return code, found.err if code == 2 else found.out

    return call


def fake(label: str, run, **more) -> Runner:
    return Runner(label, NOTHING, BARE, 6, run, **more)


def right(sources, workers):
    """Answers by arithmetic what the programs would print, in a known time."""
    numbers = [int(source.split("(")[3].rstrip(")")) for source in sources]
    return 0.5, [f"{n * (n - 1) // 2}\n" for n in numbers]


@pytest.fixture
def contestants(monkeypatch):
    """Puts these in place of the real ones."""

    def put(*found: Runner) -> None:
        monkeypatch.setattr(sandbox, "open_runners", lambda *_: (list(found), ["x: skipped"]))

    monkeypatch.setattr(sandbox, "_PAUSE_SECONDS", 0.0)
    return put


@pytest.mark.slow
def test_whole(bench, tmp_path):
    try:
        Sandbox().close()
    except SandboxUnavailable as error:
        pytest.skip(f"nothing can be isolated here: {error}")
    out = tmp_path / "s.json"
    arguments = ["--quick", "--repeat", "1", "--workers", "2", "--json", "--out", str(out)]
    code, said = bench(*arguments)
    result = json.loads(said)
    assert json.loads(out.read_text()) == result
    (work,) = result["works"]
    assert (code, work["failures"], work["workers"]) == (0, {}, 2)
    rows = {row["label"]: row for row in work["rows"]}
    assert {"phiforge warm", "phiforge cold", "rlimits alone", BARE, FORK} <= set(rows)
    for row in rows.values():
        assert row["wrong"] == 0
        assert row["runs_per_second"]["median"] > 0
        assert [turn["round"] for turn in row["rounds"]] == [-1, 0]
    assert rows["phiforge cold"]["isolates"] == "files, network"
    assert rows["rlimits alone"]["isolates"] == "nothing"
    assert rows["phiforge warm"]["limit"] == FORK
    assert rows[BARE]["limit_share"]["median"] == 1.0
    assert any(line.startswith("sandlock: skipped") for line in result["skipped"])
    assert result["about"]["phiforge cold"]["resource limits"]


def test_programs_differ_and_print_what_is_expected():
    sources, expected = sandbox.programs(0, 5)
    more, _ = sandbox.programs(1, 5)
    assert len({*sources, *more}) == 10
    assert [f"{eval(source[6:-1])}\n" for source in sources] == expected


def test_rates_ratios_and_rows(bench, contestants):
    slow = fake("rlimits alone", lambda s, w: (1.0, right(s, w)[1]))
    contestants(fake("phiforge cold", right), slow, fake(BARE, right, prints=False))
    code, said = bench("--json", "--repeat", "3")
    assert code == 0
    result = json.loads(said)
    assert [work["workers"] for work in result["works"]] == [1, 2]
    ours, theirs, _ = result["works"][0]["rows"]
    assert ours["runs_per_second"] == {"median": 12.0, "low": 12.0, "high": 12.0}
    assert theirs["limit_share"]["median"] == 0.5
    (comparison,) = result["works"][0]["comparisons"]
    assert (comparison["ours"], comparison["peer"]) == ("phiforge cold", "rlimits alone")
    assert comparison["median"] == 2.0
    assert result["works"][0]["aims"] == []
    assert [aim["reached"] for aim in result["works"][1]["aims"]] == [False]


def test_each_round_another_begins(bench, contestants):
    order = []

    def noted(label):
        def run(sources, workers):
            order.append(label)
            return right(sources, workers)

        return fake(label, run)

    contestants(noted("a"), noted("b"))
    bench("--repeat", "2", "--workers", "1")
    assert order == ["a", "b", "a", "b", "b", "a"]


def test_wrong_answers_and_failures_are_named(bench, contestants):
    def broken(sources, workers):
        raise SandboxUnavailable("gone")

    liar = fake("liar", lambda s, w: (1.0, ["0\n"] * len(s)))
    contestants(fake("good", right), liar, fake("broken", broken))
    code, said = bench("--repeat", "1", "--workers", "1")
    assert code == 1
    assert "liar: 12 programs gave a wrong answer" in said
    assert "broken failed: SandboxUnavailable: gone" in said
    assert "good" in said
    assert "x: skipped" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers"),
        (["--repeat", "0"], "--repeat"),
        (["--peer-python", "litgpt=/bin/true"], "the only peer with a Python is sandlock"),
        (["--peer-python", "sandlock=/nowhere"], "no such file"),
        (["--out", "/nowhere/x.json"], "no folder"),
    ],
)
def test_misuse(bench, arguments, message):
    code, said = bench(*arguments)
    assert code == 2
    assert message in said


def test_limits_that_are_no_isolation_say_so(tmp_path):
    python = runners.interpreter.describe(None)
    floors = runners._floors(python, tmp_path)
    assert {runner.isolates for runner in floors} == {NOTHING}
    seconds, outputs = floors[0].run(["print(2 + 3)", "import os; os._exit(3)"], 2)
    assert (seconds, outputs) == (None, ["5\n", ""])
