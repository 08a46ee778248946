"""What a result was made with: package version, commit, Python, libraries, machine.

Call `code_version()` and `environment()`; both are recorded in manifests and enter no fingerprint.
"""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from phiforge import __version__
from phiforge.core.distributed import num_cores

_LIBRARIES = ("torch", "numpy", "tokenizers", "safetensors", "transformers")


@cache
def code_version() -> dict[str, Any]:
    """Package version, and commit and cleanliness when it runs from a git checkout."""
    root = Path(__file__).parents[2]
    version: dict[str, Any] = {"phiforge": __version__}
    if (root / ".git").exists():
        version["commit"] = _git(root, "rev-parse", "--short=12", "HEAD")
        version["modified"] = bool(_git(root, "status", "--porcelain", "--", "phiforge"))
    return version


@cache
def environment() -> dict[str, Any]:
    """Python, system, processor, cores and the versions of the libraries that compute."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": num_cores(),
        **found,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
