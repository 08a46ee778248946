"""The pipe: requests and replies, noise, crashes, hangs; a contestant that waits takes no time."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from phiforge.bench.contestant import Contestant, ContestantFailed
from phiforge.bench.environments import PEERS
from phiforge.bench.processor import Watch, busy_seconds

DRIVERS = PEERS["transformers"].script.parent
SCRIPT = """
    import os, sys, time
    sys.path.insert(0, {drivers!r})
    import protocol

    class State:
        about = {{"version": "1"}}

    def prepare(request):
        print("loading", request["model"])
        return State()

    def run(state, request):
        print("noise on standard output", flush=True)
        act = request.get("act")
        if act == "crash":
            print("something broke", file=sys.stderr, flush=True)
            os._exit(3)
        if act == "signal":
            os.kill(os.getpid(), 9)
        if act == "raise":
            raise ValueError("no such size")
        if act == "hang":
            time.sleep(60)
        return {{"seconds": 1.0, "tokens": request["tokens"]}}

    protocol.serve(prepare, run)
"""


def start(folder: Path, script: str = SCRIPT) -> Contestant:
    file = folder / "driver.py"
    file.write_text(textwrap.dedent(script).format(drivers=str(DRIVERS)))
    return Contestant("it", [sys.executable, str(file)], os.environ, folder / "log")


@pytest.fixture
def contestant(tmp_path):
    with start(tmp_path) as found:
        assert found.ask({"do": "prepare", "model": "m"}, 30) == {"about": {"version": "1"}}
        yield found


def test_a_run_is_answered_with_time_and_memory_and_noise_goes_to_the_log(contestant):
    reply = contestant.ask({"do": "run", "tokens": 7}, 30)
    assert reply["tokens"] == 7
    assert reply["peak_bytes"] > 1e6
    assert 0 <= reply["cpu_seconds"] < 5
    assert "noise on standard output" in contestant.log.read_text()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("crash", "ended with exit code 3: loading m | noise on standard output | something broke"),
        ("signal", "was ended by signal 9 (SIGKILL)"),
        ("raise", "ValueError: no such size"),
    ],
)
def test_a_failure_says_what_happened(contestant, act, expected):
    with pytest.raises(ContestantFailed) as failed:
        contestant.ask({"do": "run", "act": act, "tokens": 1}, 30)
    assert str(failed.value) == expected
    with pytest.raises(ContestantFailed):
        contestant.ask({"do": "run", "tokens": 1}, 30)


def test_a_hang_ends_after_the_time_allowed(contestant):
    began = time.monotonic()
    with pytest.raises(ContestantFailed, match=r"gave no answer within 0\.3 s"):
        contestant.ask({"do": "run", "act": "hang", "tokens": 1}, 0.3)
    contestant.close()
    assert time.monotonic() - began < 4
    with pytest.raises(ProcessLookupError):
        os.kill(contestant.pid, 0)


def test_an_answer_that_is_no_json_is_refused(tmp_path):
    with (
        start(tmp_path, "print('hello', flush=True); input()") as found,
        pytest.raises(ContestantFailed, match="something else than JSON: b'hello'"),
    ):
        found.ask({"do": "prepare"}, 30)


def test_a_program_that_cannot_start_its_work_is_named(tmp_path):
    with (
        start(tmp_path, "import no_such_module") as found,
        pytest.raises(ContestantFailed, match="ModuleNotFoundError: No module named"),
    ):
        found.ask({"do": "prepare"}, 30)


def test_closing_ends_the_process(tmp_path):
    found = start(tmp_path)
    found.ask({"do": "prepare", "model": "m"}, 30)
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(found.pid, 0)


@pytest.mark.skipif(busy_seconds() is None, reason="no /proc/stat here")
def test_who_waits_takes_no_processor_time(tmp_path):
    """torch's threads included: after a product they spin for milliseconds at most."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-m", "phiforge.bench.limits"]
    shapes = [{"m": 64, "k": 64, "n": 64, "count": 1, "backward": False}]
    with Contestant("limits", command, environment, tmp_path / "log") as found:
        found.ask({"do": "prepare", "device": "cpu", "buffer_bytes": 2**20}, 60)
        reply = found.ask({"do": "run", "dtypes": ["fp32"], "shapes": shapes}, 60)
        assert reply["bytes_per_second"] > 0
        assert reply["matmul"]["fp32"]["flops_per_second"] > 0
        # Threads that never sleep would fail every time; on a busy machine the first may be late.
        assert any(ticks_taken(found.pid, 0.3) <= 1 for _ in range(10))


def ticks_taken(pid: int, seconds: float) -> int:
    """Processor time a process takes in a while."""
    before = cpu_ticks(pid)
    time.sleep(seconds)
    return cpu_ticks(pid) - before


def cpu_ticks(pid: int) -> int:
    """Hundredths of seconds of processor time a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_share_of_others_is_what_is_left_of_the_busy_time(monkeypatch):
    busy = iter((10.0, 10.5, 20.0, 20.0, 30.0, 30.0))
    clock = iter((0.0, 1.0, 0.0, 1.0, 0.0, 0.1))
    monkeypatch.setattr("phiforge.bench.processor.busy_seconds", lambda: next(busy))
    monkeypatch.setattr("phiforge.bench.processor.cores", lambda: [0, 1])
    monkeypatch.setattr("phiforge.bench.processor.time.perf_counter", lambda: next(clock))
    assert Watch().foreign_share(0.3) == pytest.approx(0.1)
    assert Watch().foreign_share(0.3) == 0.0, "rounding of clocks is no negative share"
    assert Watch().foreign_share(0.0) is None, "too short to say"
