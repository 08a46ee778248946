"""Solutions that cheat: none of the usual tricks passes; what a determined one can do is stated."""

import pytest
from square import QUICK, SQUARE

from phiforge.verify.tests import CallTest, check

# name: (source, verdict, a part of the detail). Every source would pass if its trick worked.
TRICKS = {
    "exit at once": ("raise SystemExit", "crash", "before its checks"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "crash", "SystemExit: 0"),
    "exit()": ("exit()", "crash", "SystemExit"),
    "os._exit(0)": ("import os\nos._exit(0)", "crash", "before its checks"),
    "exit in the call": ("def square(x):\n    raise SystemExit(0)", "crash", "SystemExit: 0"),
    "os._exit in the call": ("import os\ndef square(x):\n    os._exit(0)", "crash", "exit code 0"),
    "says that it passed": ("print('pass')\nprint({'done': True})", "fail", "square"),
    "writes a report everywhere": (
        "import os, json\nfor n in range(3, 40):\n"
        "    try: os.write(n, json.dumps({'done': True, 'held': 6}).encode())\n"
        "    except OSError: pass\nos._exit(0)",
        "crash",
        "before its checks",
    ),
    "defines check": ("def check(f): pass\ndef square(x): return 0", "fail", "candidate(3) == 9"),
    "equals everything": (
        "class Yes:\n    def __eq__(self, other): return True\ndef square(x): return Yes()",
        "fail",
        "Yes, which brings its own comparison",
    ),
    "a number that equals everything": (
        "class int(int):\n    def __eq__(self, other): return True\n"
        "    def __sub__(self, other): return 0\n    __ge__ = __eq__\n    __hash__ = None\n"
        "def square(x): return int(0)",
        "fail",
        "own comparison",
    ),
    "equals everything, in a list": (
        "class Yes:\n    def __eq__(self, other): return True\ndef square(x): return [{1: Yes()}]",
        "fail",
        "Yes, which",
    ),
    "equals everything, in a deque": (
        "from collections import deque\nclass Yes:\n    def __eq__(self, other): return True\n"
        "def square(x): return deque([Yes()])",
        "fail",
        "Yes, which",
    ),
    "disguised as a class of the library": (
        "class Fraction:\n    def __eq__(self, other): return True\n"
        "Fraction.__module__ = 'fractions'\ndef square(x): return Fraction()",
        "fail",
        "Fraction, which",
    ),
    "subtraction gives nought": (
        "class Near(float):\n    def __sub__(self, other): return 0.0\n"
        "def square(x): return x * x if x == 3 else Near(7)",
        "fail",
        "Near, which",
    ),
    "builtins.abs": (
        "import builtins\nbuiltins.abs = lambda x: 0\n"
        "def square(x): return 9 if x == 3 else 77 if x == 2 else x * x",
        "fail",
        "abs(candidate(2) - 4)",
    ),
    "own abs": (
        "def abs(x): return 0\ndef square(x): return 9 if x == 3 else 77 if x == 2 else x * x",
        "fail",
        "abs(candidate(2) - 4)",
    ),
    "own all and len": (
        "import builtins\nbuiltins.all = lambda x: True\ndef all(x): return True\n"
        "def square(x): return -1 if x == 0 else x * x",
        "fail",
        "all(candidate(x) >= 0",
    ),
    "math.isclose": (
        "import math\nmath.isclose = lambda *a, **k: True\n"
        "def square(x): return 1 if x == 1.5 else x * x",
        "fail",
        "math.isclose",
    ),
    "another math": (
        "import sys, types\nfake = types.ModuleType('math')\nfake.isclose = lambda *a: True\n"
        "sys.modules['math'] = fake\ndef square(x): return 1 if x == 1.5 else x * x",
        "fail",
        "math.isclose",
    ),
    "another AssertionError": (
        "import builtins\nclass AssertionError(Exception): pass\n"
        "builtins.AssertionError = AssertionError\ndef square(x): return 0",
        "fail",
        "candidate(3) == 9",
    ),
    "jumps over the asserts": (
        """
import sys
def jump(frame, event, argument):
    if event == "line" and frame.f_code.co_name == "check" and frame.f_lineno in (4, 5):
        frame.f_lineno = frame.f_lineno + 1
    return jump
def square(x):
    frame = sys._getframe(1)
    frame.f_trace = jump
    sys.settrace(jump)
    return x * x if x != 2 else 5
sys.settrace(jump)
""",
        "fail",
        "",
    ),
    "leaves check early": (
        """
import sys
def jump(frame, event, argument):
    if event == "line" and frame.f_code.co_name == "check":
        frame.f_lineno = 9
    return jump
def square(x):
    if x == 3:
        sys._getframe(1).f_trace = jump
        sys.settrace(jump)
        return 9
    return 16
""",
        "fail",
        "skipped",
    ),
    "forks and answers twice": (
        "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\ndef square(x): return 1",
        "fail",
        "candidate(3) == 9",
    ),
    "lowers the recursion limit": (
        "import sys\nsys.setrecursionlimit(60)\ndef square(x): return 0",
        "fail",
        "",
    ),
    "looks for the harness by name": (
        "import sys\nfor name in list(sys.modules):\n"
        "    if 'jail' in name or 'harness' in name: sys.modules[name].KINDS = {}\n"
        "import jail.harness\ndef square(x): return 0",
        "fail",
        "No module named 'jail'",
    ),
    "patches json": (
        "import json\nreal = json.dumps\n"
        "json.dumps = lambda r, **k: real({'seal': r.get('seal'), 'done': True, 'held': 9})\n"
        "def square(x): return 0",
        "fail",
        "compared 0 with 9",
    ),
    "the interpreter's own builtins": (
        "own = print.__self__\nown.any = own.all = lambda x: False\nown.abs = lambda x: 0\n"
        "own.isinstance = lambda *a: True\nown.type = lambda x: int\n"
        "class Yes:\n    def __eq__(self, other): return True\ndef square(x): return Yes()",
        "fail",
        "Yes, which",
    ),
}


@pytest.mark.parametrize("name", TRICKS)
def test_no_usual_trick_passes(sandbox, name):
    source, verdict, part = TRICKS[name]
    result = check(sandbox, source, SQUARE, QUICK)
    assert (result.verdict, part in result.detail) == (verdict, True), result


def test_a_solution_cannot_blame_the_test(warm):
    """A forged fault would be an exception in the trainer: an empty solution must show it too."""
    source = """
import sys
frame = sys._getframe()
while frame:
    if "seal" in frame.f_locals:
        seal = frame.f_locals["seal"]
    frame = frame.f_back
import json, os
os.write(3, json.dumps({"seal": seal, "fault": "nonsense"}).encode())
os._exit(0)
"""
    assert check(warm, source, SQUARE).verdict == "crash"


def test_a_determined_program_can_forge_a_function_test_but_no_call_test(warm):
    """What the documentation says: a process cannot keep secrets from the code within it."""
    source = """
import sys, json, os
frame = sys._getframe()
while frame:
    if "seal" in frame.f_locals:
        seal = frame.f_locals["seal"]
    frame = frame.f_back
os.write(3, json.dumps({"seal": seal, "done": True, "value": "[9]"}).encode())
os._exit(0)
"""
    assert check(warm, source, SQUARE).verdict == "pass"
    result = check(warm, source, CallTest("square", [3], 9))
    assert (result.verdict, result.detail) == ("fail", "returned [9], expected 9")
