"""The sandbox server: a small process without secrets that forks a supervisor for every run.

Started by the client as `python -c "... server.main()" DESCRIPTOR`; reads its settings there, finds
out what this machine allows, answers with the active layers, then serves until the client is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from . import clear, confine, kernel, landlock, seccomp, supervise, tree

_MESSAGE_BYTES = 1 << 16
_REAP_MILLISECONDS = 500
_TRIAL_LIMITS = {
    "cpu_seconds": 10,
    "wall_seconds": 30.0,
    "memory_bytes": 1 << 30,
    "disk_bytes": 1 << 20,
    "num_files": 16,
    "num_processes": 16,
}

_TEMPTATION = """
import socket
for what, attempt in {{
    "a file outside can be read": lambda: open({secret!r}),
    "the network can be reached": lambda: socket.create_connection({address!r}, 2),
}}.items():
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(what)
"""


def main() -> NoReturn:
    """Serve the client at the other end of the descriptor named on the command line."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(channel.recv(1 << 20))
    client = os.pidfd_open(os.getppid())
    try:
        plan, layers = prepare(settings)
    except BaseException as error:
        channel.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    channel.send(json.dumps(layers).encode())
    serve(channel, client, plan, settings["proc"])


def serve(channel: socket.socket, client: int, plan: supervise.Plan, proc: int) -> NoReturn:
    """Fork a supervisor for every message until the client closes the channel or ends."""
    gc.collect()
    gc.freeze()  # keeps pages shared between the runs
    server = os.getpid()
    supervisors: set[int] = set()
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(client, select.POLLIN)
    while True:
        ready = dict(poller.poll(_REAP_MILLISECONDS))
        _reap(supervisors)
        if client in ready:
            _end(supervisors, plan)
        if not ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(channel, 16, 4)
        if not message:
            _end(supervisors, plan)
        pid = os.fork()
        if pid == 0:
            channel.close()
            os.close(client)
            connection = socket.socket(fileno=descriptors[0])
            ends = supervise.Descriptors(*descriptors[1:])
            supervise.supervise(connection, ends, plan, proc, server)
        supervisors.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap(supervisors: set[int]) -> None:
    while supervisors:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        supervisors.discard(pid)


def _end(supervisors: set[int], plan: supervise.Plan) -> NoReturn:
    """End every run and leave nothing behind: a supervisor's death is its program's."""
    for pid in supervisors:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    clear.remove(plan.scratch)
    os._exit(0)


def prepare(settings: dict[str, Any]) -> tuple[supervise.Plan, dict[str, Any]]:
    """Find the strongest plan that works here; returns it and what is active and missing."""
    settings["proc"] = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _preload(settings["preload"])
    without = set(settings["without"])
    missing = dict.fromkeys(without, "left out on request")
    base = _base_plan(settings, without, missing)
    for plan in _candidates(base, without, settings["wrapper"]):
        problem = _trial(plan, settings)
        if problem is None:
            if plan.namespaces:
                _enter_tree(plan, settings)
            return plan, _describe(plan, missing, settings["wrapper"])
        missing[_name(plan)] = problem
    raise RuntimeError("; ".join(f"{name}: {why}" for name, why in missing.items()))


def _name(plan: supervise.Plan) -> str:
    if plan.namespaces:
        return "user namespace" if plan.user_namespace else "namespaces"
    return "another user" if plan.leave_root else "run"


def _preload(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)


def _base_plan(
    settings: dict[str, Any], without: set[str], missing: dict[str, str]
) -> supervise.Plan:
    abi = landlock.version()
    if not abi:
        missing["landlock"] = "the kernel has none (Linux 5.13) or it is not enabled"
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        missing["memory of all"] = "no /proc/PID/task/TID/children: each process has its own bound"
    machine = platform.machine()
    filters = machine in seccomp.MACHINES and "seccomp" not in without
    if filters:
        seccomp.program(machine)  # remembered for all runs
    order = confine.Order(
        cpu_seconds=0,
        memory_bytes=0,
        disk_bytes=0,
        num_processes=0,
        readable=tuple(settings["readable"]),
        writable=(),
        devices=tree.DEVICES,
        machine=machine,
        use_landlock=bool(abi) and "landlock" not in without,
        use_seccomp=filters,
        processes=True,
        metadata=True,
    )
    return supervise.Plan(
        namespaces=True,
        user_namespace=True,
        leave_root=os.geteuid() == 0,
        order=order,
        site=tuple(settings["site"]),
        executable=settings["executable"],
        jail_folder=settings["jail_folder"],
        warm=settings["warm"],
        scratch=settings["scratch"],
    )


def _candidates(
    base: supervise.Plan, without: set[str], wrapper: dict[str, Any] | None
) -> list[supervise.Plan]:
    alone = replace(base.order, processes=False, metadata=False)
    poorest = replace(base, namespaces=False, user_namespace=False, order=alone)
    if wrapper:
        return _wrapped_candidates(replace(poorest, warm=False), base.order, wrapper)
    plans = [poorest]
    if base.leave_root:  # Python may lie where only root can read
        plans.append(replace(poorest, leave_root=False))
    if "namespaces" in without:
        return plans
    if base.leave_root:
        plans.insert(0, replace(base, user_namespace=False))
    return [base, *plans]


def _wrapped_candidates(
    base: supervise.Plan, order: confine.Order, wrapper: dict[str, Any]
) -> list[supervise.Plan]:
    alone = replace(base, wrapper=tuple(wrapper["command"]), inner_work=wrapper["inner_work"])
    # Several processes are bounded by a user namespace, unless root made it, and end with theirs.
    several = replace(alone, user_namespace=True, order=order) if wrapper["namespaces"] else alone
    if not base.leave_root:
        return [several]
    return [several, replace(alone, leave_root=False)]  # Python may lie where only root can read


def _trial(plan: supervise.Plan, settings: dict[str, Any]) -> str | None:
    """Contain an empty program in a throw-away copy of the server; None if that works."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if plan.namespaces:
                _enter_tree(plan, settings)
            problem = _run_nothing(plan, settings["proc"])
        except BaseException as error:
            problem = str(error) or type(error).__name__
        os.write(write, (problem or "").encode()[:4096])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        problem = answer.read().decode()
    status = os.waitpid(child, 0)[1]
    return problem or (f"the trial ended with status {status}" if status else None)


def _run_nothing(plan: supervise.Plan, proc: int) -> str | None:
    ours, theirs = socket.socketpair()
    server = os.getpid()
    error_read, error_write = os.pipe()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    if os.fork() == 0:
        ours.close()
        ends = supervise.Descriptors(null, error_write, os.dup(null))
        supervise.supervise(theirs, ends, plan, proc, server)
    theirs.close()
    os.close(error_write)
    with _temptation(plan) as source:
        task = {"kind": "program", "source": source}
        raw = json.dumps({"limits": _TRIAL_LIMITS, "task": task}).encode()
        ours.sendall(struct.pack("q", len(raw)) + raw)
        with os.fdopen(error_read, "rb") as file:
            said = file.read(4096).decode(errors="replace").strip()
        answer = b""
        while part := ours.recv(_MESSAGE_BYTES):
            answer += part
    result = json.loads(answer or b'{"failed": "the supervisor ended"}')
    if result.get("ended") == "exited" and result.get("returncode") == 0:
        return None
    reasons = [said.splitlines()[-1]] if said else []
    return "; ".join([*reasons, *filter(None, [result.get("failed")])]) or f"{result}"


@contextlib.contextmanager
def _temptation(plan: supervise.Plan) -> Iterator[str]:
    """The trial's program. Another program's isolation is not taken on trust: there it tries it."""
    # Reads from the library, which must still be there for programs that import more of it, and
    # writes in its folder.
    source = f"open({os.__file__!r}, 'rb').read(1)\nopen('file', 'w').close()\n"
    if not plan.wrapper:
        yield source
        return
    secret = os.path.join(plan.scratch, "secret")
    with open(secret, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield source + _TEMPTATION.format(secret=secret, address=listener.getsockname())
    finally:
        os.unlink(secret)


def _enter_tree(plan: supervise.Plan, settings: dict[str, Any]) -> None:
    """Give this process the tree as its root, by root's powers or in a user namespace."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        kernel.unshare(kernel.CLONE_NEWNS)
    else:
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUSER)
        supervise.map_user(settings["proc"], uid, uid, gid)
    tree.enter(list(plan.order.readable), plan.scratch)


def _describe(
    plan: supervise.Plan, missing: dict[str, str], wrapper: dict[str, Any] | None
) -> dict[str, Any]:
    """The active layers, as the client's `Layers` wants them."""
    order = plan.order
    active = {}
    if plan.namespaces:
        names = "mount, pid, network, ipc, uts, cgroup"
        active["namespaces"] = ("user, " if plan.user_namespace else "") + names
        active["file tree"] = f"read-only root of {len(order.readable)} paths; tmpfs to write on"
    if wrapper:
        active[wrapper["name"]] = wrapper["detail"]
    if order.use_landlock:
        active["landlock"] = f"ABI {landlock.version()}"
    if order.use_seccomp:
        rest = "" if order.processes else "; no new processes, signals to oneself only, no chmod"
        active["seccomp"] = f"allowlist for {order.machine}{rest}"
    active["resource limits"] = "time, memory, output, disk, files" + (
        ", processes" if order.processes else ""
    )
    active["privileges"] = "no_new_privs, no capabilities, " + (
        "a user of its own" if plan.leave_root else f"user {os.geteuid()}"
    )
    return {
        "active": active,
        "missing": {k: v for k, v in missing.items() if k not in active},
        "isolates_files": plan.namespaces or order.use_landlock or bool(wrapper),
        "isolates_network": plan.namespaces or order.use_seccomp or bool(wrapper),
    }
