"""What a Python needs to run: its program, its library folders, its installed packages.

`describe(None)` for this interpreter, `describe(path)` asks another one. Nothing is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from phiforge.verify.sandbox.jail import tree

_QUESTION = """
import json, os, sys, sysconfig
paths = sysconfig.get_paths()
print(json.dumps({
    "version": sys.version_info[:2],
    "executable": getattr(sys, "_base_executable", None) or sys.executable,
    "library": [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_exec_prefix, "lib")],
    "site": [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")],
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python without its virtual environment's links: folders are named as they lie on disk."""

    executable: str
    library: tuple[str, ...]
    site: tuple[str, ...]

    def paths(self) -> list[str]:
        """All that programs run by it must be able to read."""
        named = [self.executable, *self.library, *self.site]
        named += [os.path.realpath(path) for path in named]
        found = dict.fromkeys([*named, *tree.SYSTEM_LIBRARIES, tree.LOADER_CACHE])
        return [path for path in found if os.path.exists(path)]


def describe(python: Path | None) -> Interpreter:
    """Ask `python` (None: the running one). ValueError if it is no Python 3.11 or later."""
    command = [str(python or sys.executable), "-s", "-c", _QUESTION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"python {command[0]} does not answer: {error}") from None
    if tuple(answer["version"]) < (3, 11):
        version = ".".join(map(str, answer["version"]))
        raise ValueError(f"python {command[0]} is {version}; the sandbox needs 3.11 or later")
    executable = os.path.realpath(answer["executable"])
    return Interpreter(executable, tuple(answer["library"]), tuple(answer["site"]))
