"""Runs one attack in a process of its own, as this user or as an ordinary one; prints JSON.

Run: python attacker.py '{"user": 65534, "sandbox": {"warm": false}, "names": null}'. Used by the
tests of this folder: `attack(...)` starts it, with a temporary folder that nothing else writes to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
NOBODY = 65534
_OWN = "way-"  # where folders are shown to an ordinary user: ours, not the sandbox's


@dataclass(frozen=True)
class Attacked:
    """What an attack found, and what was left of it when its process was done."""

    findings: list[dict[str, Any]]
    missing: dict[str, str]
    processes: list[int]  # children that the client still had
    files: list[str]  # entries of its temporary folder


def attack(user: int | None = None, names: list[str] | None = None, **sandbox: Any) -> Attacked:
    """An attack on `Sandbox(**sandbox)` by `user` (None: the present one), from its own process."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attack-")))
        folder.chmod(0o777)
        order = {"user": user, "names": names, "sandbox": sandbox}
        environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(order)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=500)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        assert process.returncode == 0, errors.decode()[-4000:]
        files = [name for name in os.listdir(folder) if not name.startswith(_OWN)]
        return Attacked(**json.loads(output), files=files)


def become(user: int) -> None:
    """An ordinary user, who must still reach Python and this checkout; needs root."""
    wanted = [Path(sys.base_prefix), Path(sys.prefix), CHECKOUT]
    for blocked in sorted({parent for path in wanted for parent in _closed_parents(path)}):
        _open_the_way(blocked, [path for path in wanted if path.is_relative_to(blocked)])
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.environ["HOME"] = "/nonexistent"
    os.chdir("/")


def _closed_parents(path: Path) -> list[Path]:
    """The topmost folder on the way to `path` that others may not enter, if there is one."""
    closed = [p for p in reversed(path.parents) if not p.stat().st_mode & 0o001]
    return closed[:1]


def _open_the_way(blocked: Path, wanted: list[Path]) -> None:
    """In a mount namespace of one's own `blocked` holds only the wanted folders, for everybody."""
    from phiforge.verify.sandbox.jail import kernel

    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    place = tempfile.mkdtemp(prefix=_OWN)
    kernel.mount("tmpfs", place, "tmpfs", 0, "mode=755")
    for path in wanted:
        target = Path(place) / path.relative_to(blocked)
        target.mkdir(parents=True, exist_ok=True)
        kernel.mount(str(path), str(target), None, kernel.MS_BIND | kernel.MS_REC)
    kernel.mount(place, str(blocked), None, kernel.MS_BIND | kernel.MS_REC)


def main() -> None:
    order = json.loads(sys.argv[1])
    if order["user"] is not None:
        become(order["user"])
    from phiforge.verify.sandbox import Sandbox, hostile

    missing: dict[str, str] = {}

    def make() -> Sandbox:
        sandbox = Sandbox(**order["sandbox"])
        missing.update(sandbox.layers.missing)
        return sandbox

    findings = hostile.attack(make, names=order["names"], workers=3)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    answer = {"findings": [asdict(f) for f in findings], "missing": missing}
    print(json.dumps({**answer, "processes": [int(pid) for pid in children]}))


if __name__ == "__main__":
    main()
