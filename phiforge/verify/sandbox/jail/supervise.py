"""One run, seen by its supervisor: a process that makes the sandbox, watches it and clears up.

`supervise(connection, descriptors, plan)` runs in a child of the server and never returns. It reads
the request from the connection, and writes one line of JSON: how the run ended.

The supervisor (A) forks the first process of a new pid namespace (B), which forks the program (C)
and reaps orphans; when B ends, the kernel kills all that is left. Without namespaces A forks C.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from . import clear, confine, kernel, start, tree, watch, wrapped

ISOLATED = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
NOBODY = 65534
_FIRST_UID = 2_000_000_000  # of programs started by root: one each, far from anybody's files
WORK = "{work}"  # in a wrapper's command: the folder of the run
_TICK_SECONDS = 0.05
_OUR_PROCESSES = 2  # supervisor and init
_WRAPPER_THREADS = 8  # of a wrapper that runs as the same user
_HIGH, _LAST = 200, 65536  # descriptors: out of the way of those to be laid; more than there are


@dataclass(frozen=True)
class Plan:
    """How every run of a server is contained; found out once, when the server starts."""

    namespaces: bool
    user_namespace: bool
    leave_root: bool  # whether programs started by root get a user of their own
    order: confine.Order
    site: tuple[str, ...]  # folders of installed packages, put last on sys.path
    executable: str
    jail_folder: str  # where the package `jail` can be imported from
    warm: bool
    wrapper: tuple[str, ...] = ()  # command line of another program that isolates, with WORK in it
    inner_work: str = ""  # where that program shows the work folder; empty: where it lies
    scratch: str = "/tmp"  # where work folders are made when there are no namespaces


class Descriptors:
    """What a request brings: the ends of the client's pipes."""

    def __init__(self, output: int, error: int, report: int) -> None:
        self.output, self.error, self.report = output, error, report

    def close(self) -> None:
        for descriptor in (self.output, self.error, self.report):
            os.close(descriptor)


def supervise(
    connection: socket.socket, ends: Descriptors, plan: Plan, proc: int, server: int
) -> NoReturn:
    """Carry out one request; `proc` is a descriptor of /proc, `server` the parent's process id."""
    started = time.monotonic()
    work = None
    result: dict[str, Any]
    try:
        request = receive(connection)
        limits, task = request["limits"], request["task"]
        mounts_as_root = plan.namespaces and not plan.user_namespace
        if plan.leave_root and not mounts_as_root:
            become_nobody()
        if plan.namespaces:
            _enter_namespaces(plan, limits, proc)
        if plan.leave_root and mounts_as_root:
            become_nobody()
        kernel.die_with_parent(server)  # a change of user would undo it
        kernel.adopt_orphans()
        work = tree.WORK if plan.namespaces else _work_folder(plan)
        _write_files(work, task.pop("files", {}))
        os.chdir(work)
        standard_input = _memory_file(task.pop("stdin", "").encode("utf-8", "surrogatepass"))
        read, write = os.pipe()
        run = _Run(plan, limits, task, work, standard_input, ends, write)
        result = _run(connection, run, read, proc)
    except BaseException as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        if work and not plan.namespaces:
            os.chdir("/")
            clear.remove(work)
    result["seconds"] = time.monotonic() - started
    with contextlib.suppress(OSError):  # the client may be gone
        connection.sendall(json.dumps(result).encode())
    os._exit(0)


def receive(connection: socket.socket) -> dict[str, Any]:
    """The request: its length in eight bytes, then JSON."""
    length = struct.unpack("q", _read(connection, 8))[0]
    return json.loads(_read(connection, length))


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            os._exit(1)  # the client gave up before the run began
        parts += part
    return bytes(parts)


def become_nobody() -> None:
    """Change to a user of one's own, else to nobody; keep the user where neither is mapped."""
    for uid in (_FIRST_UID + os.getpid(), NOBODY):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError:
            continue
        kernel.own_proc_files()
        return


def _enter_namespaces(plan: Plan, limits: dict[str, Any], proc: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(ISOLATED | (kernel.CLONE_NEWUSER if plan.user_namespace else 0))
    if plan.user_namespace:
        map_user(proc, NOBODY, uid, gid)
    kernel.set_host_name("sandbox")
    tree.mount_work(limits["disk_bytes"], limits["num_files"])


def map_user(proc: int, inner: int, uid: int, gid: int) -> None:
    """Inside this new user namespace the user is `inner`; outside it stays `uid`."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inner} {uid} 1"),
        ("gid_map", f"{inner} {gid} 1"),
    ):
        descriptor = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _work_folder(plan: Plan) -> str:
    return tempfile.mkdtemp(prefix="phiforge-sandbox-", dir=plan.scratch)


def _write_files(work: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = os.path.normpath(os.path.join(work, name))
        if not path.startswith(work + "/"):
            raise ValueError(f"files: {name!r} lies outside of the working folder")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)


@dataclass(frozen=True)
class _Run:
    """What B and C need to know of one run."""

    plan: Plan
    limits: dict[str, Any]
    task: dict[str, Any]
    work: str
    input: int
    ends: Descriptors
    trouble: int  # pipe for what went wrong before foreign code ran; foreign code never has it


def _run(connection: socket.socket, run: _Run, trouble: int, proc: int) -> dict[str, Any]:
    """Start the program, watch it to its end; `trouble` is the pipe's other end."""
    plan = run.plan
    status_read, status_write = os.pipe()
    deadline = time.monotonic() + run.limits["wall_seconds"]
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            connection.close()
            os.close(status_read)
            kernel.die_with_parent(0 if plan.namespaces else supervisor)
            if plan.namespaces:
                _exit_without_reader(status_write)
                _be_init(run, status_write)
            _be_program(run, status_write if plan.wrapper else None)
        finally:
            os._exit(125)
    for descriptor in (status_write, run.input, run.trouble):
        os.close(descriptor)
    run.ends.close()
    watched = None if plan.namespaces else run.work
    guard = watch.Guard(child, proc, run.limits, watched, plan.inner_work or run.work)
    why = _wait(connection, child, deadline, guard)
    result = _finish(child, why, status_read, run, proc)
    said = os.read(trouble, 4096)
    return {"failed": said.decode(errors="replace")} if said else result


def _exit_without_reader(pipe: int) -> None:
    """End if the supervisor ended before its death could have been a signal to us."""
    poller = select.poll()
    poller.register(pipe, 0)
    if poller.poll(0):
        os._exit(1)


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _wait(connection: socket.socket, child: int, deadline: float, guard: watch.Guard) -> str | None:
    """Wait for the child; kill it when it must end early, and say why."""
    ended = os.pidfd_open(child)
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    poller.register(connection, select.POLLIN | select.POLLHUP)
    why = None
    while why is None:
        rest = min(deadline - time.monotonic(), _TICK_SECONDS)
        ready = dict(poller.poll(max(0.0, rest) * 1000))
        if ended in ready:
            break
        if ready:
            why = "client"  # it closed its end, or said stop
        elif time.monotonic() >= deadline:
            why = "timeout"
        else:
            why = guard.exceeded()
    if why:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    return why


def _finish(child: int, why: str | None, status_read: int, run: _Run, proc: int) -> dict[str, Any]:
    status, usage = os.wait4(child, 0)[1:]
    cpu_seconds, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    reap_all(proc)
    if run.plan.namespaces or run.plan.wrapper:
        raw = os.read(status_read, wrapped.ENDED.size)
        if len(raw) == wrapped.ENDED.size:
            status, cpu_seconds, peak_bytes = wrapped.ENDED.unpack(raw)
        elif why is None and run.plan.wrapper:
            return {"failed": _wrapper_failure(run.plan, status)}
        elif why is None:
            why = "killed"  # the whole namespace, from outside
    result = {"cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}
    if why:
        return {**result, "ended": why}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number == signal.SIGKILL and cpu_seconds >= run.limits["cpu_seconds"]
        ended = "timeout" if number == signal.SIGXCPU or late else "signal"
        return {**result, "ended": ended, "signal": number}
    return {**result, "ended": "exited", "returncode": os.WEXITSTATUS(status)}


def _wrapper_failure(plan: Plan, status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"{plan.wrapper[0]} ended with {code} before the program did"


def reap_all(proc: int) -> None:
    """Kill and reap every process that is left below this one; needs `adopt_orphans`."""
    while True:
        for pid in watch.children_of(os.getpid(), proc):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
        except ChildProcessError:
            return


def _be_init(run: _Run, status_write: int) -> NoReturn:
    """B: first process of the namespace. Reaps, reports the program's end; its own kills all."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no handler: nobody can send it to process 1
    program = os.fork()
    if program == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(status_write)
        _be_program(run, None)
    run.ends.close()
    os.close(run.input)
    os.close(run.trouble)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == program:
            break
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = total.ru_utime + total.ru_stime
    os.write(status_write, wrapped.ENDED.pack(status, seconds, usage.ru_maxrss * 1024))
    os._exit(0)


def _be_program(run: _Run, status_write: int | None) -> NoReturn:
    """C: confine oneself, then the harness, at once or in a fresh interpreter.

    Where another program isolates, C becomes that; its program reports to `status_write`.
    """
    plan = run.plan
    trouble = run.trouble
    try:
        os.setsid()
        order = _order(run)
        if status_write is not None:
            _execute_wrapper(run, order, status_write)
        fresh = None if plan.warm else [run.task, plan.site]
        trouble = _lay_descriptors(run, fresh)
        confine.confine(order)
        os.environ.update(HOME=run.work, TMPDIR=run.work)
        if not plan.warm:
            command = interpreter_command(plan.executable, plan.jail_folder, "start")
            os.execv(command[0], command)
        os.close(trouble)
    except BaseException as error:
        os.write(trouble, f"{type(error).__name__}: {error}".encode()[:4096])
        os._exit(125)
    start.run(run.task, list(plan.site))


def _execute_wrapper(run: _Run, order: confine.Order, status_write: int) -> NoReturn:
    """The wrapper, and in it an interpreter that confines itself to `order`."""
    plan = run.plan
    work = plan.inner_work or run.work
    wrapper = [word.replace(WORK, run.work) for word in plan.wrapper]
    command = [*wrapper, *interpreter_command(plan.executable, plan.jail_folder, "wrapped")]
    order = replace(order, writable=(work,))
    trouble = _lay_descriptors(run, [vars(order), run.task, plan.site], status_write)
    os.environ.update(HOME=work, TMPDIR=work)
    try:
        os.execv(command[0], command)
    except OSError as error:
        os.write(trouble, f"{command[0]}: {error}".encode()[:4096])
        os._exit(125)


def _order(run: _Run) -> confine.Order:
    limits = run.limits
    return replace(
        run.plan.order,
        writable=(run.work,),
        cpu_seconds=limits["cpu_seconds"],
        memory_bytes=limits["memory_bytes"],
        disk_bytes=limits["disk_bytes"],
        num_processes=_num_processes(run.plan, limits),
    )


def _num_processes(plan: Plan, limits: dict[str, Any]) -> int:
    """The kernel counts per user and user namespace: a bound only where the user is ours alone."""
    alone = plan.user_namespace or os.geteuid() == 0 or os.geteuid() > _FIRST_UID
    own = _OUR_PROCESSES + (_WRAPPER_THREADS if plan.wrapper else 0)
    return limits["num_processes"] + own if alone else 0


def interpreter_command(executable: str, jail_folder: str, module: str) -> list[str]:
    """An interpreter that reads nothing of the user's and calls `jail.MODULE.main`."""
    code = f"import sys; sys.path.insert(0, {jail_folder!r}); from jail import {module}; "
    code += f"sys.path.pop(0); {module}.main()"
    return [executable, "-s", "-S", "-B", "-P", "-X", "utf8", "-c", code]


def _lay_descriptors(run: _Run, fresh: list[Any] | None, status: int | None = None) -> int:
    """0 to 3, 4 for a fresh interpreter, then a wrapper's status pipe; returns the trouble pipe's,
    which is the last and which no program sees."""
    places = [run.input, run.ends.output, run.ends.error, run.ends.report]
    if fresh is not None:
        places.append(_memory_file(json.dumps(fresh).encode()))
    if status is not None:
        places.append(status)
    high = [os.dup2(descriptor, _HIGH + i) for i, descriptor in enumerate([*places, run.trouble])]
    for place, descriptor in enumerate(high[:-1]):
        os.dup2(descriptor, place, inheritable=True)
    trouble = os.dup2(high[-1], len(places), inheritable=status is not None)
    os.closerange(trouble + 1, _LAST)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    return trouble
