"""The other programs that isolate: bubblewrap and sandlock, each where it is installed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phiforge.bench import environments
from phiforge.verify.sandbox import Limits, Sandbox, SandboxUnavailable, backends, interpreter
from phiforge.verify.sandbox.jail import supervise, tree

if sys.platform != "linux":
    pytest.skip("the sandbox needs Linux", allow_module_level=True)

LIMITS = Limits(cpu_seconds=2, wall_seconds=10.0, memory_bytes=256 * 2**20, disk_bytes=2**20)
PUBLIC_PYTHON = Path("/usr/bin/python3")  # as root our own may lie where no other user can look


def python_with_sandlock() -> Path | None:
    """From the environment, this Python, or the one that `phiforge bench setup sandlock` made."""
    named = os.environ.get("PHIFORGE_SANDLOCK_PYTHON")
    python, _ = environments.find(environments.PEERS["sandlock"], {})
    candidates = [Path(named)] if named else [Path(sys.executable), *([python] if python else [])]
    for candidate in candidates:
        described = interpreter.describe(candidate)
        if backends.find("sandlock", described, "", [])[0]:
            return candidate
    return None


def public_python() -> Path | None:
    with contextlib.suppress(ValueError):
        interpreter.describe(PUBLIC_PYTHON)
        return PUBLIC_PYTHON
    return None


KINDS = {
    "bubblewrap": lambda: {"backend": "bubblewrap"} if shutil.which("bwrap") else None,
    "bubblewrap, any user's Python": lambda: (
        {"backend": "bubblewrap", "python": public_python()}
        if shutil.which("bwrap") and public_python()
        else None
    ),
    "bubblewrap alone": lambda: (
        {"backend": "bubblewrap", "without": ("landlock", "seccomp")}
        if shutil.which("bwrap")
        else None
    ),
    "sandlock": lambda: (
        {"backend": "sandlock", "python": python_with_sandlock()}
        if python_with_sandlock()
        else None
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def sandbox(request):
    options = KINDS[request.param]()
    if options is None:
        pytest.skip(f"not installed: {request.param}")
    try:
        opened = Sandbox(**options)
    except SandboxUnavailable as error:
        pytest.skip(f"{request.param} cannot isolate here: {error}")
    with opened:
        yield opened


def run(sandbox: Sandbox, source: str, limits: Limits = LIMITS, **more):
    return sandbox.run({"kind": "program", "source": source, **more}, limits)


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def gone(pids: list[int]) -> bool:
    """Whether all of them end; waits for the kernel to say so."""
    for _ in range(500):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


# --- benign ---------------------------------------------------------------------------------------


def test_layers_name_the_backend(sandbox):
    assert sandbox.layers.backend in ("bubblewrap", "sandlock")
    assert sandbox.layers.backend in sandbox.layers.active
    assert sandbox.layers.enough


def test_input_output_files_and_exit_code(sandbox):
    source = "import sys; print(open('a/b.txt').read() + input()); sys.exit(130)"
    outcome = run(sandbox, source, stdin="read me\n", files={"a/b.txt": "text "})
    assert (outcome.ended, outcome.returncode) == ("exited", 130)
    assert outcome.stdout == b"text read me\n"
    assert outcome.report == {}


def test_work_folder_is_home_and_writable(sandbox):
    source = (
        "import os, tempfile\n"
        "assert os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()\n"
        "with tempfile.TemporaryFile('w+') as f: f.write('x' * 1000)\n"
        "os.mkdir('d'); open('d/x', 'w').write('y'); print(open('d/x').read())\n"
    )
    outcome = run(sandbox, source)
    assert outcome.stdout == b"y\n", outcome.stderr


def test_signal_and_crash_are_told_apart_from_exit_codes(sandbox):
    assert (o := run(sandbox, "import os; os.abort()")).signal == signal.SIGABRT, o
    assert (o := run(sandbox, "import os; os._exit(134)")).returncode == 134, o
    assert o.report is None


def test_work_folders_are_removed(sandbox):
    before = set(os.listdir(sandbox._scratch))
    run(sandbox, "open('x', 'w').write('x')")
    assert set(os.listdir(sandbox._scratch)) == before


def test_many_at_once_keep_their_order(sandbox):
    tasks = [{"kind": "program", "source": f"print({i})"} for i in range(8)]
    outcomes = list(sandbox.run_many(tasks, LIMITS, workers=3))
    assert [int(outcome.stdout) for outcome in outcomes] == list(range(8))


def test_threads(sandbox):
    source = (
        "import threading\n"
        "t = [threading.Thread(target=print, args=(1,)) for _ in range(4)]\n"
        "[x.start() for x in t]; [x.join() for x in t]\n"
    )
    assert run(sandbox, source).stdout.count(b"1") == 4


# --- hostile --------------------------------------------------------------------------------------


def test_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        source = f"import socket; socket.create_connection({listener.getsockname()!r}, 1)"
        outcome = run(sandbox, source)
        assert outcome.returncode == 1
        assert b"Error" in outcome.stderr
        with pytest.raises(TimeoutError):
            listener.accept()


def test_files_outside(sandbox, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    for path in (tmp_path, *tmp_path.parents[:2]):  # other users may come this far
        if path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o755)
    secret.chmod(0o666)
    source = (
        f"for mode in 'r', 'w':\n"
        f"    try: print(open({str(secret)!r}, mode).read())\n"
        f"    except OSError as error: print('refused')\n"
        f"try: open({str(tmp_path / 'new')!r}, 'w')\n"
        f"except OSError as error: print('refused')\n"
    )
    outcome = run(sandbox, source)
    assert outcome.stdout == b"refused\n" * 3, outcome
    assert secret.read_text() == "the secret"
    assert list(tmp_path.iterdir()) == [secret]


def test_system_files_stay(sandbox):
    source = f"open({os.path.join(os.path.dirname(json.__file__), 'new.py')!r}, 'w')"
    assert run(sandbox, source).returncode == 1
    assert not os.path.exists(os.path.join(os.path.dirname(json.__file__), "new.py"))


def test_endless_loop(sandbox):
    assert run(sandbox, "while True: pass", Limits(cpu_seconds=1)).ended == "timeout"


def test_sleep(sandbox):
    outcome = run(sandbox, "import time; time.sleep(60)", Limits(wall_seconds=1.0))
    assert outcome.ended == "timeout"


def test_memory(sandbox):
    outcome = run(sandbox, "x = bytearray(2**30)")
    assert outcome.ended == "memory" or b"MemoryError" in outcome.stderr


@pytest.mark.parametrize(
    "source",
    [
        "for i in range(10**6): open(str(i), 'w').close()",
        "for i in range(100): open(str(i), 'wb').write(b'x' * 2**18)\nimport time; time.sleep(9)",
        "import os, time\nkept = []\nfor i in range(30):\n"
        "    kept.append(open('x', 'wb', 0)); os.unlink('x'); kept[-1].write(b'x' * 2**19)\n"
        "time.sleep(9)",
    ],
    ids=["files", "bytes", "deleted files"],
)
def test_disk(sandbox, source):
    assert run(sandbox, source).ended == "disk"


def test_output(sandbox):
    outcome = run(sandbox, "while True: print('x' * 10000)", Limits(output_bytes=1000))
    assert outcome.ended == "output"
    assert len(outcome.stdout) == 1000


def test_fork_bomb_and_daemon_leave_nothing(sandbox):
    source = (
        "import os, time\n"
        "try:\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        while True:\n"
        "            try: os.fork()\n"
        "            except OSError: time.sleep(0.1)\n"
        "except OSError: print('refused')\n"
        "time.sleep(0.5)\n"
    )
    before = children(sandbox._server.pid)
    outcome = run(sandbox, source)
    assert outcome.ended in ("exited", "timeout", "memory"), outcome
    assert gone([pid for pid in children(sandbox._server.pid) if pid not in before])


def test_first_process_cannot_be_interrupted(sandbox):
    source = "import os, time\nfor pid in (1, os.getppid(), 0):\n"
    source += "    try: os.kill(pid, 2 if pid else 0)\n    except OSError: pass\n"
    source += "time.sleep(0.2); print('done')"
    assert run(sandbox, source).stdout == b"done\n"


def test_a_killed_client_leaves_nothing(sandbox):
    options = {"backend": sandbox.layers.backend, "python": str(sandbox._python.executable)}
    script = (
        "import sys, threading, time, pathlib\n"
        "from phiforge.verify.sandbox import Sandbox\n"
        f"sandbox = Sandbox(backend={options['backend']!r}, python=pathlib.Path(sys.argv[1]))\n"
        "task = {'kind': 'program', 'source': 'import time; time.sleep(50)'}\n"
        "threading.Thread(target=sandbox.run, args=(task,), daemon=True).start()\n"
        "print(sandbox._server.pid, sandbox._scratch, flush=True)\n"
        "time.sleep(50)\n"
    )
    python = os.environ.get("PHIFORGE_SANDLOCK_PYTHON", sys.executable)
    chosen = python if options["backend"] == "sandlock" else options["python"]
    client = subprocess.Popen([sys.executable, "-c", script, chosen], stdout=subprocess.PIPE)
    assert client.stdout is not None
    server, scratch = client.stdout.readline().decode().split()
    family: list[int] = []
    for _ in range(500):  # until the program inside runs
        family = children(int(server))
        if any(b"wrapped" in command_of(pid) for pid in family) and len(family) >= 4:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the run did not begin")
    client.kill()
    client.wait()
    client.stdout.close()
    assert gone([int(server), *family])
    assert not os.path.exists(scratch)


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_auto_turns_to_bubblewrap():
    try:
        with Sandbox(without=("namespaces", "landlock")) as sandbox:
            assert sandbox.layers.backend == "bubblewrap"
            assert "files cannot be isolated" in sandbox.layers.missing["native"]
            assert run(sandbox, "print(1)").stdout == b"1\n"
    except SandboxUnavailable as error:
        pytest.skip(f"bubblewrap cannot isolate here: {error}")


def test_nothing_there_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    monkeypatch.setattr(backends.sys, "path", [])
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        Sandbox(backend="bubblewrap")
    empty = interpreter.Interpreter(sys.executable, (), ())
    wrapper, why = backends.find("sandlock", empty, "", [])
    assert wrapper is None
    assert "pip install sandlock" in why
    with pytest.raises(SandboxUnavailable, match=r"native: files .* bubblewrap: .*--unsafe"):
        Sandbox(without=("namespaces", "landlock"))


def test_unsafe_prefers_what_isolates(monkeypatch):
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    with Sandbox(without=("namespaces", "landlock"), unsafe=True) as sandbox:
        assert sandbox.layers.backend in ("native", "sandlock")
        assert sandbox.layers.enough == (sandbox.layers.backend == "sandlock")


def test_a_wrapper_that_does_not_isolate_is_found_out(monkeypatch, tmp_path):
    """A program of that name that only starts what stands behind `--`."""
    fake = tmp_path / "bwrap"
    lines = ["#!/bin/sh", '[ "$1" = --version ] && { echo bubblewrap 9; exit; }']
    lines += ['while [ "$1" != -- ]; do shift; done', "shift", 'exec "$@"']
    fake.write_text("\n".join(lines) + "\n")
    fake.chmod(0o755)
    monkeypatch.setattr(backends.shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxUnavailable, match="a file outside can be read"):
        Sandbox(backend="bubblewrap", without=("landlock", "seccomp"), unsafe=True)


def test_a_wrapper_that_fails_says_why(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo 9\necho no luck >&2; exit 3\n')
    fake.chmod(0o755)
    monkeypatch.setattr(backends.shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxUnavailable, match=r"no luck; .*ended with 3"):
        Sandbox(backend="bubblewrap")


def test_options_without_effect_are_refused():
    with pytest.raises(ValueError, match="preload: bubblewrap"):
        Sandbox(backend="bubblewrap", preload=["json"])
    with pytest.raises(ValueError, match="backend: 'docker'"):
        Sandbox(backend="docker")  # type: ignore[arg-type]


def test_bubblewrap_command_binds_read_only(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    command = backends.bubblewrap_command("bwrap", [str(tmp_path), str(inner), "/lib"])
    binds = [command[i + 1] for i, word in enumerate(command) if word == "--ro-bind"]
    assert str(tmp_path) in binds
    assert str(inner) not in binds
    writable = [command[i + 1] for i, word in enumerate(command) if word == "--bind"]
    assert writable == [supervise.WORK]
    assert command[command.index("--bind") + 2] == tree.WORK
    assert {"--unshare-all", "--unshare-user", "--die-with-parent"} <= set(command)
