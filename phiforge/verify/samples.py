"""Judges a file of solutions by a file of problems: HumanEval, MBPP, or rows with own tests.

`judge(problems, samples, out, sandbox)` appends one line a sample to `out`; run again after a kill,
it goes on where it was. `summary(rows)` is what `phiforge sandbox test` prints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from phiforge.core.progress import progress
from phiforge.core.records import read_rows
from phiforge.core.stats import cluster_interval, wilson
from phiforge.verify.code_problems import (
    extract_code,
    from_humaneval,
    from_mbpp,
    humaneval_source,
)
from phiforge.verify.sandbox import Limits, Sandbox
from phiforge.verify.tests import (
    DEFAULT_LIMITS,
    VERDICTS,
    CallTest,
    DocTest,
    FunctionTest,
    InputOutputTest,
    Test,
    TestResult,
    check,
)

Reference = Literal["gold", "stub"]
_AT_ONCE = 64  # samples between two writes
_KINDS = {
    "stdin": InputOutputTest,
    "arguments": CallTest,
    "test": FunctionTest,
    "examples": DocTest,
}


@dataclass(frozen=True)
class CodeProblem:
    """A problem's tests, and what is needed to make a program of a completion."""

    id: str
    tests: tuple[Test, ...]
    entry_point: str | None
    row: Mapping[str, Any]


def read_problems(path: Path) -> dict[str, CodeProblem]:
    """Problems by id. Raises ValueError ("FILE:LINE: ...") for a row that is none."""
    problems: dict[str, CodeProblem] = {}
    for where, row in read_rows(path):
        try:
            problem = code_problem(row)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from None
        if problem.id in problems:
            raise ValueError(f"{where}: problem {problem.id} is there twice")
        problems[problem.id] = problem
    if not problems:
        raise ValueError(f"{path}: no problem in it")
    return problems


def code_problem(row: Any) -> CodeProblem:
    if not isinstance(row, Mapping):
        raise ValueError("a problem must be a JSON object")
    number = row.get("task_id", row.get("id"))
    if number is None:
        raise ValueError("a problem needs a task_id or an id")
    if "test_list" in row:
        tests: tuple[Test, ...] = (from_mbpp(row),)
    elif "entry_point" in row and "test" in row:
        tests = (from_humaneval(row),)
    elif isinstance(row.get("tests"), Sequence) and row["tests"]:
        tests = tuple(_test(test, str(number)) for test in row["tests"])
    else:
        raise ValueError("a problem needs tests, test_list (MBPP), or entry_point and test")
    entry_point = next(
        (t.entry_point for t in tests if isinstance(t, FunctionTest | CallTest)), None
    )
    return CodeProblem(str(number), tests, entry_point, row)


def _test(fields: Any, name: str) -> Test:
    kind = next((k for k in _KINDS if isinstance(fields, Mapping) and k in fields), None)
    if kind is None:
        raise ValueError(f"a test needs one of {', '.join(_KINDS)}: {str(fields)[:80]}")
    values = {key: tuple(v) if key == "also" else v for key, v in fields.items()}
    return _KINDS[kind](**{"name": name, **values})


def source_of(problem: CodeProblem, sample: Mapping[str, Any]) -> str:
    """The program of a sample: its `completion` of the prompt, `solution`, or chat `response`."""
    if "solution" in sample:
        return sample["solution"]
    if "completion" in sample:
        prompt = "prompt" in problem.row and "entry_point" in problem.row
        return (
            humaneval_source(problem.row, sample["completion"]) if prompt else sample["completion"]
        )
    return extract_code(sample["response"], problem.entry_point) or ""


def reference_samples(
    problems: Iterable[CodeProblem], reference: Reference
) -> Iterator[dict[str, Any]]:
    """The problems' own solutions, which must pass; or stubs that do nothing, which must not."""
    for problem in problems:
        row = problem.row
        if reference == "stub":
            if problem.entry_point is None:
                continue
            stub = f"def {problem.entry_point}(*arguments, **named):\n    pass\n"
            yield {"task_id": problem.id, "solution": stub}
        elif "canonical_solution" in row:
            yield {"task_id": problem.id, "completion": row["canonical_solution"]}
        elif "code" in row or "solution" in row:
            yield {"task_id": problem.id, "solution": row.get("code", row.get("solution"))}
        else:
            raise ValueError(f"problem {problem.id} has no canonical_solution, code or solution")


def read_samples(path: Path, problems: Mapping[str, CodeProblem]) -> list[dict[str, Any]]:
    """Samples of known problems. Raises ValueError ("FILE:LINE: ...") for any other."""
    samples = []
    for where, row in read_rows(path):
        number = str(row.get("task_id", row.get("id"))) if isinstance(row, dict) else "None"
        if number not in problems:
            raise ValueError(f"{where}: task_id {number} is no problem of the problems' file")
        texts = [row[key] for key in ("solution", "completion", "response") if key in row]
        if not texts or not isinstance(texts[0], str):
            raise ValueError(f"{where}: a sample needs a text solution, completion or response")
        samples.append({**row, "task_id": number})
    if not samples:
        raise ValueError(f"{path}: no sample in it")
    return samples


def judge(
    problems: Mapping[str, CodeProblem],
    samples: Sequence[Mapping[str, Any]],
    out: Path | None,
    sandbox: Sandbox,
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """A row for every sample, in order: task_id, sample, verdict, detail, verdicts of its tests.

    `out` (JSONL) is appended to and synced every 64 samples; rows that are there already are not
    computed again. Raises ValueError when `out` holds verdicts of other samples or limits.
    """
    begin = {"limits": asdict(limits), "samples": _digest(problems, samples)}
    with progress(len(samples), "samples", "tests") as bar, _Output(out, begin) as output:
        rows = output.rows
        bar.start_at(len(rows))
        waiting = iter(islice(enumerate(samples), len(rows), None))
        while part := list(islice(waiting, _AT_ONCE)):
            results = _check_all(problems, [sample for _, sample in part], sandbox, limits, workers)
            fresh = [_row(i, s, r) for (i, s), r in zip(part, results, strict=True)]
            output.append(fresh)
            rows += fresh
            bar.advance(len(part), passed=sum(row["verdict"] == "pass" for row in rows))
    return rows


def _check_all(
    problems: Mapping[str, CodeProblem],
    samples: Sequence[Mapping[str, Any]],
    sandbox: Sandbox,
    limits: Limits,
    workers: int | None,
) -> list[list[TestResult]]:
    from concurrent.futures import ThreadPoolExecutor

    def one(sample: Mapping[str, Any]) -> list[TestResult]:
        problem = problems[sample["task_id"]]
        source = source_of(problem, sample)
        return [check(sandbox, source, test, limits) for test in problem.tests]

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, samples))


def _row(number: int, sample: Mapping[str, Any], results: Sequence[TestResult]) -> dict[str, Any]:
    worst = next((result for result in results if not result.passed), results[0])
    return {
        "task_id": sample["task_id"],
        "sample": number,
        "verdict": worst.verdict,
        "passed": worst.passed,
        "detail": worst.detail,
        "tests": [result.verdict for result in results],
    }


def _digest(problems: Mapping[str, CodeProblem], samples: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        problem = problems[sample["task_id"]]
        parts = [source_of(problem, sample), *(repr(test) for test in problem.tests)]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:16]


class _Output:
    """The verdict file: a header, then rows; a line cut by a kill is dropped on opening."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path, self.rows = path, []
        self._header = header
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Output:
        if self.path is not None:
            self._file = open(self.path, "a+b")
            self._read(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        whole = 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{self.path}:{number + 1}: not valid JSON") from None
            if number == 0 and row != self._header:
                raise ValueError(
                    f"{self.path} holds verdicts of other samples or limits; give another --out"
                )
            if number:
                self.rows.append(row)
            whole += len(line)
        file.truncate(whole)
        if not whole:
            self.append([self._header])

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the verdicts, and the pass rate with its 95% interval, clustered by problem."""
    counts = Counter(row["verdict"] for row in rows)
    problems = [row["task_id"] for row in rows]
    num_problems = len(set(problems))
    if num_problems == len(rows):
        rate = wilson(counts["pass"], len(rows))
    else:
        rate = cluster_interval([float(row["passed"]) for row in rows], problems)
    return {
        "samples": len(rows),
        "problems": num_problems,
        "verdicts": {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]},
        "pass_rate": counts["pass"] / len(rows),
        "interval": [max(0.0, rate.low), min(1.0, rate.high)],
    }
