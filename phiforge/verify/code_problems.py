"""Rows of HumanEval and MBPP as tests, and the program in a model's answer.

`from_humaneval(row)` and `from_mbpp(row)` give a FunctionTest for `phiforge.verify.tests.check`;
`humaneval_source(row, completion)` and `extract_code(response)` give its source. Writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from phiforge.verify.tests import FunctionTest

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[^\s`{]*)[^`\n]*$")
_PYTHON = {"", "python", "python3", "py", "python2", "pycon", "ipython"}
_CODE_START = re.compile(r"(?:from\s+\S+\s+import|import\s+\w|def\s+\w+\s*\(|class\s+\w|@\w)")


def from_humaneval(row: Mapping[str, Any]) -> FunctionTest:
    """The test of a HumanEval row (task_id, entry_point, test)."""
    _require(row, "task_id", "entry_point", "test")
    return FunctionTest(row["test"], entry_point=row["entry_point"], name=str(row["task_id"]))


def humaneval_source(row: Mapping[str, Any], completion: str) -> str:
    """The program that HumanEval runs: prompt, then completion (arXiv 2107.03374, section 2.2).

    A completion may continue the prompt or state the whole function again: then its definition
    replaces the prompt's, and the imports and helpers of the prompt stay.
    """
    _require(row, "prompt")
    return row["prompt"] + completion


def from_mbpp(row: Mapping[str, Any], *, challenge: bool = False) -> FunctionTest:
    """The test of an MBPP row (arXiv 2108.07732): all asserts of test_list, in order.

    Rows of the full and of the sanitized file; `challenge` adds those of challenge_test_list.
    """
    _require(row, "task_id", "test_list")
    lines = [*row.get("test_imports", ()), *row["test_list"]]
    lines += row.get("challenge_test_list", ()) if challenge else ()
    return FunctionTest(
        "\n".join(line.replace("\r\n", "\n") for line in lines),
        entry_point=_defined_and_called(row.get("code", ""), row["test_list"]),
        setup=row.get("test_setup_code") or "",
        name=f"MBPP/{row['task_id']}",
    )


def extract_code(response: str, entry_point: str | None = None) -> str | None:
    """The program in a model's answer; None when there is none.

    Of the fenced Python blocks (or blocks of no language) the first that defines `entry_point`,
    else the last one. An answer without a fence counts when it begins as a program does. What a
    model thought before "</think>" does not count.
    """
    answer = response.rpartition("</think>")[2].replace("\r\n", "\n")
    blocks = list(_blocks(answer))
    if not blocks:
        text = answer.strip("\n")
        return text + "\n" if _CODE_START.match(text) else None
    if entry_point is not None:
        definition = re.compile(
            rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry_point)}\b", re.M
        )
        blocks = [block for block in blocks if definition.search(block)][:1] or blocks
    return blocks[-1]


def _blocks(text: str) -> Iterable[str]:
    """The Python blocks of Markdown; the last may lack its closing fence, as when cut short."""
    lines, mark, indent, language = [], "", "", ""
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if not mark:
            if fence:
                mark, indent, language = fence["mark"], fence["indent"], fence["language"].lower()
                lines = []
        elif fence and not fence["language"] and fence["mark"].startswith(mark):
            if language in _PYTHON and any(lines):
                yield "\n".join(lines) + "\n"
            mark = ""
        else:
            lines.append(line.removeprefix(indent))
    if mark and language in _PYTHON and any(lines):
        yield "\n".join(lines)


def _defined_and_called(code: str, asserts: Iterable[str]) -> str | None:
    """The function of the reference solution that the asserts call."""
    called = set(re.findall(r"(\w+)\s*\(", "\n".join(asserts)))
    names = re.findall(r"^def\s+(\w+)", code, re.MULTILINE)
    return next((name for name in reversed(names) if name in called), None)


def _require(row: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if field not in row:
            raise ValueError(f"the row has no {field!r}; it has {', '.join(map(str, row))}")
