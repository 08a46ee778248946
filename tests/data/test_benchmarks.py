"""Benchmark rows as Problems: every public row reads, gold solutions satisfy their own oracle.

Run: pytest tests/data/test_benchmarks.py; rows come from PHIFORGE_BENCHMARKS or ../shared.
"""

import json
import os
from pathlib import Path

import pytest

from phiforge.core.records import Problem, write_records
from phiforge.data.benchmarks import BENCHMARKS, find, read_benchmark, split_of
from phiforge.verify.code_problems import from_humaneval, from_mbpp
from phiforge.verify.mathematics import canonical, final_answer, is_close

SHARED = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
FOLDER = Path(os.environ.get("PHIFORGE_BENCHMARKS", SHARED))
COUNTS = {"gsm8k": 8133, "math": 12507, "humaneval": 83, "mbpp": 727}


def public(name):
    if not (FOLDER / name).is_dir():
        pytest.skip(f"no {FOLDER / name}")
    return read_benchmark(name, FOLDER / name)


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_public_row_reads(name, tmp_path):
    problems = public(name)
    assert len(problems) == COUNTS[name]
    assert len({problem.id for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.prompt
        assert problem.metadata["licence"]
        assert problem.metadata["split"]
        assert problem.metadata["solution"]
    some = problems[:: len(problems) // 20]
    write_records(tmp_path / "same.jsonl", some)
    from phiforge.core.records import read_records

    assert list(read_records(tmp_path / "same.jsonl", Problem)) == some


def test_gsm8k_solutions_answer_their_question():
    for problem in public("gsm8k"):
        assert problem.kind == "number"
        assert is_close(final_answer(problem.metadata["solution"]) or "", problem.answer or "")


def test_math_solutions_answer_their_question():
    without = []
    for problem in public("math"):
        if problem.answer is None:
            without.append(problem.id)
            continue
        found = final_answer(problem.metadata["solution"])
        assert canonical(found or "") == canonical(problem.answer), problem.id
    assert len(without) == 2  # two training rows have an empty box


def test_code_rows_make_tests():
    for problem in public("humaneval"):
        assert problem.prompt in problem.metadata["solution"]
        assert from_humaneval(problem.metadata).entry_point == problem.metadata["entry_point"]
    for problem in public("mbpp"):
        test = from_mbpp(problem.metadata)
        assert test.entry_point
        assert test.test.splitlines()[0] in str(problem.prompt)


@pytest.mark.slow
def test_math_golds_are_mathematics_and_differ_from_each_other():
    """Through the real comparison: a third of the golds of MATH-500 was unread by a bare parser."""
    from phiforge.verify.mathematics import Mathematics, _latex, is_words

    golds = [p.answer for p in public("math") if p.metadata["split"] == "math500"]
    with Mathematics() as mathematics:
        read = [gold for gold in golds if gold and not is_words(gold)]
        assert all(mathematics._ask(_latex(gold), _latex(gold)) for gold in read)
        pairs = list(zip(read, read[1:] + read[:1], strict=True))
        differ = [pair for pair in pairs if canonical(pair[0]) != canonical(pair[1])]
        assert not [pair for pair in differ if mathematics.is_equal(*pair)]


def test_ids_and_splits(tmp_path):
    row = {"question": "1+1?", "answer": "two\n#### 2"}
    file = rows(tmp_path / "test.jsonl", row, {**row, "index": 7}, {**row, "id": "own"})
    problems = read_benchmark("gsm8k", file)
    assert [p.id for p in problems] == ["gsm8k/test/1", "gsm8k/test/7", "own"]
    assert {p.metadata["split"] for p in problems} == {"test"}
    assert len(read_benchmark("gsm8k", file, limit=2)) == 2
    assert split_of("a/train.jsonl.gz:3") == "train"
    assert split_of("a/test_part.jsonl:3") == "test"


def test_other_publications_of_the_same_rows(tmp_path):
    """The hub's column names: MATH with `type` and no answer, MBPP sanitized with `prompt`."""
    math = {
        "problem": "?",
        "solution": r"so \boxed{\frac12}",
        "level": "Level ?",
        "type": "Algebra",
    }
    problem = read_benchmark("math", rows(tmp_path / "math.jsonl", math))[0]
    assert (problem.answer, problem.metadata["subject"]) == (r"\frac12", "Algebra")
    mbpp = {
        "task_id": 2,
        "prompt": "Square it.",
        "code": "def f(x):\r\n    return x * x",
        "test_imports": ["import math"],
        "test_list": ["assert f(2) == 4"],
    }
    problem = read_benchmark("mbpp", rows(tmp_path / "mbpp.jsonl", mbpp))[0]
    assert from_mbpp(problem.metadata).test == "import math\nassert f(2) == 4"
    assert "\r" not in problem.metadata["solution"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "?"}, r"test.jsonl:1: no row of gsm8k: column 'answer' is missing"),
        ("gsm8k", {"question": "?", "answer": "2"}, "####"),
        ("gsm8k", {"question": "", "answer": "#### 2"}, "'question' holds ''"),
        ("gsm8k", [1], "expected a JSON object"),
        ("math", {"problem": "?", "solution": 3}, "'solution' holds 3"),
        ("math", {"problem": "?", "solution": "?", "level": "high"}, "no row of math"),
        ("humaneval", {"task_id": "a", "prompt": "p", "entry_point": "f"}, "'test' is missing"),
        ("mbpp", {"task_id": 1, "text": "t", "code": "c", "test_list": []}, "test_list is empty"),
    ],
)
def test_rows_that_are_none(tmp_path, name, row, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(name, rows(tmp_path / "test.jsonl", row))


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        find("gsm-8k")
    row = {"id": "a", "question": "?", "answer": "#### 1"}
    with pytest.raises(ValueError, match="'a' is there twice"):
        read_benchmark("gsm8k", rows(tmp_path / "two.jsonl", row, row))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no row of gsm8k"):
        read_benchmark("gsm8k", tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        read_benchmark("gsm8k", tmp_path / "none.jsonl")
