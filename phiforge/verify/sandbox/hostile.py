"""Attacks a sandbox with hostile programs and looks from outside at what each of them achieved.

`attack(lambda: Sandbox())` returns a Finding a case; `phiforge sandbox check --attack` shows them.
Everything that is reached for is the attack's own and below one folder in the temporary folder.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phiforge.verify.sandbox import (
    hostile_calls,
    hostile_files,
    hostile_outside,
    hostile_prelude,
    hostile_programs,
)
from phiforge.verify.sandbox.hostile_context import Context
from phiforge.verify.sandbox.limits import MIB, Limits
from phiforge.verify.sandbox.sandbox import Outcome, Sandbox

SHORT = Limits(
    cpu_seconds=1, wall_seconds=3, disk_bytes=8 * MIB, num_files=128, output_bytes=256 * 1024
)
_QUICK = replace(SHORT, wall_seconds=1)  # for programs that use up whatever they get
_LONG = replace(SHORT, cpu_seconds=20, wall_seconds=60, memory_bytes=1024 * MIB)
_MARGIN_SECONDS = 20.0  # beyond the wall limit: a loaded machine is slow, a held client is not back
_BROKEN = ("NameError", "SyntaxError", "TypeError", "AttributeError", "KeyError", "IndexError")
_BY_FILTER = {"seccomp": "only the system call filter refuses it"}


@dataclass(frozen=True)
class Case:
    """A program that tries something, and the judgement of what became of it.

    `contained` returns None, or what got through. `exempt` names layers without which the program
    may get through, with the reason; with every layer active nothing is exempt.
    """

    name: str
    source: str
    contained: Callable[[Outcome, Context], str | None]
    limits: Limits = SHORT
    exempt: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None  # a module that must be installed


@dataclass(frozen=True)
class Finding:
    """What one case came to: contained or not, and the evidence for it."""

    name: str
    contained: bool
    evidence: str
    seconds: float
    expected: str = ""  # why it may get through with the layers that are missing here


def nothing_escaped(outcome: Outcome, context: Context) -> str | None:
    """The program says itself when it gets through; it must have come as far as trying."""
    lines = (outcome.stdout + b"\n" + outcome.stderr).decode("utf-8", "replace").splitlines()
    escapes = [line.partition(": ")[2] for line in lines if line.startswith("ESCAPED: ")]
    if escapes:
        return "; ".join(escapes[:4])
    last = lines[-1] if lines else ""
    if last.startswith(_BROKEN):
        return f"the program itself is broken: {last}"
    if not any(line.startswith(("TRIED", "HELD: ")) for line in lines):
        return f"it did not get as far as trying: {_ending(outcome)}, {last[:200]}"
    return None


def ended_by(*ways: str) -> Callable[[Outcome, Context], str | None]:
    """Nothing escaped, and the run was ended by the sandbox in one of these ways."""

    def contained(outcome: Outcome, context: Context) -> str | None:
        wrong = f"ended in another way than {' or '.join(ways)}: {_ending(outcome)}"
        return nothing_escaped(outcome, context) or (None if outcome.ended in ways else wrong)

    return contained


def printed(text: str) -> Callable[[Outcome, Context], str | None]:
    """A benign program came to its end and had the right result."""

    def contained(outcome: Outcome, context: Context) -> str | None:
        if outcome.ended == "exited" and outcome.stdout.decode("utf-8", "replace").strip() == text:
            return None
        return f"{_ending(outcome)}: {(outcome.stdout + outcome.stderr[-300:])!r}"

    return contained


def _sources() -> Iterator[tuple[str, str]]:
    """Name and text of every program: the functions of four modules, in their order."""
    for module in (hostile_programs, hostile_files, hostile_outside, hostile_calls):
        text = Path(str(module.__file__)).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, ast.get_source_segment(text, node) or ""


_TIME = {"contained": ended_by("timeout", "signal"), "limits": SHORT}
_WAIT = {"contained": ended_by("timeout", "signal"), "limits": _QUICK}
_FLOOD = {"contained": ended_by("output", "timeout", "signal"), "limits": _QUICK}
_FILTERED = (
    *("memory_of_files_without_names", "memory_of_system_v", "run_a_file_of_its_own"),
    *("make_odd_sockets", "trace_processes", "limit_other_processes", "make_namespaces"),
    *("clone_into_namespaces", "open_performance_counters", "handle_page_faults", "use_keyrings"),
    *("change_personality", "administer_the_kernel", "use_secret_memory", "call_as_32_bit"),
    *("set_up_io_uring", "watch_the_folder", "call_as_x32", "join_namespaces"),
)
_SPECIAL: dict[str, dict[str, Any]] = {
    "infinite_loop": _TIME,
    "catch_cpu_limit": _TIME,
    "sleep": _WAIT,
    "ignore_signals": _WAIT,
    "stop_itself": _WAIT,
    "spin_in_many_processes": _WAIT,
    "close_every_descriptor": _WAIT,
    "stop_the_parent": _WAIT,
    "kill_the_parent": _WAIT,
    "fork_bomb": {"limits": _QUICK},
    **{name: {"exempt": _BY_FILTER} for name in _FILTERED},
    "become_root": {"exempt": {"another user": "Python lies where only root can read it"}},
    "thread_bomb": {
        "exempt": {
            "namespaces": "threads are counted per user, so a bound would bind the user too",
            "another user": "threads of root are not counted",
        }
    },
    "look_at_the_secret": {
        "exempt": {"namespaces": "Landlock hides contents, not names, sizes and dates"}
    },
    "endless_stdout": _FLOOD,
    "endless_stderr": _FLOOD,
    "endless_report": {"limits": _QUICK},
    "crash_at_a_null_pointer": {"contained": ended_by("signal")},
    "use_numpy": {
        "contained": printed("DONE 333283335000 1.0"), "limits": _LONG, "needs": "numpy",
    },
    "use_sympy": {
        "contained": printed("DONE pi/2 {2: 3, 3: 2, 5: 1, 7: 1, 11: 1, 13: 1}"),
        "limits": _LONG, "needs": "sympy",
    },
    "use_the_library": {"contained": printed("DONE [0, 1, 2, 3, 4] 2 0.333 ''"), "limits": _LONG},
}  # fmt: skip


def _cases() -> tuple[Case, ...]:
    found = []
    for name, source in _sources():
        options: dict[str, Any] = {"contained": nothing_escaped, **_SPECIAL.get(name, {})}
        found.append(Case(name=name.replace("_", "-"), source=source, **options))
    unknown = set(_SPECIAL) - {case.name.replace("-", "_") for case in found}
    assert not unknown, f"no program is called {unknown}"
    return tuple(found)


CASES = _cases()
_PRELUDE = Path(hostile_prelude.__file__).read_text()
_IMPORTS = "import ctypes, json, os, signal, stat, sys, time"
_BENIGN = """
import builtins, os
print("fine", sum(range(100)), sorted(os.listdir(".")), hasattr(builtins, "phiforge_poison"))
# {secret}
"""
_BENIGN_SAYS = b"fine 4950 [] False\n"


def attack(
    sandbox: Sandbox | Callable[[], Sandbox],
    names: Collection[str] | None = None,
    progress: Callable[[Finding], None] | None = None,
    workers: int = 2,
) -> list[Finding]:
    """Run the cases (all, or those in `names`), `workers` at a time; findings in the cases' order.

    Pass a function that makes the sandbox: only then can it be seen whether the sandbox hands on
    what its user's process has open. Raises ValueError for an unknown name.
    """
    cases = _chosen(names)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(Context())
        box = sandbox if isinstance(sandbox, Sandbox) else stack.enter_context(sandbox())
        before = _possessions()
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(_try, case, box, context) for case in cases]
            findings = []
            for future in waiting:
                findings.append(future.result())
                if progress:
                    progress(findings[-1])
        findings.append(_left_over(before))
        if progress:
            progress(findings[-1])
    return findings


def _chosen(names: Collection[str] | None) -> list[Case]:
    known = {case.name for case in CASES}
    unknown = sorted(set(names or ()) - known)
    if unknown:
        raise ValueError(f"names: {', '.join(unknown)}; cases are {', '.join(sorted(known))}")
    chosen = [case for case in CASES if names is None or case.name in names]
    return [case for case in chosen if not case.needs or importlib.util.find_spec(case.needs)]


def program(case: Case, facts: Mapping[str, Any]) -> str:
    """The self-contained text that is run: prelude, the case's function, a call of it."""
    function = case.name.replace("-", "_")
    start = f"FACTS.update(json.loads({json.dumps(facts)!r}))\ntake_name()\n{function}()\n"
    return f"{_PRELUDE}\n{_IMPORTS}\n\n{case.source}\n\n{start}"


def _try(case: Case, sandbox: Sandbox, context: Context) -> Finding:
    started = time.monotonic()
    facts = context.facts(case.limits)
    task = {"kind": "program", "source": program(case, facts)}
    outcome = _bounded(sandbox, task, case.limits)
    if isinstance(outcome, str):
        problem, evidence = outcome, ""
    else:
        problem = (
            case.contained(outcome, context)
            or _told(outcome, context, case.limits)
            or context.damage(facts)
            or _next_run(sandbox, context)
        )
        evidence = _evidence(outcome)
    reasons = [why for layer, why in case.exempt.items() if layer in sandbox.layers.missing]
    return Finding(
        name=case.name,
        contained=problem is None,
        evidence=_printable(problem or evidence),
        seconds=time.monotonic() - started,
        expected="; ".join(reasons) if problem else "",
    )


def _bounded(sandbox: Sandbox, task: dict[str, Any], limits: Limits) -> Outcome | str:
    """The outcome, or what the program did to its client: an exception, or no return."""
    answer: list[Outcome | str] = []

    def run() -> None:
        try:
            answer.append(sandbox.run(task, limits))
        except Exception as error:
            answer.append(f"the client failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    seconds = limits.wall_seconds + _MARGIN_SECONDS
    thread.join(seconds)
    return answer[0] if answer else f"the run did not end within {seconds:.0f} s"


def _told(outcome: Outcome, context: Context, limits: Limits) -> str | None:
    """What lies in the output, whoever put it there."""
    text = outcome.stdout + outcome.stderr + repr(outcome.report).encode()
    if context.secret.encode() in text:
        return "the secret is in the output"
    if max(len(outcome.stdout), len(outcome.stderr)) > limits.output_bytes:
        return "the output is longer than allowed"
    return None


def _next_run(sandbox: Sandbox, context: Context) -> str | None:
    """A benign program must run as if nothing had been; its text holds the secret."""
    task = {"kind": "program", "source": _BENIGN.format(secret=context.secret)}
    outcome = _bounded(sandbox, task, replace(_LONG, wall_seconds=20))
    if isinstance(outcome, str):
        return f"the next run: {outcome}"
    if outcome.ended != "exited" or outcome.stdout != _BENIGN_SAYS:
        said = (outcome.stdout + outcome.stderr)[-300:]
        return f"the next run came to another end: {_ending(outcome)}: {said!r}"
    return None


def _ending(outcome: Outcome) -> str:
    number = outcome.returncode if outcome.signal is None else outcome.signal
    return outcome.ended if number is None else f"{outcome.ended} {number}"


def _evidence(outcome: Outcome) -> str:
    lines = outcome.stdout.decode("utf-8", "replace").splitlines()
    held = [line.partition(": ")[2] for line in lines if line.startswith("HELD: ")]
    return "; ".join([_ending(outcome), *(line[:100] for line in held[:1])])


def _printable(text: str) -> str:
    """Evidence comes from foreign code: no escape sequence of it reaches a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _possessions() -> dict[str, set[str]]:
    """What of this process's a sandbox could leave behind."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = {line for line in lines if "phiforge" in line}
    return {"mounts": mounts, "descriptors": set(os.listdir("/proc/self/fd"))}


def _left_over(before: dict[str, set[str]]) -> Finding:
    """Descriptors and mounts of the client are as before the first case."""
    started = time.monotonic()
    more = {name: sorted(now - before[name]) for name, now in _possessions().items()}
    evidence = "; ".join(f"{name}: {', '.join(new)}" for name, new in more.items() if new)
    seconds = time.monotonic() - started
    return Finding("nothing-left-over", not evidence, evidence or "all as before", seconds)
