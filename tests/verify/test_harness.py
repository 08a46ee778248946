"""The harness by itself, in plain processes: it behaves as Python does, and raises nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import phiforge

FOLDER = Path(phiforge.__file__).parent / "verify" / "sandbox"
START = """
import json, os, sys
sys.path.insert(0, {folder!r})
import jail.harness
task, report = (int(x) for x in sys.argv[1:])
answer = jail.harness.run(json.loads(os.fdopen(task).read()))
os.write(report, json.dumps(answer).encode())
os._exit(answer[0])
"""


def run(stdin="", **task):
    """(exit code of the process, what the harness answered, stdout, stderr)."""
    task_file, report_read, report_write = os.memfd_create("task"), *os.pipe()
    os.write(task_file, json.dumps(task).encode())
    os.lseek(task_file, 0, 0)
    command = [sys.executable, "-I", "-S", "-c", START.format(folder=str(FOLDER))]
    done = subprocess.run(
        [*command, str(task_file), str(report_write)],
        pass_fds=(task_file, report_write),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    os.close(report_write)
    os.close(task_file)
    with os.fdopen(report_read) as file:
        answer = file.read()
    return done.returncode, json.loads(answer) if answer else None, done.stdout, done.stderr


PROGRAMS = {
    "prints": "print('a')",
    "argv and name": "import sys\nprint(sys.argv[1:], __name__)",
    "input": "print(input())",
    "exit code": "import sys\nsys.exit(7)",
    "exit code of a byte": "raise SystemExit(258)",
    "negative exit code": "raise SystemExit(-1)",
    "exit with a text": "import sys\nsys.exit('over')",
    "exit without a code": "raise SystemExit",
    "exit with a flag": "raise SystemExit(True)",
    "exception": "def f():\n    return 1 / 0\nf()",
    "chained exceptions": "try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError from e",
    "syntax error": "x = (1,\nprint(x",
    "indentation error": "if 1:\nx",
    "recursion": "def f(n):\n    print(n)\n    f(n + 1)\ntry: f(2)\nexcept RecursionError: pass",
    "thread": "import threading, time\n"
    "def late():\n    time.sleep(0.1); print('late')\n"
    "threading.Thread(target=late).start(); print('early')",
    "exit functions": "import atexit\natexit.register(print, 'a'); atexit.register(print, 'b')",
    "exit function after an error": "import atexit\natexit.register(print, 'a')\n1 / 0",
    "failing exit function": "import atexit\natexit.register(divmod, 1, 0)",
    "own stdout": "import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False))\n"
    "print('held back')",
    "file of its own": "out = open(1, 'w', closefd=False)\nout.write('held back')",
    "no stdout": "import sys\nsys.stdout = None\nprint('x')",
    "finalizer": "class A:\n    def __del__(self): print('gone')\na = A()",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\nprint(P(1))",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))",
    "pool": "from concurrent.futures import ThreadPoolExecutor\n"
    "with ThreadPoolExecutor(2) as pool: print(list(pool.map(abs, [-1, -2])))",
    "fork": "import os\nif os.fork() == 0:\n    print('child', flush=True)\nelse:\n"
    "    os.wait(); print('parent')",
    "os._exit": "import os\nprint('kept', flush=True)\nos._exit(5)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_under_python(name, tmp_path):
    source = PROGRAMS[name]
    (tmp_path / "program.py").write_text(source)
    code, answer, stdout, stderr = run("a line\n", kind="program", source=source, argv=["1", "b"])
    plain = subprocess.run(
        [sys.executable, "-I", "-S", "program.py", "1", "b"],
        cwd=tmp_path, input="a line\n", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (code, stdout) == (plain.returncode, plain.stdout)
    if name == "failing exit function":  # Python shows who called it: nobody there, we here
        stderr, plain.stderr = stderr.splitlines()[-1], plain.stderr.splitlines()[-1]
    assert stderr == plain.stderr.replace(f"{tmp_path}/", "")
    assert (answer is None) == (name == "os._exit")


def test_the_report_names_an_uncaught_exception():
    report = run(kind="program", source="open('/no/such')")[1][1]
    assert (report["exception"], report["errno"], report["stage"]) == (
        "FileNotFoundError", 2, "program",
    )  # fmt: skip
    report = run(
        kind="program",
        source="import urllib.error as u\nraise u.URLError(PermissionError(13, 'no'))",
    )[1][1]
    assert (report["exception"], report["errno"]) == ("URLError", 13)
    assert run(kind="program", source="raise MemoryError")[1][1]["memory"] is True
    assert run(kind="program", source="x = (")[1][1]["line"] == 1


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"kind": "absent"},
        {"kind": None},
        {"kind": []},
        {"kind": "program"},
        {"kind": "program", "source": 3},
        {"kind": "function", "source": ""},
        {"kind": "function", "source": "", "test": "assert f(", "entry_point": None},
        {"kind": "call", "source": "", "entry_point": "f", "arguments": []},
        {"kind": "call", "source": "f = 1", "entry_point": "f", "arguments": None},
        {"kind": "doctest", "source": "", "examples": ">>>1"},
        {"kind": "program", "source": "x = '\ud800'\0"},
        {"kind": "program", "source": "-" * 300_000 + "1"},
        {"kind": "program", "source": "import sys\nsys.stdout = sys.stderr = 3\n1 / 0"},
        {"kind": "program", "source": "import sys, os\nos.close(1); os.close(2); print(1)"},
        {"kind": "program", "source": "import sys\nsys.setrecursionlimit(40)\n1 / 0"},
    ],
)
def test_whatever_the_task_there_is_an_answer(task):
    code, answer, _, _ = run(**task)
    assert answer is not None
    assert answer[0] == code
    assert code == 2 or "exception" in answer[1] or "fault" in answer[1] or code == 120


def test_the_seal_comes_back_only_from_the_end():
    task = {"kind": "function", "test": "assert f() == 1", "seal": "abc"}
    assert run(source="def f(): return 1", **task)[1] == [
        0,
        {"done": True, "held": 1, "seal": "abc"},
    ]
    failed = run(source="def f(): return 2", **task)[1]
    assert failed[0] == 1
    assert "seal" not in failed[1]
    assert "done" not in failed[1]


def test_the_harness_needs_the_standard_library_alone():
    """It also runs in another interpreter, without this package."""
    for name in ("harness.py", "checks.py", "examples.py"):
        for node in ast.walk(ast.parse((FOLDER / "jail" / name).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for module in names:
                assert module.partition(".")[0] in sys.stdlib_module_names, f"{name}: {module}"
