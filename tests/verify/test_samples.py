"""Files of solutions judged by files of problems: formats, verdict file, resuming, mistakes."""

import json

import pytest

from phiforge.verify.samples import judge, read_problems, read_samples, reference_samples, summary
from phiforge.verify.sandbox import Sandbox

PROBLEMS = [
    {
        "task_id": "HumanEval/x",
        "prompt": "def double(x):\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
    {
        "task_id": 7,
        "code": "def half(x):\n    return x / 2\n",
        "test_list": ["assert half(4) == 2"],
    },
    {
        "id": "sum",
        "solution": "print(sum(map(int, input().split())))",
        "tests": [{"stdin": "3 4", "expected": "7"}, {"stdin": "1 1", "expected": "2"}],
    },
    {
        "id": "call",
        "solution": "def square(x):\n    return x * x\n",
        "tests": [{"entry_point": "square", "arguments": [3], "expected": 9}],
    },
    {
        "id": "examples",
        "solution": "def one():\n    return 1\n",
        "tests": [{"examples": ">>> one()\n1\n"}],
    },
]
SAMPLES = [
    {"task_id": "HumanEval/x", "completion": "    return x + x\n"},
    {"task_id": "HumanEval/x", "completion": "    return x\n"},
    {"task_id": 7, "response": "So:\n```python\ndef half(x):\n    return x // 2\n```\n"},
    {"task_id": "sum", "solution": "print(7)"},
]
VERDICTS = ["pass", "fail", "pass", "fail"]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_formats_and_references(sandbox, write):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    gold = judge(problems, list(reference_samples(problems.values(), "gold")), None, sandbox)
    assert [row["verdict"] for row in gold] == ["pass"] * 5
    stubs = judge(problems, list(reference_samples(problems.values(), "stub")), None, sandbox)
    assert [row["task_id"] for row in stubs] == ["HumanEval/x", "7", "call"]
    assert {row["verdict"] for row in stubs} == {"fail"}


def test_samples_are_judged_and_summed_up(sandbox, write, tmp_path):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    samples = read_samples(write("samples.jsonl", SAMPLES), problems)
    rows = judge(problems, samples, tmp_path / "out.jsonl", sandbox)
    assert [row["verdict"] for row in rows] == VERDICTS
    assert rows[3]["tests"] == ["pass", "fail"]
    result = summary(rows)
    assert result["samples"] == 4
    assert result["problems"] == 3
    assert result["verdicts"] == {"pass": 2, "fail": 2}
    assert result["pass_rate"] == 0.5
    low, high = result["interval"]
    assert 0 <= low < 0.5 < high <= 1


@pytest.mark.parametrize("kept", [0, 10, -1, -30])
def test_a_verdict_file_cut_anywhere_is_completed(sandbox, write, tmp_path, kept):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    samples = read_samples(write("samples.jsonl", SAMPLES), problems)
    out = tmp_path / "out.jsonl"
    judge(problems, samples, out, sandbox)
    whole = out.read_bytes()
    out.write_bytes(whole[:kept])
    judge(problems, samples, out, sandbox)
    assert out.read_bytes() == whole


def test_what_is_done_is_not_run_again(write, tmp_path, sandbox):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    samples = read_samples(write("samples.jsonl", SAMPLES), problems)
    out = tmp_path / "out.jsonl"
    first = judge(problems, samples, out, sandbox)
    no_sandbox = None  # nothing may be asked of it
    assert judge(problems, samples, out, no_sandbox) == first  # type: ignore[arg-type]


def test_verdicts_of_other_samples_are_not_mixed(sandbox, write, tmp_path):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    samples = read_samples(write("samples.jsonl", SAMPLES), problems)
    out = tmp_path / "out.jsonl"
    judge(problems, samples, out, sandbox)
    with pytest.raises(ValueError, match=r"out\.jsonl holds verdicts of other samples"):
        judge(problems, samples[:2], out, sandbox)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "nowhere", "solution": "1"}, r"samples\.jsonl:1: task_id nowhere is no"),
        ({"task_id": "sum"}, r"samples\.jsonl:1: a sample needs a text solution"),
        ({"task_id": "sum", "solution": 3}, r"samples\.jsonl:1: a sample needs a text solution"),
    ],
)
def test_wrong_samples_are_named(write, row, message):
    problems = read_problems(write("problems.jsonl", PROBLEMS))
    with pytest.raises(ValueError, match=message):
        read_samples(write("samples.jsonl", [row]), problems)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tests": []}, "needs a task_id"),
        ({"id": 1, "tests": []}, "needs tests"),
        ({"id": 1, "tests": [{"output": "1"}]}, "a test needs one of"),
        ({"id": 1, "tests": [{"test": " "}]}, "is empty"),
        ({"id": 1, "tests": [{"stdin": "", "expected": "", "colour": 1}]}, "colour"),
    ],
)
def test_wrong_problems_are_named(write, row, message):
    with pytest.raises(ValueError, match=rf"problems\.jsonl:1: .*{message}"):
        read_problems(write("problems.jsonl", [row]))
