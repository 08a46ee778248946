"""`phiforge sandbox check | run | test` as a person uses them: output, exit codes, mistakes."""

import json
import os
import pty
import subprocess
import sys

import pytest


def phiforge(*arguments, **options):
    command = [sys.executable, "-m", "phiforge", "sandbox", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def program(tmp_path):
    def program(source):
        path = tmp_path / "program.py"
        path.write_text(source)
        return path

    return program


def test_check_names_the_layers():
    done = phiforge("check", "--json")
    assert done.returncode == 0
    layers = json.loads(done.stdout)
    assert layers["isolates_files"]
    assert layers["isolates_network"]
    assert "seccomp" in layers["active"]


def test_run_passes_input_arguments_and_output_through(program, tmp_path):
    given = tmp_path / "input.txt"
    given.write_text("hello\n")
    path = program("import sys; print(input(), sys.argv[1:]); print('oops', file=sys.stderr)")
    done = phiforge("run", path, "a", "b", "--stdin", given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello ['a', 'b']\n", "oops\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("while True: pass", "out of time"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal 11"),
        ("print('x' * 10**8)", "too much output"),
        ("x = bytearray(10**9)", "ended with exit code 1"),
    ],
)
def test_run_says_how_a_program_ended(program, source, said):
    done = phiforge("run", program(source), "--cpu-seconds", 1)
    assert done.returncode == 1
    assert said in done.stderr


def test_run_prints_json(program):
    done = phiforge("run", program("print(2)"), "--json")
    outcome = json.loads(done.stdout)
    assert (outcome["ended"], outcome["returncode"], outcome["stdout"]) == ("exited", 0, "2\n")


def test_a_program_does_not_steer_the_terminal(program):
    ours, theirs = pty.openpty()
    path = program("print('\\x1b]0;title\\x07\\u202e done')")
    command = [sys.executable, "-m", "phiforge", "sandbox", "run", str(path)]
    subprocess.run(command, stdout=theirs, timeout=120, check=True)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\x1b" not in shown
    assert "\\x1b]0;title\\x07" in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere.py"), "nowhere.py: No such file"),
        (("run", "-", "--backend", "docker"), "docker"),
        (("check", "--without", "walls"), "without: walls"),
        (("test", "nowhere.jsonl"), "--reference gold or --reference stub"),
    ],
)
def test_mistakes_are_named(arguments, said):
    done = phiforge(*arguments, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert said in done.stderr


def test_nothing_runs_without_isolation(program):
    path = program("print('ran')")
    layers = [f"--without={name}" for name in ("namespaces", "landlock", "seccomp")]
    done = phiforge("run", path, "--backend", "native", *layers)
    assert done.returncode == 1
    assert "ran" not in done.stdout
    assert "cannot be isolated" in done.stderr
    done = phiforge("run", path, "--backend", "native", "--unsafe", *layers)
    assert (done.returncode, done.stdout) == (0, "ran\n")
