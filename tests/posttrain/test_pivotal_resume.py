"""The rollout log: a search that is killed goes on, repeats no rollout, and ends the same."""

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pivotal_world import FORK, ScriptedEngine, oracle, problems

from phiforge.posttrain import pivotal

ARGUMENTS: dict[str, Any] = {
    "method": "paper",
    "n_filter": 16,
    "n_rollouts": 16,
    "max_tokens": 12,
    "questions_in_flight": 3,
    "rollouts_per_call": 32,
}


def results(engine: ScriptedEngine, log: Path | None, **more: Any) -> list[Any]:
    run = pivotal.search(engine, problems(6), oracle, log=log, **ARGUMENTS | more)
    return [(q.status, q.root, q.paths, q.tokens, q.pairs, q.ledger) for q in run.questions()]


@pytest.mark.parametrize("method", ["paper", "balanced"])
def test_killed_at_a_call_it_ends_the_same_and_draws_nothing_twice(
    tmp_path: Path, method: str
) -> None:
    undisturbed = ScriptedEngine(FORK)
    expected = results(undisturbed, None, method=method)
    assert len(undisturbed.calls) > 8
    step = 1 if method == "paper" else 3
    for call in range(0, len(undisturbed.calls), step):
        log = tmp_path / f"{call}.jsonl"
        first = ScriptedEngine(FORK, die_at=call)
        with pytest.raises(KeyboardInterrupt):
            results(first, log, method=method)
        second = ScriptedEngine(FORK)
        assert results(second, log, method=method) == expected
        assert Counter(first.drawn + second.drawn) == Counter(undisturbed.drawn)


def test_a_finished_log_answers_everything_and_another_gap_reuses_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    expected = results(ScriptedEngine(FORK), log)
    size = log.stat().st_size
    assert results(ScriptedEngine(FORK, die_at=0), log) == expected
    assert log.stat().st_size == size
    wider = ScriptedEngine(FORK)
    results(wider, log, gap=0.5)
    assert not wider.calls


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    log = tmp_path / "log.jsonl"
    expected = results(ScriptedEngine(FORK), log)
    whole = log.read_bytes()
    log.write_bytes(whole[:-cut])
    again = ScriptedEngine(FORK)
    assert results(again, log) == expected
    assert 1 <= len(again.calls) <= 2
    assert log.stat().st_size == len(whole)


def test_a_log_cut_inside_its_header_starts_anew(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"header":{"for')
    assert results(ScriptedEngine(FORK), log) == results(ScriptedEngine(FORK), None)


def test_rollouts_of_other_settings_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    results(ScriptedEngine(FORK), log)
    with pytest.raises(ValueError, match="seed 0 → 1"):
        results(ScriptedEngine(FORK), log, seed=1)


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    results(ScriptedEngine(FORK), log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"log\.jsonl:3: not a rollout log line"):
        results(ScriptedEngine(FORK), log)


def test_the_same_id_with_another_prompt_is_not_taken_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    results(ScriptedEngine(FORK), log)
    engine = ScriptedEngine(FORK)
    renamed = [replace(p, id=f"q{i}") for i, p in enumerate(problems(9)[6:])]
    list(pivotal.search(engine, renamed, oracle, log=log, **ARGUMENTS))
    assert engine.calls


KILLED = """
import os, signal, sys
from pathlib import Path
from pivotal_world import FORK, ScriptedEngine
from test_pivotal_resume import results

class Killed(ScriptedEngine):
    def generate(self, *arguments, **named):
        if len(self.calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*arguments, **named)

results(Killed(FORK), Path(sys.argv[1]))
"""


def test_kill_nine(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(log)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    again = ScriptedEngine(FORK)
    undisturbed = ScriptedEngine(FORK)
    assert results(again, log) == results(undisturbed, None)
    assert len(again.calls) < len(undisturbed.calls)
