"""Whoever dies, and however often it runs: no process, descriptor, mount or folder is left.

Run: pytest tests/verify/sandbox/test_lifecycle.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from phiforge.verify.sandbox import Limits, Sandbox, SandboxUnavailable
from phiforge.verify.sandbox.hostile_context import processes_named

# Detached and deaf, and told apart from outside by its name.
STUBBORN = """
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
try:
    if os.fork() == 0:
        os.setsid()
except OSError:
    pass  # no new processes without namespaces
time.sleep(100)
"""
CLIENT = """
import sys
from phiforge.verify.sandbox import Limits, Sandbox
sandbox = Sandbox(without={without!r}, warm={warm!r})
sandbox.run({{"kind": "program", "source": {source!r}}}, Limits(wall_seconds=100))
"""
SETS = pytest.mark.parametrize(
    ("without", "warm"),
    [([], True), ([], False), (["namespaces"], True)],
    ids=["warm", "cold", "without namespaces"],
)


def program(source: str) -> dict[str, str]:
    return {"kind": "program", "source": source}


def eventually(true: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:
        return []


def family(pid: int) -> list[int]:
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def gone(pids: list[int]) -> bool:
    """Ended, be it as a zombie that this machine's first process has not looked after yet."""
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            return False
    return True


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that only this test and its sandboxes use."""
    with tempfile.TemporaryDirectory(prefix="lifecycle-") as folder:
        os.chmod(folder, 0o777)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def name() -> str:
    return f"pf{os.urandom(5).hex()}"


@SETS
def test_the_client_is_killed(temporary: Path, name: str, without: list[str], warm: bool):
    source = CLIENT.format(without=without, warm=warm, source=STUBBORN.format(name=name))
    client = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE)
    assert client.stdin
    client.stdin.write(source.encode())
    client.stdin.close()
    try:
        assert eventually(lambda: processes_named(name))
        everybody = family(client.pid)
        assert len(everybody) >= 3  # server, supervisor, program
    finally:
        client.kill()
        client.wait()
    assert eventually(lambda: gone(everybody) and not processes_named(name)), everybody
    assert eventually(lambda: not os.listdir(temporary)), os.listdir(temporary)


@SETS
def test_the_server_is_killed(temporary: Path, name: str, without: list[str], warm: bool):
    before = children(os.getpid())
    with Sandbox(without=without, warm=warm) as sandbox, ThreadPoolExecutor(1) as pool:
        (server,) = set(children(os.getpid())) - set(before)
        task = program(STUBBORN.format(name=name))
        running = pool.submit(sandbox.run, task, Limits(wall_seconds=100))
        assert eventually(lambda: processes_named(name))
        everybody = family(server)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(SandboxUnavailable):
            running.result()
        assert eventually(lambda: gone(everybody) and not processes_named(name)), everybody
        with pytest.raises(SandboxUnavailable):
            sandbox.run(program("print(1)"))
    assert eventually(lambda: not os.listdir(temporary)), os.listdir(temporary)


@SETS
def test_closed_during_runs(temporary: Path, name: str, without: list[str], warm: bool):
    before = set(family(os.getpid()))  # other tests keep helpers of their own
    sandbox = Sandbox(without=without, warm=warm)
    task = program(STUBBORN.format(name=name))
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(sandbox.run, task, Limits(wall_seconds=100)) for _ in range(3)]
        assert eventually(lambda: len(processes_named(name)) >= 3)
        everybody = [pid for pid in family(os.getpid()) if pid not in before]
        sandbox.close()
        for future in running:
            with pytest.raises(SandboxUnavailable):
                future.result()
    assert eventually(lambda: gone(everybody) and not processes_named(name)), everybody
    with pytest.raises(SandboxUnavailable):
        sandbox.run(program("print(1)"))
    sandbox.close()  # a second time: no error
    assert eventually(lambda: not os.listdir(temporary)), os.listdir(temporary)


@pytest.mark.parametrize(
    "without",
    [
        pytest.param([], id="all layers"),
        pytest.param(["namespaces"], id="without namespaces", marks=pytest.mark.slow),
    ],
)
def test_two_hundred_runs_leave_nothing(temporary: Path, without: list[str]):
    endings = [
        "print(1)",
        "raise ValueError",
        "import os; os.abort()",
        "import os; os.fork(); os.fork()",
        "open('file', 'w').write('x'); import os; os.makedirs('a/b/c')",
        "while True: print('x' * 10000)",
        "import sys, threading; threading.Thread(target=input).start(); sys.exit(3)",
        "x = [bytearray(2**24) for _ in range(99)]",
    ]
    mounts = Path("/proc/self/mountinfo").read_text
    with Sandbox(without=without) as sandbox:
        sandbox.run(program("print(1)"))
        before = (len(os.listdir("/proc/self/fd")), mounts(), children(os.getpid()))
        inside = sorted(os.listdir(temporary))
        tasks = [program(endings[i % len(endings)]) for i in range(200)]
        limits = Limits(memory_bytes=128 * 2**20, output_bytes=4096, cpu_seconds=5)
        endings_seen = {o.ended for o in sandbox.run_many(tasks, limits, workers=2)}
        assert endings_seen >= {"exited", "signal", "output"}
        assert (len(os.listdir("/proc/self/fd")), mounts(), children(os.getpid())) == before
        (server,) = children(os.getpid())[-1:]
        assert eventually(lambda: not children(server)), children(server)
        assert sorted(os.listdir(temporary)) == inside
        assert all(not os.listdir(temporary / entry) for entry in inside)
    assert os.listdir(temporary) == []


def test_many_threads_at_once():
    with Sandbox() as sandbox, ThreadPoolExecutor(8) as pool:
        tasks = [program(f"print({number})") for number in range(80)]
        outcomes = list(pool.map(sandbox.run, tasks))
    assert [o.stdout for o in outcomes] == [b"%d\n" % number for number in range(80)]


def _run_in_child(sandbox: Sandbox, connection) -> None:
    connection.send([sandbox.run(program(f"print({i})")).stdout for i in range(5)])
    connection.recv()


def test_a_fork_of_the_client_has_a_server_of_its_own(temporary: Path):
    context = multiprocessing.get_context("fork")
    with Sandbox() as sandbox:
        before = children(os.getpid())
        ours, theirs = context.Pipe()
        child = context.Process(target=_run_in_child, args=(sandbox, theirs))
        child.start()
        assert ours.recv() == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
        assert sandbox.run(program("print('parent')")).stdout == b"parent\n"
        theirs_too = family(child.pid or 0)
        ours.send("done")
        child.join()
        assert eventually(lambda: gone(theirs_too)), theirs_too
        assert sandbox.run(program("print('parent')")).stdout == b"parent\n"
        assert children(os.getpid()) == before
    assert eventually(lambda: not os.listdir(temporary)), os.listdir(temporary)


@pytest.mark.parametrize(
    "without",
    [["namespaces", "landlock"], ["namespaces", "seccomp"], ["namespaces", "landlock", "seccomp"]],
)
def test_without_isolation_nothing_runs_unless_told_so(temporary: Path, without: list[str]):
    with pytest.raises(SandboxUnavailable, match="isolated") as refusal:
        Sandbox(without=without, backend="native")
    assert "unsafe" in str(refusal.value)
    with Sandbox(without=without, backend="native", unsafe=True) as sandbox:
        assert set(sandbox.layers.missing) >= set(without)
        assert sandbox.run(program("print(1)")).stdout == b"1\n"
    assert eventually(lambda: not os.listdir(temporary)), os.listdir(temporary)


def test_threads_of_the_client_may_end_while_their_sandbox_lives():
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox()))
    thread.start()
    thread.join()
    with made[0] as sandbox:
        assert sandbox.run(program("print(1)")).stdout == b"1\n"


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64")])
def test_other_systems_are_refused_by_name(monkeypatch, system: str, machine: str):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(SandboxUnavailable, match=f"needs Linux.*{system} on {machine}"):
        Sandbox(unsafe=True)
