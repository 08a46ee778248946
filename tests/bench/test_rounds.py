"""Turns: everyone once a round, another one first each time; who fails is out, others go on."""

from typing import Any

import pytest

from phiforge.bench.contestant import ContestantFailed
from phiforge.bench.engine_plan import tiny_config
from phiforge.bench.figures import Sample
from phiforge.bench.plan import LIMIT, PEAK, Comparison, Entrant, Group, Work
from phiforge.bench.results import summarize, wrong
from phiforge.bench.rounds import Played, order, play
from phiforge.bench.table import text

LIMITS = {
    "bytes_per_second": 1e9,
    "matmul": {"fp32": {"flops_per_second": 1e12}, "bf16": {"flops_per_second": 2e12}},
}


class Fake:
    """Answers from a script: seconds per round, or an exception."""

    def __init__(self, label: str, log: list[str], answers: dict[int, Any] | None = None) -> None:
        self.label, self.log, self.answers = label, log, answers or {}
        self.closed = False

    def ask(self, request, timeout_seconds):
        if request["do"] == "prepare":
            found = self.answers.get("prepare")
            if isinstance(found, Exception):
                raise found
            return {"about": {"name": self.label}}
        if self.label == "limits":
            return LIMITS
        self.log.append(f"{request['round']}:{self.label}")
        answer = self.answers.get(request["round"], 1.0)
        if isinstance(answer, Exception):
            raise answer
        seconds, tokens = answer if isinstance(answer, tuple) else (answer, [[1, 2, 3]])
        return {
            "seconds": seconds,
            "tokens": 12,
            "token_ids": tokens,
            "cpu_seconds": 0.0,
            "peak_bytes": 5_000_000,
        }

    def close(self):
        self.closed = True


def entrant(label: str, program: str = "peer", dtype: Any = "fp32") -> Entrant:
    return Entrant(label, program, {}, dtype)


def group(*entrants: Entrant, **changes: Any) -> Group:
    fields: dict[str, Any] = {
        "name": "g",
        "title": "g: a group",
        "task": "engine",
        "device": "cpu",
        "config": tiny_config(),
        "entrants": entrants,
        "works": (Work("w", "a work", lambda round: {"round": round}, rows=1, context=10),),
        "limits": {"dtypes": ["fp32"], "shapes": []},
    }
    return Group(**{**fields, **changes})


def played(found: Group, answers: dict[str, dict], repeat: int = 3):
    log: list[str] = []
    fakes: dict[str, Fake] = {}

    def start(one):
        label = one.label if one else "limits"
        fakes[label] = Fake(label, log, answers.get(label))
        return fakes[label]

    result = play(found, start, repeat, 1.0, lambda line: None)
    assert all(fake.closed for fake in fakes.values())
    return result, log


def test_everyone_comes_once_a_round_and_another_one_begins_each_time():
    _, log = played(group(*map(entrant, "abc")), {})
    rounds = [[line.split(":")[1] for line in log if line.startswith(f"{r}:")] for r in range(3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert log[:3] == ["-1:a", "-1:b", "-1:c"], "a warm-up before them"
    assert order([], 5) == []


def test_who_crashes_is_out_and_named_and_the_others_go_on():
    crash = {1: ContestantFailed("ended with exit code 3")}
    refusal = {"prepare": ContestantFailed("no compiler")}
    result, log = played(group(*map(entrant, "abc")), {"b": crash, "c": refusal})
    assert result.failures == {
        "b": "in w, round 2: ended with exit code 3",
        "c": "while preparing: no compiler",
    }
    assert [line for line in log if line.endswith(":b")] == ["-1:b", "0:b", "1:b"]
    assert [line for line in log if line.endswith(":a")] == ["-1:a", "0:a", "1:a", "2:a"]
    summary = summarize(group(*map(entrant, "abc")), result)
    assert [row["label"] for row in summary["works"][0]["rows"]] == ["a"]
    assert wrong(summary) == [
        "c failed while preparing: no compiler",
        "b failed in w, round 2: ended with exit code 3",
    ]


def test_an_entrant_takes_part_in_its_works_alone():
    other = Work("v", "another", lambda round: {"round": round}, rows=1, context=10)
    first = Entrant("a", "peer", {}, "fp32", works=("v",))
    found = group(first, entrant("b"), works=(*group().works, other))
    _, log = played(found, {}, repeat=1)
    assert log == ["-1:b", "0:b", "-1:a", "-1:b", "0:a", "0:b"]


def test_figures_are_medians_and_ratios_are_paired_by_round():
    ours = {-1: 99.0, 0: 1.0, 1: 2.0, 2: 4.0}  # the machine gets slower for both
    peer = {-1: 1.0, 0: 2.0, 1: 4.0, 2: 10.0}
    found = group(
        entrant("mine", "phiforge"),
        entrant("theirs"),
        comparisons=(
            Comparison("w", "mine", "theirs", 1.9),
            Comparison("w", "mine", LIMIT, 0.5),
            Comparison("w", "mine", PEAK),
            Comparison("w", "mine", "absent", 1.0),
        ),
        peak_flops=1e9,
    )
    result, _ = played(found, {"mine": ours, "theirs": peer})
    summary = summarize(found, result)
    (work,) = summary["works"]
    mine, theirs = work["rows"]
    assert work["baseline"] == "mine"
    assert mine["tokens_per_second"] == 6.0  # median of 12, 6 and 3
    assert (mine["low"], mine["high"]) == (3.0, 12.0)
    assert theirs["ours_over_this"] == {"median": 2.0, "low": 2.0, "high": 2.5}
    matrices = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160) + 320 * 64
    assert mine["limit"] == "memory"
    assert mine["limit_share"] == pytest.approx(6.0 * 4 * matrices / 1e9)
    ratio, share, peak = work["comparisons"]
    assert (ratio["median"], ratio["reached"]) == (2.0, True)
    assert (share["reached"], share["high"]) == (False, pytest.approx(2 * share["median"]))
    assert peak["median"] == pytest.approx(mine["gigaflops_per_second"])
    assert len(mine["rounds"]) == 4, "the warm-up is recorded too"


def test_greedy_tokens_must_be_the_same_where_they_must():
    other = (1.0, [[1, 9, 3]])
    found = group(
        *(entrant("mine", "phiforge"), entrant("same"), entrant("rounded"), entrant("broken")),
        reference="mine",
        must_equal=("same", "broken"),
    )
    answers = {"rounded": {1: other}, "broken": {2: other}}
    result, _ = played(found, answers)
    (work,) = summarize(found, result)["works"]
    assert [row["same_tokens"] for row in work["rows"]] == [1.0, 1.0, 1 / 3, 1 / 3]
    assert work["differs"] == ["w: broken gives other greedy tokens than mine (33.3%)"]


def test_the_table_says_everything():
    found = group(
        entrant("phiforge native fp32", "phiforge"),
        entrant("slow"),
        comparisons=(Comparison("w", "phiforge native fp32", "slow", 3.0),),
        reference="phiforge native fp32",
    )
    result, _ = played(found, {"slow": {0: 2.0, 1: 2.0, 2: 2.0}})
    report = {
        "date": "2026-01-01 00:00 UTC",
        "machine": {"processor": "P", "cores": 2},
        "threads": 2,
        "repeat": 3,
        "quick": True,
        "skipped": ["litgpt: skipped, no environment at x; `phiforge bench setup litgpt` makes it"],
        "groups": [summarize(found, result)],
    }
    lines = text(report).splitlines()
    assert (
        "limits in this run: memory read 1.0 GB/s; matrix products of these shapes fp32 1,000, "
        "bf16 2,000 GFLOP/s" in lines
    )
    rows = [line.split() for line in lines if line.startswith(("phiforge", "slow"))]
    assert rows[0][:5] == ["phiforge", "native", "fp32", "12.0", "1"]
    assert rows[1][:3] == ["slow", "6.0", "2.00"]
    assert "(2.00..2.00)" in rows[1]
    assert "same" in rows[1]
    assert "  phiforge native fp32 / slow: 2.00 (2.00..2.00), aim 3: missed" in lines
    assert any("bench setup litgpt" in line for line in lines)
    assert lines[-1].startswith("--quick shows")


def test_the_first_losses_must_be_alike():
    def with_losses(label: str, *rounds: list[float]) -> list[Sample]:
        made = enumerate(rounds, -1)
        return [
            Sample("w", number, label, 1.0, 1, 0.0, None, 1, losses=losses)
            for number, losses in made
        ]

    found = group(
        *(entrant("mine", "phiforge"), entrant("alike"), entrant("other")),
        task="train",
        reference="mine",
        must_equal=("alike", "other"),
    )
    result = Played(
        samples=[
            *with_losses("mine", [8.0], [7.0, 6.0]),
            *with_losses("alike", [8.0], [7.0, 6.006]),
            *with_losses("other", [8.0], [7.7, 6.0]),
        ]
    )
    (work,) = summarize(found, result)["works"]
    assert work["differs"] == [
        "w: other: the first losses differ from mine's by 10.00%, more than 0.5%"
    ]
