"""Where each peer lives: an environment of its own in the user's cache, or a Python that is given.

`find(name, given)` returns the peer's Python, or says how to get one; `setup(name)` makes the
environment (it installs from PyPI). Written by `setup` alone: CACHE/phiforge/bench/peers/NAME.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phiforge.core.usage import UsageError

_DRIVERS = Path(__file__).parent / "peers"
_READY = "phiforge-requirements.txt"


@dataclass(frozen=True)
class Peer:
    """What a peer can do and which script drives it."""

    name: str
    driver: str
    tasks: tuple[str, ...]  # "engine", "train", "sandbox"

    @property
    def script(self) -> Path:
        """The script that runs on the peer's Python."""
        return _DRIVERS / self.driver

    @property
    def requirements(self) -> Path:
        """What pip installs into the peer's environment."""
        return _DRIVERS / f"{self.name}.txt"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers", "run_transformers.py", ("engine", "train")),
        Peer("litgpt", "run_litgpt.py", ("train",)),
        Peer("llama.cpp", "run_llama_cpp.py", ("engine",)),
        Peer("sandlock", "run_sandlock.py", ("sandbox",)),
    )
}


def choose(names: list[str], task: str) -> list[Peer]:
    """The peers asked for that take part in a task; all of them when none is named.

    "none" stands for no peer. Raises UsageError for an unknown name.
    """
    if names == ["none"]:
        return []
    for name in names:
        check_name(name)
    return [
        peer for peer in PEERS.values() if task in peer.tasks and (not names or peer.name in names)
    ]


def check_name(name: str) -> None:
    """Raises UsageError unless there is such a peer."""
    if name not in PEERS:
        raise UsageError(f"no peer {name!r}; known: {', '.join(PEERS)}")


def find(peer: Peer, given: Mapping[str, str]) -> tuple[Path | None, str]:
    """The peer's Python and "", or None and what to do about it.

    `given` maps peers to Pythons of the user's choice. Raises UsageError for one that is not there.
    """
    if peer.name in given:
        python = Path(given[peer.name])
        if not python.is_file():
            raise UsageError(f"--peer-python {peer.name}={python}: no such file")
        return python, ""
    folder = environment_folder(peer)
    python = python_of(folder)
    ready = folder / _READY
    remedy = f"`phiforge bench setup {peer.name}` makes it"
    if not python.is_file() or not ready.is_file():
        return None, f"{peer.name}: skipped, no environment at {folder}; {remedy}"
    if ready.read_text() != peer.requirements.read_text():
        return None, f"{peer.name}: skipped, {folder} has other requirements; {remedy} anew"
    return python, ""


def setup(name: str) -> Path:
    """Make (or make anew) a peer's environment with venv and pip; returns its Python.

    Raises UsageError for an unknown peer, RuntimeError when pip fails.
    """
    check_name(name)
    peer = PEERS[name]
    folder = environment_folder(peer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder / _READY).unlink(missing_ok=True)
    python = python_of(folder)
    install = [str(python), "-m", "pip", "install", "-r", str(peer.requirements)]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
        code = subprocess.run(command, stdout=sys.stderr).returncode
        if code != 0:
            raise RuntimeError(f"`{' '.join(command)}` ended with exit code {code}")
    (folder / _READY).write_text(peer.requirements.read_text())
    return python


def environment_folder(peer: Peer) -> Path:
    """Where `setup` puts a peer's environment."""
    return cache_folder() / "peers" / peer.name


def cache_folder() -> Path:
    """The benchmark's part of the user's cache: XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "phiforge" / "bench"


def python_of(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
