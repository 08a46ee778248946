"""Runs the harness in a process that is confined already, or confines it first; never returns.

`run(task, site)` in a fork of the server, `main()` in a new interpreter. Imports next to nothing:
a new interpreter pays for every import, for every run.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

from . import harness

REPORT, TASK = 3, 4  # descriptors beside the usual three
REPORT_BYTES = 64 * 1024


def run(task: dict[str, Any], site: list[str]) -> NoReturn:
    """Run `task`, write the report, end the process. `site`: folders of installed packages."""
    sys.path.extend(path for path in site if path not in sys.path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "jail"]:
        del sys.modules[name]
    encode, write, leave = json.dumps, os.write, os._exit  # before the program can replace them
    code, report = harness.run(task)
    if report is not None:
        raw = encode(report).encode()
        if len(raw) > REPORT_BYTES:
            raw = b'{"error": "the report was too long"}'
        try:  # noqa: SIM105 - contextlib would be one more import for every run
            write(REPORT, raw)
        except OSError:
            pass  # closed by the program: the client sees that there is no report
    leave(code)


def main() -> NoReturn:
    """First call of a new interpreter: what to do lies in the descriptor TASK."""
    with os.fdopen(TASK, "rb") as file:
        task, site = json.loads(file.read())
    run(task, site)
