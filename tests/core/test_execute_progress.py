"""Shard mapping keeps order and errors; progress prints rate, heartbeat and what it is told."""

import io
import os
import time

import pytest

from phiforge.core import progress as progress_module
from phiforge.core.execute import map_shards
from phiforge.core.progress import Bar, MetricsLog, clock, short


def square(x: int) -> int:
    return x * x


def fail_on_three(x: int) -> int:
    if x == 3:
        raise ValueError("item 3 is bad")
    return x


def die(x: int) -> int:
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    assert list(map_shards(square, range(20), workers)) == [x * x for x in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_reach_the_caller(workers):
    results = map_shards(fail_on_three, range(10), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3 is bad"):
        next(results)


def test_dead_worker_is_explained():
    with pytest.raises(RuntimeError, match="worker died"):
        list(map_shards(die, range(3), 2))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="workers is 0"):
        list(map_shards(square, [], 0))
    with pytest.raises(ValueError, match="engine is 'slurm'"):
        list(map_shards(square, [], 1, engine="slurm"))


def test_plain_lines_when_not_a_terminal(monkeypatch):
    monkeypatch.setattr(progress_module, "HEARTBEAT_SECONDS", 0.05)
    stream = io.StringIO()
    with Bar(100, "steps", "toy", stream) as bar:
        bar.advance(50, loss=2.0)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3
    assert "50%" in lines[0]
    assert "loss 2" in lines[0]
    assert "eta" in lines[0]


def test_resumed_rate_counts_new_work_only():
    bar = Bar(100, "steps", "toy", io.StringIO())
    bar.start_at(90)
    assert "0 steps/s" in bar.line()
    assert "90%" in bar.line()


def test_short_numbers_and_clock():
    assert [short(x) for x in (0, 0.5, 12345, 3.1e6, 2e-5, "x")] == [
        "0", "0.5", "12.3k", "3.1M", "2.0e-05", "x",
    ]  # fmt: skip
    assert [clock(s) for s in (7, 185, 3723)] == ["0:07", "3:05", "1:02:03"]


def test_metrics_log_rewinds_past_a_cut_line(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(5):
        log.write(step=step, loss=1.0)
    with open(log.path, "a") as file:
        file.write('{"step": 9, "lo')
    log.rewind("step", 2)
    assert [line[:10] for line in log.path.read_text().splitlines()] == [
        '{"step": 0', '{"step": 1', '{"step": 2',
    ]  # fmt: skip


@pytest.mark.slow
def test_ray_gives_the_same_results_in_the_same_order():
    ray = pytest.importorskip("ray")
    try:
        # A function that Ray's workers can import: this module is none of theirs.
        found = list(map_shards(clock, range(200), 2, engine="ray"))
        assert found == [clock(x) for x in range(200)]
    finally:
        ray.shutdown()
