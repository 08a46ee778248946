"""What an attack stands on: secrets and listeners of its own, and the look from outside afterwards.

`with Context() as context:`; `context.facts(limits)` is what a program is told, and
`context.damage(facts)` says what it did. Writes below one folder in the temporary folder.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from phiforge.verify.sandbox.limits import Limits

SECRET_PREFIX = "phiforge-hostile-secret-"
_VARIABLE = "PHIFORGE_HOSTILE_SECRET"
_PATIENCE_SECONDS = 10.0  # for processes that have been killed and not yet been reaped


class Context:
    """Owns everything that hostile programs reach for, so that only the sandbox protects it.

    Open it before the sandbox, whose server then has the chance to inherit what it must not.
    """

    def __init__(self) -> None:
        self.secret = SECRET_PREFIX + secrets.token_hex(16)
        self.ground = Path(tempfile.mkdtemp(prefix="phiforge-hostile-"))
        self.ground.chmod(0o777)
        self.secret_file = self.ground / "secret.txt"
        self.secret_file.write_text(self.secret)
        self.secret_file.chmod(0o666)
        self._in_memory = ctypes.create_string_buffer(self.secret.encode())
        self._variable = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = self.secret
        self._host_name = os.uname().nodename
        self.listeners = _listeners(self.ground)
        self._leak = _leak_descriptors(self.secret_file)
        self.victim = _start_victim()
        self._caller = _Caller()
        self._snapshots: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started and remove what was made."""
        self._caller.close()
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners.values():
            listener.close()
        for descriptor in self._leak:
            os.close(descriptor)
        if self._variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = self._variable
        shutil.rmtree(self.ground, ignore_errors=True)

    def facts(self, limits: Limits) -> dict[str, Any]:
        """What one program is told, with a folder and a name of its own; no secret is among it."""
        marker = "pf" + secrets.token_hex(6)  # a process name has 15 characters
        folder = self.ground / marker
        _make_canaries(folder)
        self._snapshots[marker] = _snapshot(folder)
        ports = {
            name: listener.getsockname()[1]
            for name, listener in self.listeners.items()
            if listener.family in (socket.AF_INET, socket.AF_INET6)
        }
        package = Path(__file__).resolve().parents[2]
        return {
            "marker": marker,
            "folder": str(folder),
            "ground": str(self.ground),
            "temporary": tempfile.gettempdir(),
            "secret_file": str(self.secret_file),
            "secret_prefix": SECRET_PREFIX,
            "secret_descriptor": self._leak[0],
            "memory_address": ctypes.addressof(self._in_memory),
            "memory_length": len(self.secret),
            "home": str(Path.home()),
            "package_file": str(package / "__init__.py"),
            "checkout": str(package.parent),
            "places": _places(),
            "client": os.getpid(),
            "client_parent": os.getppid(),
            "victim": self.victim.pid,
            "tcp6": 9,
            "udp6": 9,
            **ports,
            "callback": self._caller.port,
            "unix": str(self.ground / "socket"),
            "abstract": self.ground.name,
            "key": int(marker[2:9], 16),
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "num_processes": limits.num_processes,
        }

    def heard(self) -> str | None:
        """What arrived at a listener since the last look."""
        for name, listener in self.listeners.items():
            if not select.select([listener], [], [], 0)[0]:
                continue
            if listener.type == socket.SOCK_STREAM:
                listener.accept()[0].close()
                return f"a connection arrived at the {name} listener"
            return f"the {name} listener received {listener.recv(4096)[:40]!r}"
        return self._caller.reached

    def damage(self, facts: dict[str, Any]) -> str | None:
        """What is different outside after a program ended; None if nothing is."""
        marker = facts["marker"]
        if _snapshot(Path(facts["folder"])) != self._snapshots.pop(marker):
            return "files of the attack's folder were changed"
        if self.secret_file.read_text() != self.secret:
            return "the secret file was changed"
        return (
            _left_behind(facts["places"], marker)
            or self.heard()
            or self._victim_harmed(facts["victim"])
            or self._leaked(marker)
            or _kernel_objects(facts["key"])
            or self._renamed()
            or _left_running(marker)
        )

    def _victim_harmed(self, pid: int) -> str | None:
        if pid != self.victim.pid:
            return None  # another program's doing, and reported there
        status = self.victim.poll()
        if status is not None:
            harm = f"was ended: {status}"
        elif os.getpriority(os.PRIO_PROCESS, pid) != os.getpriority(os.PRIO_PROCESS, 0):
            harm = "has another priority"
        elif Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
            harm = "was stopped"
        else:
            return None
        self.victim.kill()
        self.victim.wait()
        self.victim = _start_victim()  # the next case finds an unharmed one
        return f"the attack's own process {pid} {harm}"

    def _leaked(self, marker: str) -> str | None:
        ready = select.select([self._leak[1]], [], [], 0)[0]
        text = os.read(self._leak[1], 65536) if ready else b""
        return "an inherited pipe was written to" if marker.encode() in text else None

    def _renamed(self) -> str | None:
        name = os.uname().nodename
        return f"the machine's name became {name}" if name != self._host_name else None


class _Caller:
    """Keeps calling one port of 127.0.0.1, to see whether a program can be reached from outside."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.reached: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        while not self._stop.wait(0.05):
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.5) as connection:
                    if connection.recv(15).startswith(b"pf"):
                        self.reached = "a program was reached at a port of its own"
            except OSError:
                continue

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _listeners(ground: Path) -> dict[str, socket.socket]:
    """One for every kind, each for one program; IPv6 only where this machine has it."""
    opened = {}
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    for name, family, kind, address in (
        ("tcp", socket.AF_INET, stream, ("127.0.0.1", 0)),
        ("udp", socket.AF_INET, datagram, ("127.0.0.1", 0)),
        ("dns", socket.AF_INET, datagram, ("127.0.0.1", 0)),
        ("tcp6", socket.AF_INET6, stream, ("::1", 0)),
        ("udp6", socket.AF_INET6, datagram, ("::1", 0)),
        ("unix", socket.AF_UNIX, stream, str(ground / "socket")),
        ("abstract", socket.AF_UNIX, stream, f"\0{ground.name}"),
    ):
        try:
            listener = socket.socket(family, kind)
            listener.bind(address)
        except OSError:
            if family == socket.AF_INET6:
                continue
            raise
        if kind == stream:
            listener.listen(16)
        opened[name] = listener
    (ground / "socket").chmod(0o777)
    return opened


def _leak_descriptors(secret_file: Path) -> tuple[int, int, int]:
    """An open secret, and a pipe's end to read and to write; first and last are inheritable."""
    secret = os.open(secret_file, os.O_RDONLY)
    read, write = os.pipe()
    for descriptor in (secret, write):
        os.set_inheritable(descriptor, True)
    return secret, read, write


def _start_victim() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(3600)"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _places() -> list[str]:
    """Where a file left behind would do harm; whether this user may write there or not."""
    paths = sysconfig.get_paths()
    return [
        *("/", "/usr", "/usr/local/bin", "/usr/lib", "/etc", "/etc/cron.d", "/var", "/opt", "/dev"),
        *("/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir(), os.getcwd(), str(Path.home())),
        *(sys.prefix, paths["stdlib"], paths["purelib"], paths["scripts"]),
        str(Path(__file__).parent),
    ]


def _left_behind(folders: list[str], marker: str) -> str | None:
    """Files or folders of the program's name outside; they are removed."""
    left = [os.path.join(folder, marker) for folder in dict.fromkeys(folders)]
    left = [path for path in left if os.path.lexists(path)]
    for path in left:
        (os.rmdir if os.path.isdir(path) else os.unlink)(path)
    return f"it left {', '.join(left)}" if left else None


def _make_canaries(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    for path in (folder / "canary.txt", folder / "inner" / "canary.txt"):
        path.write_text("untouched")
        path.chmod(0o666)
    for path in (folder, folder / "inner"):
        path.chmod(0o777)


def _snapshot(folder: Path) -> dict[str, Any]:
    """Names, contents and metadata of everything below a folder."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        entry = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        names = os.listxattr(path, follow_symlinks=False)
        metadata = (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_mtime_ns, entry.st_nlink)
        found[str(path)] = (content, names, metadata)
    return found


def _kernel_objects(key: int) -> str | None:
    for kind in ("shm", "msg", "sem"):
        try:
            lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        except OSError:
            continue
        if any(line.split()[0] == str(key) for line in lines):
            return f"a System V object ({kind}) was left behind"
    return None


def processes_named(marker: str) -> list[int]:
    """Processes whose name, or command line, a program gave them; zombies do not count."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if (name == marker or marker.encode() in command) and rest.split()[0] not in "ZX":
            found.append(int(pid))
    return found


def _left_running(marker: str) -> str | None:
    """Reaping is asynchronous: a few looks, then what is still there has outlived its run."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while left := processes_named(marker):
        if time.monotonic() > end:
            return f"processes outlived the run: {left}"
        time.sleep(0.02)
    return None
