"""`phiforge bench pivotal`: figures by hand, the truth by brute force, and both runs, small."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phiforge import cli
from phiforge.bench.pivotal_score import Effect, figures, judge
from phiforge.bench.pivotal_truth import Choice, Log, Measured
from phiforge.core.progress import Bar
from phiforge.core.records import Problem, write_records
from phiforge.core.stats import wilson
from phiforge.inference.engine import Engine
from phiforge.posttrain.pivotal import exact
from phiforge.posttrain.pivotal.exact import ExactWorld

pytest.importorskip("torch")

GAP = 0.2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ExactWorld:
    return exact.build(tmp_path_factory.mktemp("worlds") / "small", 3, steps=10, levels=5)


@pytest.fixture(scope="module")
def engine(world: ExactWorld) -> Engine:
    return Engine.from_folder(world.folder)


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path) -> Callable[..., Any]:
    """Runs the command in this process; gives code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["phiforge", "bench", "pivotal", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capsys.readouterr()
        return stopped.value.code or 0, found.out, found.err  # type: ignore[return-value]

    return call


# ------------------------------------------------------------------------------- the arithmetic


def token(true: float | tuple | None, found: float | None) -> dict[str, Any]:
    """A judged token; a bare number is known exactly, and a found one to ±0.1."""
    bounds = (true, true, true) if isinstance(true, float) else true
    return {
        "true": dict(zip(("delta", "low", "high"), bounds, strict=True)) if bounds else None,
        "found": None
        if found is None
        else {"delta": found, "low": found - 0.1, "high": found + 0.1},
    }


def row(question: str, *tokens: dict[str, Any], **drawn: int) -> dict[str, Any]:
    spent = dict.fromkeys(("filter", "search", "confirm", "pair"), 0) | drawn
    return {"question": question, "tokens": list(tokens), "tokens_drawn": spent}


def test_figures_by_hand() -> None:
    rows = [
        row(
            "a",
            token(0.3, 0.35),  # right
            token(-0.25, 0.25),  # found with the wrong sign
            token(0.4, None),  # missed
            token(0.05, 0.2),  # false, and outside its interval
            filter=100,
            search=600,
            confirm=200,
            pair=50,
        ),
        row("b", token(-0.2, -0.2), token(None, 0.21), filter=100, search=200),
        row("c", filter=100),
    ]
    found = figures(rows, GAP)
    assert (found["questions"], found["true"], found["found"], found["right"]) == (3, 4, 5, 2)
    assert found["precision"] == 2 / 5
    assert found["recall"] == 2 / 4
    assert found["coverage"] == 2 / 4
    assert found["bias"] == pytest.approx((0.05 + 0.0 + 0.15 + 0.0) / 4)
    assert found["tokens_per_right"] == 1000 / 2
    assert found["all_tokens_per_right"] == 1350 / 2
    tokens = {name: found[f"{name}_tokens"] for name in ("filter", "search", "confirm", "pair")}
    assert tokens == {"filter": 300, "search": 800, "confirm": 200, "pair": 50}
    for name in ("precision", "recall", "coverage"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low < found[name] < high <= 1
    assert found["tokens_per_right_interval"] == [200, 800]
    # One resample in 27 has question c alone, tokens and nothing found: the upper end is open.
    assert found["all_tokens_per_right_interval"] == [300, None]


def test_figures_without_anything_have_no_value() -> None:
    found = figures([row("a", filter=10)], GAP)
    assert found["precision"] is found["recall"] is found["tokens_per_right"] is None
    assert found["precision_interval"] == [None, None]
    assert figures([], GAP)["questions"] == 0


def test_borderline_tokens_are_left_out_of_the_clear_figures() -> None:
    rows = [
        row(
            "a",
            token((0.3, 0.25, 0.35), 0.3),
            token((-0.3, -0.35, -0.2), None),
            token((0.22, 0.17, 0.27), 0.2),  # borderline
            token((-0.19, -0.24, -0.14), -0.2),  # borderline
            token((0.1, 0.05, 0.15), 0.2),
            token(None, 0.3),
        )
    ]
    assert [figures(rows, GAP)[name] for name in ("true", "found", "right")] == [3, 5, 2]
    clear = figures(rows, GAP, clear=True)
    assert [clear[name] for name in ("true", "found", "right")] == [2, 3, 1]


def test_intervals_are_clustered_by_question() -> None:
    alike = [row(f"q{i}", token(0.3, 0.3), token(0.0, 0.3)) for i in range(40)]
    low, high = figures(alike, GAP)["precision_interval"]
    simple = wilson(40, 80)
    assert (low, high) == (simple.low, simple.high)  # no difference between questions
    halves = [row(f"q{i}", *[token(0.3 * (i % 2), 0.3)] * 10) for i in range(8)]
    low, high = figures(halves, GAP)["precision_interval"]
    simple = wilson(40, 80)
    assert low < simple.low - 0.05
    assert high > simple.high + 0.05
    seeds = [row("q0", token(0.3, 0.3)) for _ in range(5)]
    assert figures(seeds, GAP)["questions"] == 1


def test_a_token_of_two_paths_is_judged_once() -> None:
    def path(*ids: int) -> SimpleNamespace:
        return SimpleNamespace(token_ids=list(ids), logprobs=[math.log(0.5)] * len(ids))

    def said(prefix: list[int], token_id: int, delta: float) -> SimpleNamespace:
        interval = (delta - 0.1, delta + 0.1)
        return SimpleNamespace(
            prefix_token_ids=[7, *prefix], token_id=token_id, delta=delta, interval=interval
        )

    question: Any = SimpleNamespace(
        prompt_token_ids=[7],
        paths=[path(1, 2, 3), path(1, 2, 4)],
        tokens=[said([], 1, 0.3), said([1, 2], 4, -0.2)],
    )
    deltas = {((7,), 1): 0.31, ((7, 1), 2): 0.5, ((7, 1, 2), 3): -0.19}

    def truth(prefix: Any, token_id: int) -> Effect | None:
        delta = deltas.get((tuple(prefix), token_id))
        return None if delta is None else Effect(delta, delta, delta)

    judged = judge(question, truth, GAP)
    assert [(t["path"], t["position"], t["token_id"]) for t in judged] == [
        (0, 0, 1),
        (0, 1, 2),
        (1, 2, 4),
    ]
    assert [t["true"] and t["true"]["delta"] for t in judged] == [0.31, 0.5, None]
    assert [t["found"] and t["found"]["delta"] for t in judged] == [0.3, None, -0.2]
    assert judged[0]["probability"] == pytest.approx(0.5)


# ------------------------------------------------------------------------------- exact worlds


def test_a_quick_run_on_a_world(bench, tmp_path: Path) -> None:
    code, out, _ = bench("--quick", "--seeds", "18,42", "--json", "--out", "b.json")
    result = json.loads(out)
    assert code == 0
    assert json.loads((tmp_path / "b.json").read_text()) == result
    assert result["options"]["seeds"] == [18]
    (method,) = result["methods"]
    assert method["method"] == "paper:20"
    assert len(method["rows"]) == 2
    found = method["figures"]
    assert found["filter_tokens"] == 2 * 32 * 42  # answers are all of one length
    assert found["search_tokens"] > 0
    assert found["confirm_tokens"] == found["pair_tokens"] == 0
    assert found == figures(method["rows"], GAP)
    tokens = [t for r in method["rows"] for t in r["tokens"]]
    assert found["true"] == sum(abs(t["true"]["delta"]) >= GAP for t in tokens) > 0
    assert all(t["found"] or abs(t["true"]["delta"]) >= GAP for t in tokens)
    for t in tokens:
        assert abs(t["true"]["delta"]) <= 1 - t["probability"] + 1e-5


def test_the_table_and_mistakes(bench) -> None:
    code, out, _ = bench("--quick", "--seeds", "0", "--method", "paper:8")
    assert code == 0
    assert "exact worlds 0: 2 questions each" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("paper")] == [
        "paper:8",
        "paper:8",
    ]
    for arguments, said in (
        (["--method", "papre"], "choose one of paper"),
        (["--method", "paper:x"], "whole number from 2"),
        (["--method", "paper", "--method", "paper"], "give each once"),
        (["--seeds", "1,1"], "each once"),
        (["--seeds", "a"], "0,18"),
        (["--truth", "t.jsonl"], "--truth needs --model"),
        (["--model", "m", "--problems", "p.jsonl"], "--model needs --truth"),
        (["--path-choice", "any"], "balanced, natural"),
    ):
        code, _, error = bench("--quick", *arguments)
        assert (code, said in error) == (2, True), error


# -------------------------------------------------------------------------------- brute force

CHOICE = Choice(questions=2, paths=2, path_choice="balanced", temperature=1.0, max_tokens=12)


class Dying:
    """An engine that is killed in its `last` call."""

    def __init__(self, engine: Engine, last: int):
        self.engine, self.left = engine, last
        self.tokenizer = engine.tokenizer

    def generate(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.engine.generate(*arguments, **named)


def measured(world: ExactWorld, engine: Any, file: Path, num_rollouts: int) -> Measured:
    with Log(file, {"model": "m"}) as log:
        found = Measured(engine, world.oracle, world.problems(0.3, 0.7, copies=2), log, CHOICE)
        found.measure(GAP, num_rollouts, Bar(1, "rollouts", "brute force"))
    return found


def test_brute_force_agrees_with_the_closed_form(world, engine, tmp_path: Path) -> None:
    found = measured(world, engine, tmp_path / "truth.jsonl", 200)
    assert len(found.problems) == 2
    assert sum(map(len, found.paths.values())) == 4
    candidates = list(found.candidates(GAP))
    assert found.num_positions > 4
    prompts = {p.id: list(p.prompt) for p in found.problems}
    errors = []
    for problem, path, position in candidates:
        prefix, token_id = [*prompts[problem.id], *path.token_ids[:position]], path.token_ids
        effect = found.effect(prefix, token_id[position])
        assert effect is not None
        assert effect.low <= effect.delta <= effect.high
        errors.append(effect.delta - world.delta(prefix, token_id[position]))
    assert max(map(abs, errors)) < 5 * math.sqrt(0.5 / 200)
    for problem in found.problems:
        for path in found.paths[problem.id]:
            for i, logprob in enumerate(path.logprobs):
                prefix = [*prompts[problem.id], *path.token_ids[:i]]
                assert math.exp(logprob) == pytest.approx(
                    world.law(prefix[-1])[path.token_ids[i]], abs=1e-5
                )
                likely = math.exp(logprob) > 1 - GAP
                assert (found.effect(prefix, path.token_ids[i]) is None) == likely


def test_a_killed_brute_force_goes_on_where_it_was(
    world, engine, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("phiforge.bench.pivotal_truth.CHUNK", 20)
    monkeypatch.setattr("phiforge.bench.pivotal_truth.ROLLOUTS_PER_CALL", 100)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    measured(world, engine, whole, 30)
    for last in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            measured(world, Dying(engine, last), parts, 30)
    with open(parts, "ab") as file:
        file.write(b'{"prefix": [1, 2')  # a line cut by the kill
    measured(world, engine, parts, 30)
    assert sorted(parts.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    # More rollouts later add to what is there, and nothing is drawn twice.
    before = whole.read_text()
    measured(world, engine, whole, 35)
    assert whole.read_text().startswith(before)
    drawn = [json.loads(line) for line in whole.read_text().splitlines()[2:]]
    numbers = [(*r["prefix"], "from", r["first_index"]) for r in drawn]
    assert len(set(numbers)) == len(numbers)
    measured(world, Dying(engine, 0), whole, 35)


def test_the_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "truth.jsonl"
    Log(file, {"model": "m"}).__exit__(None, None, None)
    with pytest.raises(ValueError, match="another model"):
        Log(file, {"model": "n"})
    (tmp_path / "tokens.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"tokens\.jsonl:1: not a line of brute-force"):
        Log(tmp_path / "tokens.jsonl", {"model": "m"})


def test_a_quick_run_on_a_model(bench, world, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("phiforge.verify.answers.is_correct", world.oracle)
    write_records(tmp_path / "p.jsonl", [*world.problems(0.3, 0.7), Problem(id="x", prompt=[1])])
    arguments = ["--quick", "--model", world.folder, "--problems", "p.jsonl"]
    arguments += ["--truth", "t.jsonl", "--max-tokens", world.max_tokens, "--method", "paper:30"]
    code, out, _ = bench(*arguments, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["about"]["paths"] == 4
    (method,) = result["methods"]
    assert {r["paths"] for r in method["rows"]} == {2}
    assert method["figures"]["search_tokens"] > 0
    assert method["clear"]["found"] <= method["figures"]["found"]
    for t in (t for r in method["rows"] for t in r["tokens"] if t["true"]):
        assert t["true"]["low"] < t["true"]["delta"] < t["true"]["high"]
    size = (tmp_path / "t.jsonl").stat().st_size
    code, out, _ = bench(*arguments)
    assert "p by 100 rollouts before and after" in out
    assert "without tokens whose true delta" in out
    assert (tmp_path / "t.jsonl").stat().st_size == size
    code, _, error = bench(*arguments, "--max-tokens", 40)
    assert "another max_tokens" in error
    assert code > 0
