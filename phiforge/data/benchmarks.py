"""Benchmark files as Problems: GSM8K, MATH, HumanEval, MBPP, as their authors publish them.

`read_benchmark("gsm8k", path)`; a path is a .jsonl, .jsonl.gz or .parquet file or a folder of them.
A benchmark is one row reader in BENCHMARKS. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiforge.core.records import Problem, is_record_file, read_rows
from phiforge.core.usage import unknown_name
from phiforge.verify.mathematics import final_answer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """How a row becomes a Problem, whose licence it is under, and which oracle checks it.

    instruction: what a chat prompt adds so that the answer has the form the oracle looks for.
    """

    read: Callable[[Row], dict[str, Any]]
    licence: str
    oracle: str
    instruction: str = ""


def read_benchmark(name: str, path: str | Path, *, limit: int | None = None) -> list[Problem]:
    """The problems of a benchmark's file or folder, in order.

    `metadata` keeps benchmark, licence, split (from the file's name), the gold solution under
    "solution", and what tests need. Raises ValueError for an unknown name and, with FILE:LINE, for
    a row that is none of its rows; two rows of one id are an error.
    """
    benchmark = find(name)
    path = Path(path)
    problems: dict[str, Problem] = {}
    for where, row in read_rows(path):
        if limit is not None and len(problems) >= limit:
            break
        problem = read_row(name, row, where, split_of(where))
        if problem.id in problems:
            raise ValueError(f"{where}: problem {problem.id!r} is there twice")
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{path}: no row of {name} ({benchmark.licence}) in it")
    return list(problems.values())


def find(name: str) -> Benchmark:
    """The benchmark of a name. Raises ValueError for an unknown one."""
    if name not in BENCHMARKS:
        raise ValueError(unknown_name("benchmarks", (name,), BENCHMARKS, "benchmark"))
    return BENCHMARKS[name]


def read_row(name: str, row: Any, where: str, split: str = "") -> Problem:
    """One row as a Problem. Raises ValueError, beginning with `where`, for what is no such row."""
    benchmark = find(name)
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    try:
        values = benchmark.read(row)
    except KeyError as error:
        columns = ", ".join(map(str, row))
        raise ValueError(
            f"{where}: no row of {name}: column {error} is missing; there are: {columns}"
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: no row of {name}: {error}") from None
    common = {"benchmark": name, "licence": benchmark.licence}
    if split:
        common["split"] = split
    identity = values.pop("id", None) or row.get("id")
    if identity is None:
        identity = f"{name}/{split or 'row'}/{row.get('index', where.rpartition(':')[2])}"
    metadata = {**common, **values.pop("metadata", {})}
    return Problem(id=str(identity), metadata=metadata, **values)


def split_of(where: str) -> str:
    """The split that a file's name ("FILE:LINE") tells: test.jsonl.gz -> test."""
    file = Path(where.rpartition(":")[0])
    name = file.name.partition(".")[0].casefold() if is_record_file(file) else ""
    known = ("train", "validation", "val", "dev", "test")
    return next((split for split in known if name == split or name.startswith(f"{split}_")), name)


def _gsm8k(row: Row) -> dict[str, Any]:
    """question, and an answer that is a solution ending in "#### 18" (arXiv 2110.14168)."""
    solution, found = _text(row, "answer"), _text(row, "answer").rpartition("####")
    if not found[1]:
        raise ValueError("its answer has no line '#### ...'")
    return {
        "prompt": _text(row, "question"),
        "answer": found[2].strip().replace(",", ""),
        "kind": "number",
        "metadata": {"solution": solution},
    }


def _math(row: Row) -> dict[str, Any]:
    r"""problem, solution with a \boxed answer (arXiv 2103.03874); `answer` where it is given.

    Two training rows have an empty box: their answer is None.
    """
    solution = _text(row, "solution")
    given = row.get("answer")
    answer = final_answer(solution, anchored=True) if given is None else given.strip()
    subject, level = row.get("subject", row.get("type")), row.get("level")
    metadata = {"solution": solution, "subject": subject}
    if level is not None:
        metadata["level"] = int(str(level).removeprefix("Level ").replace("?", "0"))
    return {
        "id": row.get("id") or row.get("unique_id"),
        "prompt": _text(row, "problem"),
        "answer": answer or None,
        "kind": "math",
        "metadata": metadata,
    }


def _humaneval(row: Row) -> dict[str, Any]:
    """task_id, prompt, entry_point, test, canonical_solution (arXiv 2107.03374)."""
    names = ("task_id", "prompt", "entry_point", "test")
    metadata = {name: _text(row, name) for name in names}
    metadata["solution"] = metadata["prompt"] + row.get("canonical_solution", "")
    return {
        "id": metadata["task_id"],
        "prompt": metadata["prompt"],
        "kind": "code",
        "metadata": metadata,
    }


def _mbpp(row: Row) -> dict[str, Any]:
    """task_id, text (prompt when sanitized), code, test_list (arXiv 2108.07732).

    The prompt shows the tests, as the authors' does: without them a function has no name.
    """
    text = _text(row, "text" if "text" in row else "prompt")
    tests = [test.replace("\r\n", "\n") for test in row["test_list"]]
    if not tests:
        raise ValueError("its test_list is empty")
    names = ("test_list", "test_setup_code", "test_imports", "challenge_test_list")
    metadata: dict[str, Any] = {name: row[name] for name in names if row.get(name)}
    metadata["task_id"] = row["task_id"]
    metadata["code"] = metadata["solution"] = _text(row, "code").replace("\r\n", "\n")
    shown = "\n".join(tests)
    return {
        "id": f"MBPP/{row['task_id']}",
        "prompt": f"{text} Your code should pass these tests:\n\n{shown}",
        "kind": "code",
        "metadata": metadata,
    }


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {name!r} holds {value!r:.60}; it must be a text")
    return value


_BOXED = r"Reason step by step, and put your final answer within \boxed{}."
_CODE = "Answer with one Python code block that holds the whole program."
_FUNCTION = f"Complete this function. {_CODE}"

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(_gsm8k, "MIT", "number", _BOXED),
    "math": Benchmark(_math, "MIT", "math", _BOXED),
    "humaneval": Benchmark(_humaneval, "MIT", "code", _FUNCTION),
    "mbpp": Benchmark(_mbpp, "CC-BY-4.0", "code", _CODE),
}
