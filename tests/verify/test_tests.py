"""Verdicts on bad and on unusual solutions, in the real sandbox, warm and cold."""

import signal

import pytest
from square import QUICK, RIGHT, SQUARE

from phiforge.verify.sandbox import SandboxUnavailable
from phiforge.verify.tests import (
    CallTest,
    DocTest,
    FunctionTest,
    InputOutputTest,
    check,
    matrix,
)

# What is wrong with no intent: (source, verdict, a part of the detail).
BAD = {
    "wrong": ("def square(x): return x", "fail", "candidate(3) == 9: compared 3 with 9"),
    "raises": ("def square(x): return x / 0", "fail", "ZeroDivisionError: division by zero in"),
    "another name": ("def squared(x): return x * x", "fail", "name 'square' is not defined"),
    "empty": ("", "fail", "name 'square' is not defined"),
    "not a function": ("square = 9", "fail", "TypeError"),
    "syntax": ("def square(x:\n", "fail", "SyntaxError"),
    "indentation": ("def square(x):\nreturn x", "fail", "IndentationError"),
    "null byte": ("x = 1\0", "fail", "null"),
    "surrogate": ("x = '\ud800'", "fail", "UnicodeEncodeError"),
    "nested parentheses": ("(" * 5000 + ")" * 5000, "fail", "SyntaxError"),
    "nested minus": ("x = " + "-" * 200_000 + "1", "fail", "SyntaxError"),
    "nested calls": ("x = " + "f(" * 90 + ")" * 90, "fail", "'f' is not defined"),
    "a megabyte of lines": ("x = 1\n" * 170_000 + "def square(x): return 0", "fail", ""),
    "a megabyte of text": (f"{'x' * 10**6!r}\ndef square(x): return 0", "fail", "candidate(3)"),
    "deep recursion": ("def square(x): return square(x)", "fail", "RecursionError"),
    "endless loop": ("def square(x):\n    while True: pass", "timeout", "stopped"),
    "endless loop at import": ("while True: pass", "timeout", "stopped"),
    "sleeps": ("import time\ndef square(x): time.sleep(60)", "timeout", "stopped"),
    "endless del": (
        "class A:\n    def __del__(self):\n        while True: pass\ndef square(x): A()",
        "timeout",
        "stopped",
    ),
    "memory": ("def square(x): return [0] * 10**9", "memory", ""),
    "memory, bit by bit": ("x = []\nwhile True: x.append(bytearray(10**6))", "memory", ""),
    "too much output": ("while True: print('x' * 1000)", "crash", "too much output"),
    "too much on disk": (
        "def square(x):\n    with open('big', 'wb') as f:\n"
        "        while True: f.write(bytes(10**6))",
        "crash",
        "",
    ),
    "segmentation fault": ("import os\nos.kill(os.getpid(), 11)", "crash", "SIGSEGV"),
    "abort": ("import os\nos.abort()", "crash", "SIGABRT"),
    "base exception": (
        "class Odd(BaseException): pass\ndef square(x): raise Odd('x')", "fail", "Odd: x",
    ),
    "message cannot be made": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\n"
        "def square(x): raise Odd",
        "fail",
        "Odd: (its message",
    ),
    "message never ends": (
        "class Odd(Exception):\n    def __str__(self):\n        while True: pass\n"
        "def square(x): raise Odd",
        "timeout",
        "",
    ),
    "message prints for ever": (
        "class Odd(Exception):\n    def __str__(self):\n        while True: print('x' * 10000)\n"
        "def square(x): raise Odd",
        "crash",
        "too much output",
    ),
    "huge message": ("def square(x): raise ValueError('y' * 10**7)", "fail", "ValueError: yyy"),
    "message of surrogates": ("def square(x): raise ValueError('\\ud800')", "fail", "Error: ?"),
    "interrupt": ("def square(x): raise KeyboardInterrupt", "fail", "KeyboardInterrupt"),
    "generator exit": ("def square(x): raise GeneratorExit", "fail", "GeneratorExit"),
    "asks for input": ("def square(x): return int(input())", "fail", "EOFError"),
    "network": (
        "import socket\ndef square(x):\n    socket.create_connection(('127.0.0.1', 9), 1)",
        "refused",
        "Error",
    ),
    "writes outside": ("def square(x): open('/usr/lib/x', 'w')", "refused", "Error"),
    "catches the refusal": (
        "def square(x):\n    try: open('/usr/lib/x', 'w')\n    except OSError: return 0",
        "fail",
        "candidate(3) == 9",
    ),
    "its own PermissionError": ("def square(x): raise PermissionError", "fail", "Permission"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_code_is_a_verdict(sandbox, name):
    source, verdict, part = BAD[name]
    result = check(sandbox, source, SQUARE, QUICK)
    assert (result.verdict, part in result.detail) == (verdict, True), result
    result.detail.encode()


# Right solutions that do something unusual on the way: they pass.
UNUSUAL = {
    "plain": "",
    "prints": "print('x' * 5000)",
    "thread left running": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,)).start()",
    "exit function": "import atexit\natexit.register(lambda: 1 / 0)",
    "other stdout": "import sys\nsys.stdout = None",
    "odd stdout": "import sys\nclass Odd: pass\nsys.stdout = sys.stderr = Odd()",
    "closed stdout": "import sys\nsys.stdout.close()",
    "no modules": "import sys\nsys.modules.clear()",
    "other builtins": "import builtins\nfor n in ('len', 'isinstance', 'type', 'dict', 'str'):\n"
    "    setattr(builtins, n, None)",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(1)",
    "main guard": "if __name__ == '__main__':\n    raise SystemExit('not here')",
    "tracing": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)",
    "deep": "import sys\nsys.setrecursionlimit(9000)\n"
    "def deep(n): return n and 1 + deep(n - 1)\nassert deep(5000) == 5000",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
    "namedtuple": "from collections import namedtuple\nP = namedtuple('P', 'x y')(1, 2)",
    "enum": "from enum import Enum\nclass Colour(Enum):\n    RED = 1",
    "fraction": "from fractions import Fraction\nold = float",
    "pickle": "import pickle\nclass A: pass\npickle.loads(pickle.dumps([A(), len, ValueError]))",
    "windows lines": "x = 1\r\nif x:\r\n    y = 2\r\n",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_but_right_code_passes(sandbox, name):
    result = check(sandbox, f"{UNUSUAL[name]}\n{RIGHT}", SQUARE, QUICK)
    assert result.verdict == "pass", result


def test_results_of_library_classes_and_of_tested_classes_are_compared(warm):
    fraction = FunctionTest("from fractions import Fraction\nassert half() == Fraction(1, 2)")
    source = "from fractions import Fraction\ndef half(): return Fraction(1, 2)"
    assert check(warm, source, fraction).verdict == "pass"
    point = FunctionTest("assert Point(1, 2) + Point(3, 4) == Point(4, 6)\nassert 3 in Point(3, 1)")
    source = (
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n    y: int\n"
        "    def __add__(self, o): return Point(self.x + o.x, self.y + o.y)\n"
        "    def __contains__(self, n): return n in (self.x, self.y)\n"
    )
    assert check(warm, source, point).verdict == "pass"
    assert check(warm, source.replace("self.y + o.y", "0"), point).verdict == "fail"
    same = FunctionTest("assert copy_of(make()) == make()\nassert make().x == 1")
    more = "def make(): return Point(1, 2)\ndef copy_of(p): return Point(p.x, p.y)"
    assert check(warm, source + more, same).verdict == "pass"


def test_a_builtin_name_is_the_solutions_only_where_the_test_means_it(warm):
    source = "def sum(a, b): return a * b\n"
    assert check(warm, source, FunctionTest("assert sum(3, 4) == 12")).verdict == "pass"
    other = source + "def total(xs): return 7"
    assert check(warm, other, FunctionTest("assert total([]) == sum([3, 4])")).verdict == "pass"
    assert check(warm, other, FunctionTest("assert sum(3, 4) == 12", "sum")).verdict == "pass"


def test_setup_runs_among_the_solutions_names(warm):
    test = FunctionTest("assert depth(root) == 1", setup="root = Node(None)\nLIMIT = 1")
    source = "class Node:\n    def __init__(self, n): self.n = n\ndef depth(n): return LIMIT"
    assert check(warm, source, test).verdict == "pass"
    assert check(warm, "def depth(n): return 1", test).detail.startswith("NameError: name 'Node'")


def test_a_test_may_import_the_solution_and_packages(sandbox):
    test = FunctionTest(
        "from solution import double\nimport numpy as np\nimport numpy.testing as testing\n"
        "assert (double(np.arange(3)) == np.array([0, 2, 4])).all()\n"
        "assert np.allclose(double(0.1), 0.2)\n"
        "testing.assert_array_equal(double(np.ones(2)), [2, 2])\n"
        "assert double(np.float64(1.5)) == 3.0"
    )
    assert check(sandbox, "def double(x): return 2 * x", test).passed
    result = check(sandbox, "def double(x): return x + 1.5", test)
    assert (result.verdict, "np.array" in result.detail) == ("fail", True)
    lying = "import numpy as np\nnp.allclose = lambda *a: True\n"
    assert not check(
        sandbox, f"{lying}def double(x): return 2 * (x if np.ndim(x) else 9)", test
    ).passed


def test_random_inputs_are_the_same_every_time(warm):
    text = "import random\ndraws = [random.random() for _ in range(3)]\nassert f(draws) == 0"
    source = "def f(draws): return draws"
    details = {check(warm, source, FunctionTest(text)).detail for _ in range(3)}
    assert len(details) == 1
    assert "compared [0.8444" in details.pop()


@pytest.mark.parametrize(
    ("test", "entry_point", "problem"),
    [
        ("def check(candidate): pass", "square", "checks nothing"),
        ("def check(candidate):\n    assert candidate(1)", None, "entry_point"),
        ("x = square(3)", None, "checks nothing"),
        ("def verify():\n    assert square(3) == 9", None, "nothing would run"),
        (
            "'Text.'\nimport unittest\nclass T(unittest.TestCase):\n"
            "    def test(self): self.assertEqual(square(3), 8)\n"
            "if __name__ == '__main__':\n    unittest.main()",
            "square",
            "nothing would run",
        ),
        ("assert square(3 ==", None, "does not compile"),
        ("assert " + "-" * 100_000 + "1", None, "does not compile"),
    ],
)
def test_a_test_that_cannot_be_used_is_its_authors_fault(sandbox, test, entry_point, problem):
    broken = FunctionTest(test, entry_point, name="problem 7")
    with pytest.raises(ValueError, match=rf"problem 7.*{problem}"):
        check(sandbox, RIGHT, broken)


def test_tests_that_would_pass_anything_are_refused_when_made():
    with pytest.raises(ValueError, match="test of p1 is empty"):
        FunctionTest(" \n", name="p1")
    with pytest.raises(ValueError, match="examples of p2 hold no line"):
        DocTest("square(3) is 9", name="p2")
    with pytest.raises(ValueError, match="tolerance of p3 is 2"):
        InputOutputTest("", "1", tolerance=2, name="p3")
    with pytest.raises(ValueError, match="expected of p4 is not JSON"):
        CallTest("f", [], {1, 2}, name="p4")
    with pytest.raises(ValueError, match="entry_point of p5 is 'a b'"):
        FunctionTest("assert f()", "a b", name="p5")


def test_the_matrix_is_the_same_for_any_number_of_workers(warm):
    solutions = [RIGHT, "def square(x): return x", "1 / 0", RIGHT]
    tests = [SQUARE, CallTest("square", [1], 1), DocTest(">>> square(2)\n4\n")]
    wanted = [["pass"] * 3, ["fail", "pass", "fail"], ["fail"] * 3, ["pass"] * 3]
    for workers in (1, 3):
        results = matrix(warm, solutions, tests, workers=workers)
        assert [[cell.verdict for cell in row] for row in results] == wanted
        details = [[cell.detail for cell in row] for row in results]
        assert details[2] == ["ZeroDivisionError: division by zero"] * 3
    assert results[0] == results[3]
    assert matrix(warm, [], tests) == []
    assert matrix(warm, [RIGHT], []) == [[]]


class Recorded:
    """A sandbox that notes what it is asked to run."""

    def __init__(self, sandbox):
        self.sandbox, self.tasks = sandbox, []

    def run_many(self, tasks, limits, workers):
        tasks = list(tasks)
        self.tasks += tasks
        return self.sandbox.run_many(tasks, limits, workers)


def test_equal_solutions_are_run_once(warm):
    recorded = Recorded(warm)
    matrix(recorded, [RIGHT, "x = 1", RIGHT, RIGHT], [SQUARE, DocTest(">>> 1\n1\n")])
    assert [task["source"] for task in recorded.tasks] == [RIGHT, RIGHT, "x = 1", "x = 1"]


def test_stray_output_is_kept_and_cut(warm):
    result = check(warm, f"print('ä' * 9000)\n{RIGHT}", SQUARE)
    assert result.stdout.startswith("ää")
    assert "more)" in result.stdout
    assert len(result.stdout) < 4100


def test_sandbox_unavailable_is_never_a_verdict(warm):
    class Gone:
        def run_many(self, tasks, limits, workers):
            raise SandboxUnavailable("the server is gone")
            yield

    with pytest.raises(SandboxUnavailable):
        check(Gone(), RIGHT, SQUARE)


def test_signals_are_named():
    from phiforge.verify.sandbox import Outcome
    from phiforge.verify.tests import _ended

    def ended(number):
        return _ended(Outcome("signal", None, number, b"", b"", None, 1.0, 1.0, 0))

    assert ended(signal.SIGSYS)[0] == "refused"
    assert ended(signal.SIGXCPU)[0] == "timeout"
    assert ended(signal.SIGKILL) == ("crash", "ended by SIGKILL")
    assert ended(signal.SIGRTMIN + 3) == ("crash", f"ended by signal {signal.SIGRTMIN + 3}")
