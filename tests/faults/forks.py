"""Runs the command line in forks of one warm process, so that a run costs no start-up.

Run: python tests/faults/forks.py, then one JSON request per line on standard input:
{"arguments": [...], "inject": [[name, {...}], ...]}; each gives {"code", "out", "error"}.
"""

import io
import json
import os
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What the stages import only when they get there; pandas where pyarrow would find it.
LAZY = ["matplotlib.figure", "matplotlib.backends.backend_svg", "phiforge.inference.engine"]
LAZY += ["pyarrow.dataset", "pyarrow.compute", "torch._dynamo", "phiforge.recipe"]
LAZY += ["pandas"] if find_spec("pandas") else []

Injections = list[tuple[str, dict[str, Any]]]


def import_everything() -> None:
    """Load what the stages load, but start no thread: a fork has the calling thread alone."""
    from phiforge.stages import STAGES

    for stage in STAGES:
        stage.load()
    for name in LAZY:
        import_module(name)
    # The first figure of a process reads the fonts.
    figure = sys.modules["matplotlib.figure"].Figure()
    figure.add_subplot().set_title("")
    figure.savefig(io.BytesIO(), format="svg")


def run_fork(arguments: list[str], inject: Injections) -> dict[str, Any]:
    """One `phiforge ARGUMENTS` with faults injected; a negative code is the signal that ended it.

    {"started": pid} instead when an injection named "background" is among them.
    """
    background = any(name == "background" for name, _ in inject)
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        out.touch()
        error.touch()
        if background:
            out = error = Path(os.devnull)
        pid = os.fork()
        if pid == 0:
            _child(arguments, [row for row in inject if row[0] != "background"], out, error)
        if background:
            return {"started": pid}
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "out": out.read_text(), "error": error.read_text()}


def _child(arguments: list[str], inject: Injections, out: Path, error: Path) -> None:
    """Never returns: the fork ends as the command does."""
    import inject as faults

    code = 70
    try:
        os.setsid()
        # A test started in the background of a shell would have Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, path in ((1, out), (2, error)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        for name, values in inject:
            getattr(faults, name)(**values)
        from phiforge.cli import main

        sys.argv = ["phiforge", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until standard input ends."""
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = run_fork(request["arguments"], request["inject"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
