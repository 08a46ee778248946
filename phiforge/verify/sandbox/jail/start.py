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
    code, report = harness.run(task)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # the program may have put anything there
            code = code or 1
    if report is not None:
        raw = json.dumps(report).encode()
        if len(raw) > REPORT_BYTES:
            raw = b'{"error": "the report was too long"}'
        try:  # noqa: SIM105 - contextlib would be one more import for every run
            os.write(REPORT, raw)
        except OSError:
            pass  # closed by the program: the client sees that there is no report
    os._exit(code)


def main() -> NoReturn:
    """First call of a new interpreter: what to do lies in the descriptor TASK."""
    with os.fdopen(TASK, "rb") as file:
        task, site = json.loads(file.read())
    run(task, site)
