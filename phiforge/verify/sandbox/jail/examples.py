"""Doctest examples, run against the names of a solution.

`parse(text)` reads given examples, `run(module, test)` runs them, or those in the module's
docstrings. Returns a report; writes nothing.
"""

from __future__ import annotations

import types

from .checks import BUILTINS, Fault

MAX_MESSAGE = 2000


def parse(text: str):
    """The examples of a text as one doctest; Fault when there is none that expects something."""
    import doctest  # slow to import, and only this needs it

    try:
        test = doctest.DocTestParser().get_doctest(text, {}, "examples", "examples.py", 0)
    except ValueError as error:
        raise Fault(f"the examples cannot be read: {error}") from None
    if not _expecting(test):
        raise Fault("the examples check nothing: no line after >>> is followed by what it prints")
    return test


def run(module: types.ModuleType, given) -> dict:
    """Run one given doctest, or those in the module's docstrings, up to the first that fails."""
    import doctest

    tests = [given] if given else doctest.DocTestFinder(exclude_empty=True).find(module)
    num_expecting = sum(_expecting(test) for test in tests)
    if not num_expecting:
        return {"exception": "NoExamples", "message": "no docstring holds an example"}
    errors: list[BaseException] = []

    class Runner(doctest.DocTestRunner):
        def report_unexpected_exception(self, out, test, example, exc_info):
            errors.append(exc_info[1])
            super().report_unexpected_exception(out, test, example, exc_info)

    runner = Runner(verbose=False, optionflags=doctest.FAIL_FAST)
    for test in tests:
        test.globs = {**vars(module), **({"__builtins__": dict(BUILTINS)} if given else {})}
        printed: list[str] = []
        if runner.run(test, out=printed.append, clear_globs=False).failed:
            if errors:
                raise errors[-1]
            return {"exception": "AssertionError", "message": _short("".join(printed))}
    return {"done": True, "held": num_expecting}


def _expecting(test) -> int:
    """How many examples expect something, and are not skipped."""
    import doctest

    return sum(
        bool(example.want or example.exc_msg) and not example.options.get(doctest.SKIP)
        for example in test.examples
    )


def _short(report: str) -> str:
    """Doctest's report of a failure without its ruler and its place in the file."""
    lines = [line for line in report.splitlines() if line and not line.startswith(("*", "File "))]
    return "\n".join(lines)[:MAX_MESSAGE]
