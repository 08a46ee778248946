"""Other programs that isolate, where our own layers cannot: bubblewrap and sandlock, if installed.

`find(name, python, jail_folder, readable)` gives the command line that goes in front of an
interpreter's, or why there is none. Starts `bwrap --version` and nothing else; nothing is written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phiforge.verify.sandbox.interpreter import Interpreter
from phiforge.verify.sandbox.jail import supervise, tree

NAMES = ("native", "bubblewrap", "sandlock")  # the order in which "auto" tries them


@dataclass(frozen=True)
class Wrapper:
    """A program that isolates, started once for every run, with an interpreter inside."""

    name: str
    command: tuple[str, ...]  # supervise.WORK in it stands for the run's folder
    inner_work: str  # what that folder is called inside; empty: the same
    namespaces: bool  # whether there are namespaces of users and processes, which end everything
    detail: str


def find(
    name: str, python: Interpreter, jail_folder: str, readable: Sequence[str]
) -> tuple[Wrapper | None, str]:
    """The wrapper of that name and "", or None and what is missing."""
    if name == "bubblewrap":
        return _find_bubblewrap(readable)
    return _find_sandlock(python, jail_folder, readable)


def _find_bubblewrap(readable: Sequence[str]) -> tuple[Wrapper | None, str]:
    program = shutil.which("bwrap")
    if program is None:
        return None, "there is no program `bwrap`: apt install bubblewrap (or your system's way)"
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{program} does not run: {error}"
    detail = f"{done.stdout.split()[-1]}: user, mount, pid, network, ipc, uts namespaces; "
    detail += "read-only root; a watched folder to write in"
    command = tuple(bubblewrap_command(program, readable))
    return Wrapper("bubblewrap", command, tree.WORK, True, detail), ""


def bubblewrap_command(program: str, readable: Sequence[str]) -> list[str]:
    """The tree that `jail.tree` makes, made by bubblewrap; a command to run in it goes behind.

    The folder to write in is one of the host's, which the supervisor watches: a tmpfs of bubblewrap
    bounds bytes but not the number of files.
    """
    command = [program, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1"]
    for path in tree.outermost(list(readable)):
        if tree.is_system_link(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    for device in tree.DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--bind", supervise.WORK, tree.WORK]
    for place in tree.WORK_LINKS:
        if not any(path == place or path.startswith(place + "/") for path in readable):
            command += ["--symlink", tree.WORK, place]
    return [*command, "--remount-ro", "/", "--chdir", tree.WORK, "--"]


def _find_sandlock(
    python: Interpreter, jail_folder: str, readable: Sequence[str]
) -> tuple[Wrapper | None, str]:
    places = [Path(folder) for folder in (*python.site, *sys.path) if folder]
    folder = next((p for p in places if (p / "sandlock" / "sandbox.py").is_file()), None)
    if folder is None:
        text = f"neither {python.executable} nor this Python has it: pip install sandlock"
        return None, text
    settings = {"folder": str(folder), "readable": list(readable), "devices": tree.DEVICES}
    code = f"import sys; sys.path.insert(0, {jail_folder!r}); from jail import wrapped; "
    code += "wrapped.sandlock()"
    command = [python.executable, "-I", "-S", "-B", "-X", "utf8", "-c", code]
    command += [json.dumps(settings), supervise.WORK]
    detail = f"{_sandlock_version(folder)}: its Landlock rules and seccomp filter; "
    detail += "a watched folder to write in"
    return Wrapper("sandlock", tuple(command), "", False, detail), ""


def _sandlock_version(folder: Path) -> str:
    found = [path.name for path in folder.glob("sandlock-*.dist-info")]
    return found[0].removeprefix("sandlock-").removesuffix(".dist-info") if found else "?"
