"""The attack itself: its programs get through where nothing holds them, and that is seen.

Run: pytest tests/verify/sandbox/test_hostile.py. Whether the sandbox holds them: test_users.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from phiforge.verify.sandbox import Layers, Limits, Outcome, Sandbox, hostile, hostile_context
from phiforge.verify.sandbox.hostile import CASES, Case, Context, attack

# Those that harm nothing when nothing holds them, and get through on any machine, as any user.
HARMLESS = """
read-passwd read-the-secret look-at-the-secret list-temporary-folders read-the-checkout read-proc
read-the-environment write-temporary-folders change-the-attacks-files change-metadata
write-deleted-files hide-files-from-the-watch search-descriptors write-to-descriptors
connect-tcp send-udp look-up-a-name connect-unix connect-abstract listen
kill-every-process signal-the-client limit-other-processes reschedule-other-processes
kill-its-own-group raise-its-limits thread-bomb daemon-that-outlives
run-a-file-of-its-own run-a-file-in-memory
""".split()


class Unprotected:
    """What a sandbox is to be compared with: a process with a time limit, as many evaluators do."""

    layers = Layers("none", {}, {}, isolates_files=False, isolates_network=False)

    def __enter__(self) -> Unprotected:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, task: dict[str, Any], limits: Limits) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="unprotected-") as work:
            os.chmod(work, 0o755)
            process = subprocess.Popen(
                [sys.executable, "-c", task["source"]],
                cwd=work,
                close_fds=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (9, 9)),
            )
            output, errors = process.communicate(timeout=60)
        code = process.returncode
        return Outcome(
            ended="signal" if code < 0 else "exited",
            returncode=None if code < 0 else code,
            signal=-code if code < 0 else None,
            stdout=output,
            stderr=errors,
            report=None,
            seconds=0.0,
            cpu_seconds=0.0,
            peak_bytes=0,
        )


def unprotected() -> Sandbox:
    return cast(Sandbox, Unprotected())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hostile_context, "_PATIENCE_SECONDS", 0.3)


def test_harmless_programs_get_through_where_nothing_holds_them(impatient: None):
    findings = {f.name: f for f in attack(unprotected, names=HARMLESS, workers=1)}
    for pid in re.findall(r"\d+", findings["daemon-that-outlives"].evidence):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    held = [f"{name}: {f.evidence}" for name, f in findings.items() if f.contained]
    assert held == ["nothing-left-over: all as before"]


def test_benign_programs_come_to_their_end_there_too():
    names = [case.name for case in CASES if case.name.startswith("use-the-library")]
    assert [f.contained for f in attack(unprotected, names=names)] == [True, True]


@pytest.mark.parametrize(
    ("source", "evidence"),
    [
        ("def broken():\n    tried()\n    undefined_name", "the program itself is broken"),
        ("def broken():\n    pass", "did not get as far as trying"),
        ("def broken():\n    tried()\n    escaped('something')", "something"),
        ("def broken():\n    tried()\n    print(open(FACTS['secret_file']).read())", "secret"),
        ("def broken():\n    tried()\n    print('x' * 300_000)", "longer than allowed"),
    ],
)
def test_what_is_not_held_or_was_not_tried_is_found(
    source: str, evidence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hostile, "CASES", (Case("broken", source, hostile.nothing_escaped),))
    finding = attack(unprotected, names=["broken"])[0]
    assert not finding.contained
    assert evidence in finding.evidence


def test_a_client_that_fails_or_hangs_is_found(monkeypatch: pytest.MonkeyPatch):
    class Failing(Unprotected):
        def run(self, task: dict[str, Any], limits: Limits) -> Outcome:
            raise RecursionError("forged report")

    class Hanging(Unprotected):
        def run(self, task: dict[str, Any], limits: Limits) -> Outcome:
            threading.Event().wait(30)
            raise AssertionError

    finding = attack(lambda: cast(Sandbox, Failing()), names=["forge-report"])[0]
    assert (finding.contained, "RecursionError" in finding.evidence) == (False, True)
    monkeypatch.setattr(hostile, "_MARGIN_SECONDS", -2.8)
    finding = attack(lambda: cast(Sandbox, Hanging()), names=["forge-report"])[0]
    assert (finding.contained, "did not end" in finding.evidence) == (False, True)


def test_only_missing_layers_excuse(monkeypatch: pytest.MonkeyPatch):
    case = next(case for case in CASES if case.name == "look-at-the-secret")
    assert attack(unprotected, names=[case.name])[0].expected == ""
    poorer = replace(Unprotected.layers, missing={"namespaces": "not allowed"})
    monkeypatch.setattr(Unprotected, "layers", poorer)
    finding = attack(unprotected, names=[case.name])[0]
    assert (finding.contained, finding.expected) == (False, case.exempt["namespaces"])


def test_names_are_checked_and_progress_is_told():
    with pytest.raises(ValueError, match="fork-bombb"):
        attack(unprotected, names=["fork-bombb"])
    told: list[hostile.Finding] = []
    names = ["read-passwd", "forge-report", "read-shadow"]
    findings = attack(unprotected, names=names, progress=told.append)
    assert told == findings
    order = [case.name for case in CASES if case.name in names]
    assert [f.name for f in findings] == [*order, "nothing-left-over"]


def test_a_sandbox_that_is_there_already_is_used():
    with Sandbox() as sandbox:
        findings = attack(sandbox, names=["read-the-secret", "connect-tcp"])
        assert all(f.contained for f in findings), findings
        assert sandbox.run({"kind": "program", "source": "print(1)"}).stdout == b"1\n"


def test_the_attack_leaves_nothing_of_its_own():
    before = (set(os.listdir("/proc/self/fd")), dict(os.environ), threading.active_count())
    with Context() as context:
        context.facts(Limits())
        victim, ground = context.victim.pid, context.ground
        assert os.environ["PHIFORGE_HOSTILE_SECRET"] == context.secret
    assert before == (set(os.listdir("/proc/self/fd")), dict(os.environ), threading.active_count())
    assert not Path(f"/proc/{victim}").exists()
    assert not ground.exists()


def test_programs_are_told_no_secret():
    with Context() as context:
        assert context.secret not in repr(context.facts(Limits()))


def test_the_look_from_outside_sees_what_changed(impatient: None):
    with Context() as context:
        facts = context.facts(Limits())
        assert context.damage(facts) is None
        facts = context.facts(Limits())
        (Path(facts["folder"]) / "new").touch()
        assert "changed" in str(context.damage(facts))
        facts = context.facts(Limits())
        name = f"import time; time.sleep(9) # {facts['marker']}"
        process = subprocess.Popen([sys.executable, "-c", name])
        assert str(process.pid) in str(context.damage(facts))
        process.kill()
        process.wait()
        facts = context.facts(Limits())
        context.victim.kill()
        time.sleep(0.1)
        assert "was ended" in str(context.damage(facts))
        assert context.damage(context.facts(Limits())) is None
