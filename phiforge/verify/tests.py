"""Code against tests: did a solution pass, fail, run out of time or memory, crash, or get refused?

`check(sandbox, source, test)` for one, `matrix(sandbox, solutions, tests)` for k solutions times m
tests; `sandbox` is a `phiforge.verify.sandbox.Sandbox`. Writes nothing.
"""

from __future__ import annotations

import errno
import json
import secrets
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from phiforge.verify.outputs import cut, first_difference, same_output, same_value
from phiforge.verify.sandbox import Limits, Outcome, Sandbox
from phiforge.verify.sandbox.jail.harness import digest

Verdict = Literal["pass", "fail", "timeout", "memory", "crash", "refused"]
VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "timeout", "memory", "crash", "refused")
DEFAULT_LIMITS = Limits()
MAX_TEXT = 4000  # characters kept of stdout and of stderr
MAX_DETAIL = 500

_REFUSED = {
    getattr(errno, name)
    for name in "EPERM EACCES EROFS ENOSYS ENETUNREACH EAFNOSUPPORT EPROTONOSUPPORT "
    "EADDRNOTAVAIL EMFILE EAGAIN".split()
}
_OUT_OF_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class TestResult:
    """What became of one solution under one test; `detail` says why it is no pass."""

    __test__: ClassVar[bool] = False  # not a test class of pytest's

    verdict: Verdict
    detail: str
    seconds: float
    cpu_seconds: float
    stdout: str
    stderr: str

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True)
class FunctionTest:
    """Asserts about functions, in the same process as the solution.

    test: defines `check(candidate)`, called with the solution's `entry_point` (HumanEval), or is
        asserts that call the solution's functions by name (MBPP).
    entry_point: the function under test; only needed with `check`, or if it has a builtin's name.
    setup: runs after the solution, among its names.

    A program determined to cheat shares the process and can pass; the usual tricks do not. See
    CallTest and InputOutputTest, which are decided outside of it.
    """

    test: str
    entry_point: str | None = None
    setup: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.test.strip():
            raise ValueError(f"test{_of(self)} is empty: it would pass everything")
        if self.entry_point is not None and not self.entry_point.isidentifier():
            raise ValueError(f"entry_point{_of(self)} is {self.entry_point!r}; it must be a name")


@dataclass(frozen=True)
class CallTest:
    """Call `entry_point` with `arguments`; what it returns is compared outside of the sandbox.

    All values are JSON; tuples equal lists. `entry_point` is a function or a method of a class
    named Solution (LiveCodeBench, LeetCode). tolerance: absolute or relative, for numbers.
    """

    entry_point: str
    arguments: Sequence[Any]
    expected: Any
    tolerance: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        try:
            json.dumps([list(self.arguments), self.expected])
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments or expected{_of(self)} is not JSON: {error}") from None
        _require_tolerance(self, self.tolerance)


@dataclass(frozen=True)
class InputOutputTest:
    """A whole program that reads `stdin` and prints `expected`, compared outside of the sandbox.

    Spaces at the ends of lines and empty lines at the end do not count. With `tolerance` the
    output is compared word by word and numbers may differ by that much, absolutely or relatively.
    also: further outputs that are right.
    """

    stdin: str
    expected: str
    also: tuple[str, ...] = ()
    tolerance: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        _require_tolerance(self, self.tolerance)


@dataclass(frozen=True)
class DocTest:
    """Examples with ">>>"; None: those in the docstrings of the solution, which must have some."""

    examples: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.examples is not None and ">>>" not in self.examples:
            raise ValueError(f"examples{_of(self)} hold no line with >>>: they would pass anything")


Test = FunctionTest | CallTest | InputOutputTest | DocTest


def check(sandbox: Sandbox, source: str, test: Test, limits: Limits = DEFAULT_LIMITS) -> TestResult:
    """Run one solution against one test.

    Whatever the solution does is a verdict. Raises ValueError for a test that cannot be used
    (it does not compile, it checks nothing), and SandboxUnavailable if nothing can run here.
    """
    return matrix(sandbox, [source], [test], limits, workers=1)[0][0]


def matrix(
    sandbox: Sandbox,
    solutions: Sequence[str],
    tests: Sequence[Test],
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
) -> list[list[TestResult]]:
    """Every solution against every test, each in a run of its own: results[solution][test].

    Equal solutions are run once. Raises as `check` does. `workers` changes nothing but the speed.
    """
    seal = secrets.token_hex(16)  # told to no program, so that none can just write a report
    unique = list(dict.fromkeys(solutions))
    cells = [(source, test) for source in unique for test in tests]
    tasks = (_task(source, test, seal) for source, test in cells)
    outcomes = sandbox.run_many(tasks, limits, workers)
    results: Iterator[TestResult] = (
        _result(sandbox, outcome, test, seal, limits)
        for outcome, (_, test) in zip(outcomes, cells, strict=True)
    )
    rows = {source: [next(results) for _ in tests] for source in unique}
    return [list(rows[source]) for source in solutions]


def _task(source: str, test: Test, seal: str) -> dict[str, Any]:
    task: dict[str, Any] = {"source": source, "seal": seal}
    if isinstance(test, FunctionTest):
        more = {"test": test.test, "entry_point": test.entry_point, "setup": test.setup}
        return {"kind": "function", **task, **more}
    if isinstance(test, CallTest):
        more = {"entry_point": test.entry_point, "arguments": list(test.arguments)}
        return {"kind": "call", **task, **more}
    if isinstance(test, InputOutputTest):
        return {"kind": "program", **task, "stdin": test.stdin}
    return {"kind": "doctest", **task, "examples": test.examples}


def _result(
    sandbox: Sandbox, outcome: Outcome, test: Test, seal: str, limits: Limits
) -> TestResult:
    report = outcome.report if isinstance(outcome.report, dict) else None
    if report and "done" in report and report.get("seal") != seal:
        report = None  # the solution's own
    if report and "fault" in report:
        # The fault is found before the solution runs; one that an empty solution does not show
        # was made up by the solution.
        again = sandbox.run(_task("", test, seal), limits).report
        if isinstance(again, dict) and "fault" in again:
            raise ValueError(f"test{_of(test)} cannot be used: {_text(again['fault'])}")
        report = None
    verdict, detail = _ended(outcome) or _judge(outcome, test, report)
    return TestResult(
        verdict=verdict,
        detail=cut(detail, MAX_DETAIL),
        seconds=outcome.seconds,
        cpu_seconds=outcome.cpu_seconds,
        stdout=cut(outcome.stdout.decode(errors="replace"), MAX_TEXT),
        stderr=cut(outcome.stderr.decode(errors="replace"), MAX_TEXT),
    )


def _ended(outcome: Outcome) -> tuple[Verdict, str] | None:
    """The verdict on a run that did not end by itself."""
    if outcome.ended == "exited":
        return None
    if outcome.ended == "timeout" or outcome.signal == signal.SIGXCPU:
        return "timeout", f"stopped after {outcome.seconds:.1f} s ({outcome.cpu_seconds:.1f} s CPU)"
    if outcome.ended == "memory":
        return "memory", f"stopped for its memory: {outcome.peak_bytes / 2**20:.0f} MiB"
    if outcome.ended in ("output", "disk"):
        return "crash", f"stopped for too much {outcome.ended}"
    if outcome.signal == signal.SIGSYS:
        return "refused", "stopped for a system call that the sandbox does not allow"
    number = outcome.signal or 0
    known = number in signal.valid_signals() and number in {s.value for s in signal.Signals}
    return "crash", f"ended by {signal.Signals(number).name if known else f'signal {number}'}"


def _judge(outcome: Outcome, test: Test, report: dict | None) -> tuple[Verdict, str]:
    """The verdict on a run that exited."""
    if report and "exception" in report:
        return _exception(report)
    if isinstance(test, InputOutputTest):
        # No report needed: a program may leave by os._exit, and what counts is what it printed.
        if outcome.returncode:
            return "fail", f"exit code {outcome.returncode}"
        return _compare_output(outcome.stdout.decode(errors="replace"), test)
    if not report or report.get("done") is not True:
        code = outcome.returncode
        return "crash", f"ended before its checks were done, with exit code {code}"
    if isinstance(test, CallTest):
        return _compare_value(report, test)
    return "pass", ""


def _exception(report: dict) -> tuple[Verdict, str]:
    """The verdict on a run that an exception ended."""
    name, message = _text(report["exception"]), _text(report.get("message", ""))
    number = report.get("errno")
    number = number if isinstance(number, int) else None
    where = _text(report.get("where") or "")
    detail = f"{name}: {message}" if message else name
    detail = f"{detail} in {where!r}" if where else detail
    if report.get("exit"):
        return "crash", f"ended before its checks were done, by {detail}"
    if report.get("memory") or number == errno.ENOMEM:
        return "memory", detail
    if number in _OUT_OF_DISK:
        return "crash", detail
    # Negative numbers are those of name resolution.
    if number is not None and (number in _REFUSED or number < 0):
        return "refused", detail
    if message == "can't start new thread":
        return "refused", detail
    return "fail", detail


def _compare_output(printed: str, test: InputOutputTest) -> tuple[Verdict, str]:
    accepted = (test.expected, *test.also)
    if any(same_output(printed, text, test.tolerance) for text in accepted):
        return "pass", ""
    return "fail", first_difference(printed, test.expected)


def _compare_value(report: dict, test: CallTest) -> tuple[Verdict, str]:
    if "digest" in report:
        same = report["digest"] == digest(json.loads(json.dumps(test.expected)))
        return ("pass", "") if same else ("fail", "returned another value, too long to show")
    try:
        value = json.loads(report["value"])
        same = same_value(value, json.loads(json.dumps(test.expected)), test.tolerance)
    except (KeyError, TypeError, ValueError, RecursionError):
        return "fail", "what it returned is not JSON"
    if same:
        return "pass", ""
    given, wanted = cut(report["value"], 200), cut(json.dumps(test.expected), 200)
    return "fail", f"returned {given}, expected {wanted}"


def _of(test: Test) -> str:
    return f" of {test.name}" if test.name else ""


def _require_tolerance(test: Test, tolerance: float | None) -> None:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance{_of(test)} is {tolerance}; it must be at least 0 and below 1")


def _text(value: object) -> str:
    """A text of a report, without halves of surrogate pairs, which no file takes."""
    return str(value).encode("utf-8", "replace").decode()
