"""The code oracle: a response's program against the tests in its problem's metadata, contained.

`open_oracle("code")` opens it; `program_of(problem, response)` is the program that is run. Tests
are those of `phiforge.verify.samples`: HumanEval's, MBPP's, or a list `tests`. Writes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from phiforge.core.records import Problem
from phiforge.posttrain.pivotal.scoring import Scorer, each

Form = Literal["auto", "completion", "response"]
FORMS = ("auto", "completion", "response")
# Where a base model goes on after the function it was to complete (arXiv 2107.03374, section 2.1).
_AFTER_FUNCTION = re.compile(r"\n(?=class\b|def\b|#|if\b|print\b|@|assert\b|```|</?\w)")


def open_code(
    *,
    form: Form = "auto",
    limits: Mapping[str, Any] | None = None,
    workers: int | None = None,
    sandbox: Any = None,
) -> Scorer:
    """form: "completion": a response continues metadata["prompt"]; "response": it is an answer
    with a code block; "auto": as metadata["prompt_format"] says ("text": completion).
    limits: fields of `phiforge.verify.sandbox.Limits`. sandbox: one that is open already.

    Any verdict of the tests but a pass is False. Raises SandboxUnavailable where code cannot be
    contained, and ValueError for limits that no program could keep.
    """
    from phiforge.verify.sandbox import Limits, Sandbox
    from phiforge.verify.tests import check as run_test

    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    bounds = Limits(**(limits or {}))
    held = sandbox or Sandbox()

    def check(problem: Problem, response: str) -> bool:
        program = program_of(problem, response, form)
        if not program.strip():
            return False
        tests = code_problem(problem).tests
        return all(run_test(held, program, test, bounds).passed for test in tests)

    many = each(check, workers or len(os.sched_getaffinity(0)))
    return Scorer(many, held.close if sandbox is None else lambda: None, refuses_tests)


def code_problem(problem: Problem) -> Any:
    """The tests in a problem's metadata as a `phiforge.verify.samples.CodeProblem`.

    Raises ValueError when there are none.
    """
    from phiforge.verify.samples import code_problem as parse

    return parse({"id": problem.id, **problem.metadata})


def refuses_tests(problem: Problem) -> str | None:
    """Why a problem's tests cannot be used; None when they can."""
    try:
        code_problem(problem)
    except (TypeError, ValueError, KeyError) as error:
        return f"its tests cannot be used: {error}"
    return None


def program_of(problem: Problem, response: str, form: Form = "auto") -> str:
    """The program in a response; empty when there is none. `form` as in `open_code`."""
    from phiforge.verify.code_problems import extract_code

    row = problem.metadata
    if form == "auto":
        form = "completion" if row.get("prompt_format") == "text" else "response"
    if form == "response" or response.lstrip().startswith("```"):
        return extract_code(response, row.get("entry_point")) or ""
    return str(row.get("prompt", "")) + until_end_of_function(response)


def until_end_of_function(completion: str) -> str:
    """A completion without what a base model writes after the function it was to complete."""
    if completion[:1] not in (" ", "\t", "\n"):
        return completion  # it states the function again
    first_line = len(completion) - len(completion.lstrip("\n"))
    if not completion[first_line : first_line + 1].isspace():
        return completion
    found = _AFTER_FUNCTION.search(completion, first_line)
    return completion[: found.start() + 1] if found else completion
