"""Oracles by name: did a response solve its problem? Answers, code, programs, functions, a judge.

`with open_oracle("math") as oracle: oracle(problem, response)`, or `oracle.many(pairs)` for a round
of rollouts at once. A call is True or False, or raises OracleError: unscored. Writes nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phiforge.core.records import Problem
from phiforge.core.usage import unknown_name
from phiforge.posttrain.pivotal.oracle_code import open_code
from phiforge.posttrain.pivotal.oracle_judge import open_judge
from phiforge.posttrain.pivotal.scoring import Pair, Scorer, Verdict, each, needs_answer
from phiforge.verify.answers import OracleError, is_correct
from phiforge.verify.mathematics import after_thinking

Thinking = Literal["strip", "opened", "keep"]
THINKING = ("strip", "opened", "keep")
_PROBE = "(no answer)"


@dataclass
class Oracle:
    """A callable (Problem, response) -> bool that remembers its verdicts; a context manager.

    thinking: "strip": what is checked is the text after "</think>"; "opened": the prompt ends with
    <think>, so a response that never closes it has no answer; "keep": the whole text.
    Verdicts are kept by (problem id, response); errors are not, so that they are tried again.
    """

    name: str
    scorer: Scorer
    thinking: Thinking = "strip"
    num_calls: int = 0  # responses that were not remembered
    _known: dict[bytes, bool] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes it holds."""
        self.scorer.close()

    def __call__(self, problem: Problem, response: str) -> bool:
        """Whether the response solves the problem. Raises OracleError when it cannot tell."""
        verdict = self.many([(problem, response)])[0]
        if isinstance(verdict, OracleError):
            raise verdict
        return verdict

    def many(self, pairs: Iterable[Pair]) -> list[Verdict]:
        """A verdict, or the OracleError in its place, for each pair; equal pairs are asked once."""
        pairs = list(pairs)
        keys = [_key(problem, response) for problem, response in pairs]
        fresh = {
            key: (problem, self._answer(response))
            for key, (problem, response) in zip(keys, pairs, strict=True)
            if key not in self._known
        }
        found = dict(zip(fresh, self._score(list(fresh.values())), strict=True))
        self._known |= {key: v for key, v in found.items() if not isinstance(v, OracleError)}
        return [self._known[key] if key in self._known else found[key] for key in keys]

    def refuses(self, problem: Problem) -> str | None:
        """Why no response to this problem can be scored; None when one can."""
        return self.scorer.refuses(problem)

    def check(self, problem: Problem) -> None:
        """Ask once, before anything is sampled. Raises ValueError when no verdict comes."""
        verdict = self._score([(problem, _PROBE)])[0]
        if isinstance(verdict, OracleError):
            raise ValueError(f"oracle {self.name!r} cannot judge problem {problem.id!r}: {verdict}")

    def _answer(self, response: str) -> str:
        if self.thinking == "keep":
            return response
        return after_thinking(response, opened=self.thinking == "opened")

    def _score(self, pairs: list[Pair]) -> list[Verdict]:
        self.num_calls += len(pairs)
        asked = [(i, pair) for i, pair in enumerate(pairs) if self.refuses(pair[0]) is None]
        verdicts: list[Verdict] = [
            OracleError(f"problem {problem.id}: {self.refuses(problem)}") for problem, _ in pairs
        ]
        scored = self.scorer.many([pair for _, pair in asked]) if asked else []
        for (i, _), verdict in zip(asked, scored, strict=True):
            verdicts[i] = verdict
        return verdicts


def _key(problem: Problem, response: str) -> bytes:
    """Short, because a search keeps one for each of its rollouts."""
    text = json.dumps([problem.id, response])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def open_oracle(name: str, *, thinking: Thinking = "strip", **options: Any) -> Oracle:
    r"""The oracle of a name; close it, or use it in a `with`.

    exact              `phiforge.verify.is_correct`, as `problem.kind` says, after "Answer:"
    math               boxed or last expression, by math-verify (anchored, processes)
    number             boxed or last number, with units (tolerance, anchored)
    choice             a letter or word (anchored)
    code               against the tests in problem.metadata, in a sandbox (form, limits, workers)
    module:function    your Python function (Problem, str) -> bool; also path/to/file.py:function
    command:PROGRAM    your program, one JSON line in and one out, with your rights (seconds)
    judge              a model behind an endpoint (endpoint, template, max_tokens)

    Raises ValueError for an unknown name or option, what cannot be imported or started, and
    SandboxUnavailable where code cannot be contained.
    """
    if thinking not in THINKING:
        raise ValueError(f"thinking is {thinking!r}; allowed: {', '.join(THINKING)}")
    kind, _, rest = name.partition(":")
    if name in _ORACLES:
        opening, arguments = _ORACLES[name], ()
    elif kind == "command":
        opening, arguments = _open_command, (rest,)
    elif rest:
        opening, arguments = _open_function, (name,)
    else:
        known = (*_ORACLES, "module:function", "command:PROGRAM")
        raise ValueError(unknown_name("oracle", (name,), known, "name"))
    parameters = inspect.signature(opening).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"oracle {name!r}", (option,), known, "option"))
    return Oracle(name, opening(*arguments, **options), thinking)


# ------------------------------------------------------------------------------ exact answers


def _open_exact() -> Scorer:
    def refuses(problem: Problem) -> str | None:
        return None if problem.kind == "refusal" else needs_answer(problem)

    return Scorer(each(is_correct), refuses=refuses)


def _open_math(*, anchored: bool = False, processes: int = 1) -> Scorer:
    from phiforge.verify.mathematics import Mathematics, final_answer

    mathematics = Mathematics(processes)

    def check(problem: Problem, response: str) -> bool:
        given = final_answer(response, anchored=anchored)
        return given is not None and mathematics.is_equal(problem.answer or "", given)

    return Scorer(each(check, processes), mathematics.close, needs_answer)


def _open_number(*, tolerance: float = 0.0, anchored: bool = False) -> Scorer:
    from phiforge.verify.mathematics import final_answer, is_close

    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is relative: at least 0 and below 1")

    def check(problem: Problem, response: str) -> bool:
        given = final_answer(response, anchored=anchored)
        return given is not None and is_close(given, problem.answer or "", tolerance)

    return Scorer(each(check), refuses=needs_answer)


def _open_choice(*, anchored: bool = False) -> Scorer:
    from phiforge.verify.choices import final_choice, is_choice

    def check(problem: Problem, response: str) -> bool:
        given = final_choice(response, anchored=anchored)
        options = problem.metadata.get("options") or ()
        return given is not None and is_choice(given, problem.answer or "", options)

    return Scorer(each(check), refuses=needs_answer)


# ------------------------------------------------------------------- functions and programs


def _open_function(name: str) -> Scorer:
    function = load_function(name)

    def check(problem: Problem, response: str) -> bool:
        verdict = function(problem, response)
        # A score of 0.5 would count as True; numpy's own bool is none of Python's.
        if not (isinstance(verdict, bool) or type(verdict).__name__ in ("bool_", "bool")):
            shown = f"{verdict!r:.60} ({type(verdict).__name__})"
            raise OracleError(f"problem {problem.id}: {name} returned {shown}; it must be a bool")
        return bool(verdict)

    return Scorer(each(check))


def load_function(name: str) -> Callable[[Problem, str], Any]:
    """The function of "module:function" or "path/to/file.py:function".

    Raises ValueError when it cannot be imported or cannot take (Problem, str) and return a bool.
    """
    where, _, attribute = name.rpartition(":")
    module = _import(where, name)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
            raise ValueError(unknown_name(f"oracle {name!r}", (attribute,), known, "function"))
        function = getattr(function, part)
    _check_signature(function, name)
    return function


def _import(where: str, name: str) -> Any:
    path = Path(where).expanduser()
    sys.path.insert(0, str(path.parent.absolute()) if where.endswith(".py") else os.getcwd())
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not path.is_file():
            raise ValueError(f"oracle {name!r}: {path} is no file")
        spec = importlib.util.spec_from_file_location(f"phiforge_oracle_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"oracle {name!r} cannot be imported ({reason})") from error
    finally:
        sys.path.pop(0)


def _check_signature(function: Any, name: str) -> None:
    if not callable(function):
        raise ValueError(f"oracle {name!r} is {type(function).__name__}; it must be a function")
    if inspect.iscoroutinefunction(function) or inspect.isclass(function):
        raise ValueError(f"oracle {name!r}: give a plain function (Problem, str) -> bool")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-in functions have none
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise ValueError(
            f"oracle {name!r} takes {signature}; it is called with (problem, response): {error}"
        ) from None
    returns = signature.return_annotation
    if returns not in (inspect.Signature.empty, bool, "bool", Any, "Any"):
        shown = getattr(returns, "__name__", returns)
        raise ValueError(f"oracle {name!r} says that it returns {shown}; it must return a bool")


def _open_command(command: str, *, seconds: float = 60.0) -> Scorer:
    """A program that answers {"problem": ..., "response": ...} with true or false, line by line."""
    from phiforge.verify.line_process import LineProcess, ProgramFailed

    program = LineProcess(shlex.split(command), seconds=seconds)

    def check(problem: Problem, response: str) -> bool:
        try:
            line = program.ask(json.dumps({"problem": asdict(problem), "response": response}))
        except ProgramFailed as error:
            raise OracleError(f"problem {problem.id}: {command}: {error}") from None
        if line.strip() not in ("true", "false"):
            raise OracleError(
                f"problem {problem.id}: {command} answered {line[:80]!r}; a line true or false"
            )
        return line.strip() == "true"

    return Scorer(each(check), program.close)


_ORACLES: dict[str, Callable[..., Scorer]] = {
    "exact": _open_exact,
    "math": _open_math,
    "number": _open_number,
    "choice": _open_choice,
    "code": open_code,
    "judge": open_judge,
}
