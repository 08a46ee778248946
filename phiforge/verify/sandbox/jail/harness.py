"""Runs one task inside the sandbox: a program, a function against its tests, a call, doctests.

The sandbox's last step calls `run(task)`: standard library only, no exception leaves it. It returns
an exit code and a report and writes nothing but what the program writes. It shares its process
with the program, so nobody outside trusts the report further than the run it is about.
"""

from __future__ import annotations

import _signal
import atexit
import builtins
import json
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import checks, examples

MAX_MESSAGE = 2000  # characters of an exception's message in a report
MAX_VALUE = 48 * 1024  # characters of a returned value in a report; longer ones are hashed
RECURSION_LIMIT = 1000  # Python's own, counted from the program's first frame

# Taken before foreign code runs, which may put something else in their place. The functions below
# look builtins up in a copy that no program can reach by name.
__builtins__ = dict(checks.BUILTINS)
_settrace, _setprofile, _setrecursionlimit = sys.settrace, sys.setprofile, sys.setrecursionlimit
_getpid, _exit = os.getpid, os._exit


def run(task: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
    """Run a task of a kind in KINDS: the exit code and what can be said of the run; never raises.

    "seal", if the task has one, comes back in the report of a run that reached its end: a program
    that writes such a report of its own, or changes ours, has to find the seal first.
    """
    owner, streams = _getpid(), (sys.stdout, sys.stderr)
    kind, seal = task.get("kind"), task.pop("seal", None)
    if not isinstance(kind, str) or kind not in KINDS:
        return 2, {"fault": f"kind is {kind!r}; allowed is one of {', '.join(KINDS)}"}
    _setrecursionlimit(RECURSION_LIMIT + _depth())
    report: dict[str, Any]
    try:
        report = KINDS[kind](task)
    except checks.Fault as fault:
        report = {"fault": _message(fault)}
    except BaseException as error:
        report = failure(error, "end")
    code = report.pop("exit_code", 1 if "exception" in report or "fault" in report else 0)
    try:
        _calm()
        code = _flush(streams) or code
    except BaseException as error:  # a signal handler or a thread of the program struck here
        code, report = 1, failure(error, "end")
    if _getpid() != owner:  # the program forked: the report is the first process's alone
        _exit(code)
    if seal is not None and report.get("done") is True:
        report["seal"] = seal
    return code, report


def failure(error: BaseException, stage: str) -> dict[str, Any]:
    """What a report says of an uncaught exception; `stage` is where it came up."""
    report: dict[str, Any] = {"exception": _name(error), "message": _message(error), "stage": stage}
    number = _errno(error)
    if number is not None:
        report["errno"] = number
    if isinstance(error, MemoryError):
        report["memory"] = True
    if isinstance(error, SystemExit):
        report["exit"] = True
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    if type(line) is int:
        report["line"] = line
    return report


def _name(error: BaseException) -> str:
    return type.__dict__["__name__"].__get__(type(error))[:200]  # a metaclass may define another


def _message(error: BaseException) -> str:
    try:
        return str.__getitem__(str(error), slice(0, MAX_MESSAGE))
    except BaseException:  # its __str__ is the program's code
        return "(its message could not be made)"


def _errno(error: BaseException) -> int | None:
    """The error number of an OSError, or of the one that it was raised for."""
    for link in (error, getattr(error, "reason", None), error.__cause__):
        number = getattr(link, "errno", None) if isinstance(link, OSError) else None
        if type(number) is int:
            return number
    return None


def _depth() -> int:
    """Frames below the program's first one: every way of starting leaves it as many for itself."""
    frame, depth = sys._getframe(1), 3
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth + (sys.version_info < (3, 12))  # there, `exec` itself counted


def _quiet() -> None:
    """Undo what would run the program's code between two lines of ours."""
    _settrace(None)
    _setprofile(None)
    for timer in (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF):
        _signal.setitimer(timer, 0)


def _calm() -> None:
    """The program is over: from here on nothing of it should get in our way."""
    builtins.__dict__.update(checks.BUILTINS)
    _setrecursionlimit(10 * RECURSION_LIMIT)
    _quiet()


def _flush(streams: tuple) -> int:
    """Write out what is buffered; 120, as Python's own exit code, when that fails."""
    code = 0
    for stream in (sys.stdout, sys.stderr, *streams):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:  # also the program's own idea of a stream
            code = 120
    return code


# --- a whole program -----------------------------------------------------------------------------


def _program(task: dict) -> dict:
    """Run `source` as __main__ with `argv`, and end as Python ends: threads, exit functions."""
    module = types.ModuleType("__main__")
    namespace = vars(module)
    namespace.update({"__builtins__": builtins, "__file__": "program.py"})
    sys.modules["__main__"] = module
    sys.argv = ["program.py", *task.get("argv", ())]
    _add_exit(builtins.__dict__)
    report = _main(task["source"], namespace)
    _finish_threads()
    atexit._run_exitfuncs()
    # Files that only the program's variables hold are flushed when those go. A daemon thread, which
    # Python would have frozen by now, still needs them.
    if len(sys._current_frames()) == 1:
        namespace.clear()
    return report


def _main(source: str, namespace: dict) -> dict:
    try:
        _execute(source, "program.py", namespace)
    except SystemExit as stop:
        return {"exit_code": _exit_code(stop)}
    except BaseException as error:
        _setrecursionlimit(10 * RECURSION_LIMIT)
        report = failure(error, "program")
        _print(error)
        interrupted = isinstance(error, KeyboardInterrupt)
        return {**report, "exit_code": 130 if interrupted else 1}
    return {"exit_code": 0}


def _execute(source: str, filename: str, namespace: dict) -> None:
    """Compile and run; the lines are kept for tracebacks."""
    lines = [line + "\n" for line in source.splitlines()]
    linecache.cache[filename] = (len(source), None, lines, filename)
    try:
        code = compile(source, filename, "exec", dont_inherit=True)
    except (MemoryError, RecursionError, OverflowError) as error:  # the parser's, not the run's
        name = type(error).__name__
        raise SyntaxError(f"{name} while compiling: nested too deeply, or too large") from None
    exec(code, namespace)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return int(stop.code) & 0xFF
    try:
        print(stop.code, file=sys.stderr)
    except BaseException:
        return 1
    return 1


def _print(error: BaseException) -> None:
    """The traceback on stderr, as Python prints it: without our frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace)
    except BaseException:  # no memory left, or stderr is the program's own object
        os.write(2, _name(error).encode("ascii", "replace") + b"\n")


def _finish_threads() -> None:
    threading = sys.modules.get("threading")
    try:
        if threading is not None:
            threading._shutdown()  # type: ignore[attr-defined]
    except BaseException as error:
        _print(error)


def _add_exit(namespace: dict) -> None:
    """`exit` and `quit`, which Python's site module adds and an interpreter without it lacks."""

    def leave(code: object = None) -> None:
        raise SystemExit(code)

    for name in ("exit", "quit"):
        namespace.setdefault(name, leave)


# --- a solution: a module whose functions are called ----------------------------------------------


def _solution(source: str) -> types.ModuleType:
    """The module "solution"; its builtins are a copy, so that it changes no one else's."""
    private = types.ModuleType("builtins")
    vars(private).update(checks.BUILTINS)
    _add_exit(private.__dict__)
    sys.modules["builtins"] = private
    module = types.ModuleType("solution")
    vars(module).update({"__builtins__": private, "__file__": "solution.py"})
    sys.modules["solution"] = module
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["solution.py"]
    _execute(source, "solution.py", vars(module))
    return module


def _seed(*texts: str) -> None:
    """Tests that draw their inputs draw the same ones every time."""
    if any("random" in text for text in texts):
        import random

        random.seed(0)


def _function(task: dict) -> dict:
    """Run `source`, then `setup` among its names, then the checks of `test`."""
    source, setup, text = task["source"], task.get("setup", ""), task["test"]
    test = checks.Checks(text, task.get("entry_point"))
    stage = "solution"
    try:
        _seed(source, text)
        module = _solution(source)
        if setup:
            stage = "setup"
            _execute(setup, "setup.py", vars(module))
        stage = "test"
        _quiet()
        _seed(source, text)
        test.run(vars(module))
    except BaseException as error:
        _calm()
        if not isinstance(error, checks.Failed):
            report = failure(error, stage)
            return {**report, "where": test.where(error), "held": test.num_held}
        return {"exception": "AssertionError", "message": _message(error), "held": test.num_held}
    _calm()
    return {"done": True, "held": test.num_held}


def _call(task: dict) -> dict:
    """Call the entry point with `arguments`; the report carries what it returned, as JSON."""
    stage = "solution"
    try:
        _seed(task["source"])
        module = _solution(task["source"])
        stage = "call"
        value = _entry(vars(module), task["entry_point"])(*task["arguments"])
        stage = "value"
        _calm()
        text = json.dumps(value)
        if len(json.dumps(text)) > MAX_VALUE:
            return {"done": True, "digest": digest(json.loads(text)), "length": len(text)}
    except BaseException as error:
        _calm()
        return failure(error, stage)
    return {"done": True, "value": text}


def _entry(namespace: dict, name: str) -> Callable:
    """A function of the solution, or a method of its class Solution."""
    if name in namespace:
        return namespace[name]
    if isinstance(namespace.get("Solution"), type):
        return getattr(namespace["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def digest(value: object) -> str:
    """A hash of a JSON value that equal values share: 1, 1.0 and true count as one."""

    def same(item: object) -> object:
        if isinstance(item, (bool, float)) and item == item and abs(item) < 2**53:
            return int(item) if item == int(item) else item
        if isinstance(item, list):
            return [same(x) for x in item]
        if isinstance(item, dict):
            return {key: same(x) for key, x in item.items()}
        return item

    import hashlib

    text = json.dumps(same(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _doctest(task: dict) -> dict:
    """Run `examples`, or the examples in the docstrings of `source` when there are none given."""
    _seed(task["source"], task.get("examples") or "")
    given = examples.parse(task["examples"]) if task.get("examples") is not None else None
    stage = "solution"
    try:
        module = _solution(task["source"])
        stage = "examples"
        _quiet()
        report = examples.run(module, given)
    except BaseException as error:
        _calm()
        return failure(error, stage)
    _calm()
    return report


KINDS: dict[str, Callable[[dict], dict]] = {
    "program": _program,
    "function": _function,
    "call": _call,
    "doctest": _doctest,
}
