"""HumanEval and MBPP rows as tests, and programs in models' answers.

The public files are read from ../shared/data/benchmarks, or from the folder PHIFORGE_BENCHMARKS.
"""

import ast
import json
import os
from pathlib import Path

import pytest

from phiforge.verify.code_problems import (
    extract_code,
    from_humaneval,
    from_mbpp,
    humaneval_source,
)
from phiforge.verify.tests import check, matrix

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
FOLDER = Path(os.environ.get("PHIFORGE_BENCHMARKS", FOLDER))
FILES = ("humaneval/HumanEval.jsonl", "mbpp/test.jsonl", "mbpp/fewshot_val_train.jsonl")
STUBS = ("pass", "return 0", "return []", "return ''", "return None")

needs_files = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the public benchmark files are not in {FOLDER}"
)
# All problems take minutes; every fifteenth comes in the quick tier.
share = pytest.mark.parametrize("step", [15, pytest.param(1, marks=pytest.mark.slow)])


def problems(step):
    """(test, gold solution, function that makes a stub) of every step-th problem."""
    rows = [json.loads(line) for name in FILES for line in (FOLDER / name).open(encoding="utf-8")]
    for row in rows[::step]:
        if "entry_point" in row:
            gold = humaneval_source(row, row["canonical_solution"])
            yield from_humaneval(row), gold, row["entry_point"]
        else:
            test = from_mbpp(row, challenge=True)
            yield test, row["code"], test.entry_point


def stub(source, entry_point, body):
    """The solution with another body for the function under test."""
    tree = ast.parse(source)
    for i, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            tree.body[i] = ast.parse(f"def {entry_point}(*args, **more): {body}").body[0]
    return ast.unparse(tree)


@needs_files
@share
def test_all_public_gold_solutions_pass(warm, step):
    wrong = []
    for test, gold, _ in problems(step):
        result = check(warm, gold, test)
        if not result.passed:
            wrong.append((test.name, result))
    assert not wrong


@needs_files
@share
def test_no_stub_passes(warm, step):
    wrong = []
    for test, gold, entry_point in problems(step):
        assert entry_point, test.name
        stubs = [stub(gold, entry_point, body) for body in STUBS]
        results = [row[0] for row in matrix(warm, stubs, [test])]
        wrong += [
            (test.name, body, result)
            for body, result in zip(STUBS, results, strict=True)
            if result.verdict != "fail"
        ]
    assert not wrong


ROW = {
    "task_id": "HumanEval/x",
    "prompt": 'import math\ndef two():\n    return 2\ndef area(r):\n    """Of a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r ** two()\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n"
    "    assert two() == 2\n",
}


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return math.pi * r * r\n", "pass"),
        ("def area(r):\n    return math.pi * r ** two()\n", "pass"),
        (ROW["prompt"] + ROW["canonical_solution"], "pass"),
        ("\n    return math.pi * r * r\n\nprint(area(1))", "pass"),
        ("    return math.pi * r\n\nassert area(1) == 0", "fail"),
        ("return math.pi * r * r", "fail"),
        ("", "fail"),
    ],
)
def test_a_humaneval_completion_goes_on_or_states_the_function_again(warm, completion, verdict):
    result = check(warm, humaneval_source(ROW, completion), from_humaneval(ROW))
    assert result.verdict == verdict, result


def test_a_whole_program_is_a_humaneval_solution(warm):
    source = "from math import pi\ndef area(r): return pi * r * r\ndef two(): return 2"
    assert check(warm, source, from_humaneval(ROW)).passed


def test_mbpp_rows_of_both_files(warm):
    row = {
        "task_id": 3,
        "code": "def helper(x):\r\n    return x\r\ndef sum(a, b):\r\n    return helper(a) + b",
        "test_setup_code": "",
        "test_list": ["assert sum(1, 2) == 3"],
        "challenge_test_list": ["assert sum(2, 2) == 5"],
    }
    test = from_mbpp(row)
    assert (test.entry_point, test.name) == ("sum", "MBPP/3")
    assert check(warm, row["code"], test).passed
    assert check(warm, row["code"], from_mbpp(row, challenge=True)).verdict == "fail"
    sanitized = {
        "task_id": 4,
        "prompt": "Near?",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(f(), 0.3)"],
    }
    assert check(warm, "def f(): return 0.1 + 0.2", from_mbpp(sanitized)).passed


def test_rows_without_their_fields_are_named():
    with pytest.raises(ValueError, match="no 'test_list'; it has task_id, test"):
        from_mbpp({"task_id": 1, "test": ""})
    with pytest.raises(ValueError, match="no 'entry_point'"):
        from_humaneval({"task_id": 1})
    with pytest.raises(ValueError, match="no 'prompt'"):
        humaneval_source({}, "")


F = "def f(x):\n    return x\n"
G = "def g(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("response", "entry_point", "code"),
    [
        (f"Here:\n\n```python\n{F}```\nDone.", None, F),
        (f"```python\n{F}```\nThen:\n```py\n{G}```", None, G),
        (f"```python\n{F}```\nThen:\n```py\n{G}```", "f", F),
        (f"```python\n{F}```\nUse:\n```python\nf(1)\n```\nor\n```python\n{F}#2\n```", "f", F),
        (f"```python\n{F}```\nUse:\n```python\nf(1)\n```", "absent", "f(1)\n"),
        (f"```python\n{F}```\nIt prints:\n```text\n4\n```\n```bash\nls\n```", None, F),
        (f"```\n{F}```", None, F),
        (f"~~~python\n{F}~~~", None, F),
        (f"````python\n{F}s = '''\n```\n'''\n````", None, f"{F}s = '''\n```\n'''\n"),
        ("1. So:\n   ```python\n   def f(x):\n       return x\n   ```", None, F),
        (f"```Python title=a.py\n{F}```", None, F),
        (f"```python\n{F}", None, F),
        (f"```python\r\n{F}```".replace("\n", "\r\n").replace("\r\r", "\r"), None, F),
        (f"<think>```python\n{G}```</think>\n```python\n{F}```", "g", F),
        ("class A:\n    def f(self): pass", "f", "class A:\n    def f(self): pass\n"),
        (F, None, F),
        (f"\n\n{F}", None, F),
        ("from math import pi\nprint(pi)", None, "from math import pi\nprint(pi)\n"),
        ("I cannot do that.", None, None),
        ("from what I know, define f.", None, None),
        ("```text\n4\n```", None, None),
        ("```python\n```", None, None),
        ("", None, None),
        ("``` ``` ```", None, None),
        ("use `f(x)`", None, None),
    ],
)
def test_the_program_of_an_answer(response, entry_point, code):
    assert extract_code(response, entry_point) == code
