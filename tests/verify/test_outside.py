"""Verdicts that are reached outside of the sandbox: printed output, returned values, doctests."""

import pytest
from square import QUICK, RIGHT

from phiforge.verify.outputs import first_difference, same_output, same_value
from phiforge.verify.tests import CallTest, DocTest, InputOutputTest, check

IO_CASES = [
    ("print(int(input()) ** 2)", InputOutputTest("3\n", "9\n"), "pass"),
    ("print(int(input()) ** 2, end=' ')", InputOutputTest("3\n", "9"), "pass"),
    ("print('9  \\r\\n\\n')", InputOutputTest("", "9\n"), "pass"),
    ("print(' 9')", InputOutputTest("", "9\n"), "fail"),
    ("print(1); print(2)", InputOutputTest("", "1 2"), "fail"),
    ("print(8)", InputOutputTest("", "9", also=("7", "8")), "pass"),
    ("print(0.30000001, 'a')", InputOutputTest("", "0.3 a", tolerance=1e-6), "pass"),
    ("print(0.31, 'a')", InputOutputTest("", "0.3 a", tolerance=1e-6), "fail"),
    ("print(1000001)", InputOutputTest("", "1000000", tolerance=1e-5), "pass"),
    ("print('nan')", InputOutputTest("", "1", tolerance=0.5), "fail"),
    ("print('inf')", InputOutputTest("", "1e999", tolerance=0.5), "fail"),
    ("print(5)", InputOutputTest("", "1e999", tolerance=0.5), "fail"),
    ("print('b')", InputOutputTest("", "a", tolerance=0.5), "fail"),
    ("print(1, 2, 3)", InputOutputTest("", "1 2", tolerance=0.5), "fail"),
    ("print(9)\nraise SystemExit(1)", InputOutputTest("", "9"), "fail"),
    ("print(9)\nexit()", InputOutputTest("", "9"), "pass"),
    ("print(9, flush=True)\nimport os\nos._exit(0)", InputOutputTest("", "9"), "pass"),
    ("print(9)\n1 / 0", InputOutputTest("", "9"), "fail"),
    ("print(input(), input())", InputOutputTest("1", "1"), "fail"),
    (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def main(): print(9)\nthreading.Thread(target=main).start()",
        InputOutputTest("", "9"),
        "pass",
    ),
    ("import sys\nout = open(1, 'w')\nout.write('9')", InputOutputTest("", "9"), "pass"),
    ("if __name__ == '__main__': print(9)", InputOutputTest("", "9"), "pass"),
    ("import sys\nprint(len(sys.stdin.buffer.read()))", InputOutputTest("é\n" * 9, "27"), "pass"),
    ("while True: input()", InputOutputTest("x\n" * 9, ""), "fail"),
    ("while True: pass", InputOutputTest("", "9"), "timeout"),
    ("import os\nos.kill(os.getpid(), 11)", InputOutputTest("", ""), "crash"),
]


@pytest.mark.parametrize("case", range(len(IO_CASES)))
def test_whole_programs_are_judged_by_what_they_print(sandbox, case):
    source, test, verdict = IO_CASES[case]
    result = check(sandbox, source, test, QUICK)
    assert result.verdict == verdict, result


def test_the_first_wrong_line_is_named(warm):
    result = check(warm, "print(1)\nprint('x' * 500)", InputOutputTest("", "1\n2\n3"))
    assert result.detail.startswith("line 2: expected '2', printed 'xxxx")
    assert len(result.detail) < 200


CALL_CASES = [
    ("def f(a, b): return a + b", CallTest("f", [1, 2], 3), "pass"),
    ("class Solution:\n    def f(self, a): return (a, [a])", CallTest("f", [1], [1, [1]]), "pass"),
    ("def f(): return 4", CallTest("f", [], 3), "fail"),
    ("def f(): return 0.1 + 0.2", CallTest("f", [], 0.3), "fail"),
    ("def f(): return {'a': [0.1 + 0.2]}", CallTest("f", [], {"a": [0.3]}, 1e-9), "pass"),
    ("def f(): return 10**400", CallTest("f", [], 0.5, 1e-9), "fail"),
    ("def f(): return {1, 2}", CallTest("f", [], [1, 2]), "fail"),
    ("def f(): return f", CallTest("f", [], None), "fail"),
    ("def f(): pass", CallTest("f", [], None), "pass"),
    ("def f(): return list(range(50_000))", CallTest("f", [], list(range(50_000))), "pass"),
    ("def f(): return list(range(50_001))", CallTest("f", [], list(range(50_000))), "fail"),
    ("def f(): return [x / 2 for x in range(0, 100_000, 2)]",
     CallTest("f", [], list(range(50_000))), "pass"),
    ("x = []\nfor _ in range(900): x = [x]\ndef f(): return x", CallTest("f", [], []), "fail"),
    ("class Yes:\n    def __eq__(self, o): return True\ndef f(): return Yes()",
     CallTest("f", [], 1), "fail"),
    ("def g(): pass", CallTest("f", [], None), "fail"),
    ("exit()", CallTest("f", [], None), "crash"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CALL_CASES)))
def test_returned_values_are_compared_outside(sandbox, case):
    source, test, verdict = CALL_CASES[case]
    result = check(sandbox, source, test, QUICK)
    assert result.verdict == verdict, result


DOC = '''
def square(x):
    """
    >>> square(3)
    9
    >>> print(list(range(20)))    # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    [0,   1, ..., 18, 19]
    >>> square("a")
    Traceback (most recent call last):
    TypeError: can't multiply sequence by non-int of type 'str'
    """
    return x * x
'''
DOC_CASES = [
    (DOC, DocTest(), "pass"),
    (DOC.replace("x * x", "x"), DocTest(), "fail"),
    (RIGHT, DocTest(), "fail"),
    ("def f():\n    '''\n    >>> f()\n    '''\n    return None", DocTest(), "fail"),
    ("def f():\n    '''\n    >>> f()  # doctest: +SKIP\n    1\n    '''", DocTest(), "fail"),
    (RIGHT, DocTest(">>> square(3)\n9\n>>> square(2)\n4\n"), "pass"),
    (RIGHT, DocTest("Text.\n\n    >>> [square(x) for x in range(3)]\n    [0, 1, 4]\n"), "pass"),
    (RIGHT, DocTest(">>> square(3)\n8\n"), "fail"),
    ("def square(x): raise SystemExit(0)", DocTest(">>> square(3)\n9\n"), "crash"),
    ("import sys\nsys.exit()", DocTest(">>> square(3)\n9\n"), "crash"),
    ("def square(x):\n    while True: pass", DocTest(">>> square(3)\n9\n"), "timeout"),
    ("def square(x): return [0] * 10**9", DocTest(">>> square(3)\n9\n"), "memory"),
    ("def f(:", DocTest(), "fail"),
    ("def f():\n    '''\n    >>> f()\n    1\n  >>> f()\n     2\n    '''", DocTest(), "fail"),
    ("import builtins\nbuiltins.repr = lambda x: '9'\ndef square(x): return 8",
     DocTest(">>> square(3)\n9\n"), "fail"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DOC_CASES)))
def test_doctests(sandbox, case):
    source, test, verdict = DOC_CASES[case]
    result = check(sandbox, source, test, QUICK)
    assert result.verdict == verdict, result


def test_examples_that_check_nothing_are_refused(warm):
    with pytest.raises(ValueError, match=r"p9.*check nothing"):
        check(warm, RIGHT, DocTest(">>> square(3)\n", name="p9"))


@pytest.mark.parametrize(
    ("printed", "expected", "tolerance", "same"),
    [
        ("1 2\n", "1 2", None, True),
        ("1  2", "1 2", None, False),
        ("1 2", "1\n2", None, False),
        ("1 2", "1\n2", 0.0, True),
        ("1\n\n2", "1\n2", None, False),
        ("", "\n \n", None, True),
        ("1.0", "1", None, False),
        ("1.0", "1", 0.0, True),
        ("1_0", "10", 0.5, False),
        ("0x10", "16", 0.5, False),
        ("1e3", "1000", 1e-9, True),
        ("YES", "yes", 0.5, False),
        ("-inf", "1e999", 0.9, False),
        ("9" * 500, "9" * 400, 0.9, False),
    ],
)
def test_outputs_are_compared_as_contest_judges_do(printed, expected, tolerance, same):
    assert same_output(printed, expected, tolerance) is same


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "same"),
    [
        ([1, 2.0], [1.0, 2], None, True),
        ({"a": 1}, {"a": 1, "b": 2}, 0.5, False),
        ([1.05], [1], 0.1, True),
        ([1.05], [1], None, False),
        ("1", 1, 0.5, False),
        (True, 0.9, 0.5, False),
        (float("nan"), 1, 0.5, False),
        (1, float("inf"), 0.5, False),
        ([1], [1, 1], 0.5, False),
        (None, 0, 0.5, False),
        (10**400, 1.5, 0.5, False),
    ],
)
def test_values_are_compared_with_their_numbers_near(value, expected, tolerance, same):
    assert same_value(value, expected, tolerance) is same


def test_the_difference_of_texts_is_their_first_other_line():
    assert first_difference("1\n2", "1") == "line 2: expected nothing, printed '2'"
    assert first_difference("1", "1\n2") == "line 2: expected '2', printed nothing"
