"""Hostile programs that reach for other processes, for privileges and for the kernel.

`hostile.py` sends each function's text, after `hostile_prelude.py`, as one program. Deadly signals
go to a process that the attack started. They write lines of evidence.
"""

import ctypes
import os
import signal
import sys
import time

from .hostile_prelude import (
    FACTS,
    LIBC,
    attempt,
    call,
    escaped,
    fork_with,
    held,
    raw,
    read_some,
    say,
    tried,
)

# -- signals ---------------------------------------------------------------------------------------


def kill_every_process():
    # Asked with signal 0, which harms nobody; only the attack's own victim is killed in earnest.
    tried()
    known = {0, 1, os.getpid(), os.getppid()}
    for pid in (*range(2, 40_000), FACTS["client"], FACTS["client_parent"]):
        if pid in known:
            continue
        known.add(pid)
        try:
            os.kill(pid, 0)
            escaped(f"process {pid} would take a signal")
        except OSError:
            continue
    attempt("the victim", os.kill, FACTS["victim"], signal.SIGKILL)
    attempt("its thread", call, "tkill", FACTS["victim"], 9)
    attempt("its thread and group", call, "tgkill", FACTS["victim"], FACTS["victim"], 9)
    information = ctypes.create_string_buffer(128)
    ctypes.c_int.from_buffer(information, 8).value = -1  # si_code SI_QUEUE
    attempt("queue", call, "rt_sigqueueinfo", FACTS["victim"], 9, information)
    attempt("everybody", os.kill, -1, 0)
    attempt("the victim's group", os.killpg, FACTS["victim"], signal.SIGKILL)


def signal_by_descriptor():
    for pid in (FACTS["victim"], FACTS["client"]):
        try:
            descriptor = call("pidfd_open", pid, 0)
        except OSError as error:
            held(f"pidfd_open {pid}: {error!r}")
            continue
        number = 9 if pid == FACTS["victim"] else 0
        attempt(f"pidfd {pid}", call, "pidfd_send_signal", descriptor, number, 0, 0)


def signal_the_client():
    for number in (0, signal.SIGCONT, signal.SIGWINCH, signal.SIGURG):
        attempt(f"client, signal {int(number)}", os.kill, FACTS["client"], number)


def kill_its_own_group():
    # Its own, if it has one: otherwise the signal would go to whoever started it.
    if os.getpgrp() != os.getpid() or os.getsid(0) != os.getpid():
        escaped(f"shares the process group {os.getpgrp()}, session {os.getsid(0)}")
        return
    tried()
    os.killpg(0, signal.SIGKILL)


def stop_the_parent():
    tried()
    if os.getppid() == FACTS["client"]:
        escaped("the client is its parent")
        return
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        try:
            os.kill(os.getppid(), number)
        except OSError as error:
            held(f"signal {int(number)}: {error!r}")
    time.sleep(600)


def kill_the_parent():
    tried()
    if os.getppid() == FACTS["client"]:
        escaped("the client is its parent")
        return
    try:
        os.kill(os.getppid(), signal.SIGKILL)
    except OSError as error:
        held(repr(error))
    time.sleep(600)


# -- other processes -------------------------------------------------------------------------------


def trace_processes():
    attach, seize, trace_me = 16, 0x4206, 0
    for pid in (FACTS["victim"], FACTS["client"], os.getppid(), 1):
        attempt(f"seize {pid}", call, "ptrace", seize, pid, 0, 0)
        if pid == FACTS["victim"]:
            attempt("attach", call, "ptrace", attach, pid, 0, 0)
    attempt("trace me", call, "ptrace", trace_me, 0, 0, 0)


def read_memory_of_others():
    size = FACTS["memory_length"]
    buffer = ctypes.create_string_buffer(size)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
    remote = (ctypes.c_uint64 * 2)(FACTS["memory_address"], size)
    attempt("client", call, "process_vm_readv", FACTS["client"], local, 1, remote, 1, 0)
    say(f"HELD: read {buffer.raw!r}")
    own = ctypes.create_string_buffer(b"own", 8)
    remote = (ctypes.c_uint64 * 2)(ctypes.addressof(own), 8)
    for pid in (os.getppid(), 1):  # a fork of the same process has the same addresses
        attempt(f"read {pid}", call, "process_vm_readv", pid, local, 1, remote, 1, 0)
        attempt(f"write {pid}", call, "process_vm_writev", pid, local, 1, remote, 1, 0)
        attempt(f"kcmp {pid}", call, "kcmp", pid, os.getpid(), 0, 0, 0)


def steal_descriptors():
    for pid in (FACTS["client"], FACTS["victim"], os.getppid(), 1):
        try:
            descriptor = call("pidfd_open", pid, 0)
        except OSError as error:
            held(f"pidfd_open {pid}: {error!r}")
            continue
        for number in (0, 3, 4, 5, FACTS["secret_descriptor"]):
            attempt(f"{number} of {pid}", call, "pidfd_getfd", descriptor, number, 0)


def limit_other_processes():
    limits = (ctypes.c_uint64 * 2)(60, 60)
    for pid in (FACTS["victim"], FACTS["client"], os.getppid(), 1):
        new = limits if pid == FACTS["victim"] else None  # the others are only asked
        old = (ctypes.c_uint64 * 2)()
        name = f"limits of {pid}"
        if attempt(name, call, "prlimit64", pid, 7, new, old) is not None and pid != 1:
            attempt(f"{name} set", call, "prlimit64", pid, 7, old, None)


def reschedule_other_processes():
    victim = FACTS["victim"]
    attempt("priority", os.setpriority, os.PRIO_PROCESS, victim, 19)
    attempt("processors", os.sched_setaffinity, victim, {0})
    attempt("scheduler", os.sched_setscheduler, victim, os.SCHED_IDLE, os.sched_param(0))
    attempt("nicer to itself", os.setpriority, os.PRIO_PROCESS, 0, -10)
    attempt("real time", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(10))


# -- privileges ------------------------------------------------------------------------------------


def become_root():
    attempt("setuid", os.setuid, 0)
    attempt("setresuid", os.setresuid, 0, 0, 0)
    attempt("setgid", os.setgid, 0)
    attempt("setgroups", os.setgroups, [])
    attempt("another user", os.setuid, 1000)
    if os.geteuid() == 0 or os.getegid() == 0 or 0 in os.getgroups():
        escaped(f"runs as root: {os.getresuid()} {os.getresgid()} {os.getgroups()}")


def use_capabilities():
    data = (ctypes.c_uint32 * 6)()
    call("capget", (ctypes.c_uint32 * 2)(0x20080522, 0), data)
    say(f"HELD: capabilities {[hex(word) for word in data]}")
    if any(data):
        escaped(f"capabilities {[hex(word) for word in data]}")
    if LIBC.prctl(39, 0, 0, 0, 0) != 1:  # PR_GET_NO_NEW_PRIVS
        escaped("a setuid program would gain privileges")
    for capability in (0, 1, 21):
        if LIBC.prctl(47, 2, capability, 0, 0) == 0:  # PR_CAP_AMBIENT_RAISE
            escaped(f"raised ambient capability {capability}")


def raise_its_limits():
    import resource

    tried()
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "NICE", "MEMLOCK", "MSGQUEUE"):
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        if hard == resource.RLIM_INFINITY:
            (held if name == "NPROC" else escaped)(f"RLIMIT_{name} is unlimited")
            continue
        try:
            resource.setrlimit(which, (hard + 1, hard + 1))
            escaped(f"RLIMIT_{name} raised")
        except (OSError, ValueError) as error:
            held(f"{name}: {error}")


def mount_file_systems():
    here = os.fsencode(os.getcwd()) + b"\0"
    none = ctypes.c_char_p(b"none")
    for kind in (b"tmpfs", b"proc", b"sysfs", b"devpts", b"overlay", b"cgroup2", b"bpf"):
        attempt(kind.decode(), call, "mount", none, here, ctypes.c_char_p(kind), 0, None)
    attempt("bind", call, "mount", ctypes.c_char_p(b"/"), here, None, 0x1000, None)
    attempt("writable again", call, "mount", none, ctypes.c_char_p(b"/"), None, 0x1020, None)
    attempt("exec again", call, "mount", none, here, None, 0x1020, None)
    attempt("umount", call, "umount2", here, 2)
    attempt("umount root", call, "umount2", ctypes.c_char_p(b"/"), 2)
    attempt("pivot_root", call, "pivot_root", here, here)
    attempt("fsopen", call, "fsopen", ctypes.c_char_p(b"tmpfs"), 0)
    attempt("open_tree", call, "open_tree", -100, ctypes.c_char_p(b"/"), 1)
    attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
    attempt("mount_setattr", call, "mount_setattr", -100, here, 0, attributes, 32)
    attempt("chroot", call, "chroot", here)


def leave_by_chroot():
    # The classic: a root below the working folder, then up from a folder outside of it.
    os.mkdir("cell")
    attempt("chroot", os.chroot, "cell")
    for _ in range(30):
        os.chdir("..")
    attempt("the secret, from there", read_some, "." + FACTS["secret_file"])


def make_namespaces():
    kinds = {"user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000}
    kinds |= {"ipc": 0x8000000, "uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}
    for name, flag in kinds.items():
        attempt(f"unshare {name}", call, "unshare", flag)
    for name, flag in kinds.items():
        if name != "time":
            attempt(f"unshare user and {name}", call, "unshare", 0x10000000 | flag)


def clone_into_namespaces():
    flags = 0x10000000 | 0x20000000 | signal.SIGCHLD
    for name in ("clone", "clone3"):
        arguments = (flags, 0, 0, 0, 0)
        if name == "clone3":
            structure = (ctypes.c_uint64 * 8)(flags & ~0xFF, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
            arguments = (structure, 64)
        try:
            pid = call(name, *arguments)
        except OSError as error:
            held(f"{name}: {error!r}")
            continue
        if pid == 0:
            escaped(f"{name} made a user namespace")
            os._exit(0)
        os.waitpid(pid, 0)


def join_namespaces():
    for pid in (FACTS["client"], FACTS["client_parent"], FACTS["victim"], os.getppid(), 1):
        for name in ("user", "mnt", "net", "pid"):
            try:
                descriptor = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
            except OSError as error:
                held(f"{name} of {pid}: {error!r}")
                continue
            attempt(f"setns {name} of {pid}", call, "setns", descriptor, 0)
        try:
            descriptor = call("pidfd_open", pid, 0)
        except OSError as error:
            held(f"pidfd_open {pid}: {error!r}")
            continue
        for flag in (0x20000, 0x40000000, 0x10000000):
            attempt(f"setns {flag:x} of {pid}", call, "setns", descriptor, flag)


# -- the kernel ------------------------------------------------------------------------------------


def set_up_io_uring():
    attempt("io_uring", call, "io_uring_setup", 4, ctypes.create_string_buffer(120))


def load_bpf():
    attributes = ctypes.create_string_buffer(128)
    for index, value in enumerate((2, 4, 4, 1)):  # an array map of one entry
        ctypes.c_uint32.from_buffer(attributes, 4 * index).value = value
    attempt("bpf map", call, "bpf", 0, attributes, 128)


def open_performance_counters():
    attributes = ctypes.create_string_buffer(128)
    ctypes.c_uint32.from_buffer(attributes, 0).value = 1  # software
    ctypes.c_uint32.from_buffer(attributes, 4).value = 128
    ctypes.c_uint64.from_buffer(attributes, 40).value = 0b1100001  # off, no kernel, no hypervisor
    attempt("perf", call, "perf_event_open", attributes, 0, -1, -1, 0)


def handle_page_faults():
    attempt("userfaultfd", call, "userfaultfd", 1)  # UFFD_USER_MODE_ONLY


def use_keyrings():
    kind, name = ctypes.c_char_p(b"user"), ctypes.c_char_p(FACTS["marker"].encode())
    attempt("add_key", call, "add_key", kind, name, ctypes.c_char_p(b"x"), 1, -2)
    attempt("keyctl", call, "keyctl", 0, -3, 0)  # the session's keyring
    attempt("request_key", call, "request_key", kind, name, None, 0)


def change_personality():
    attempt("no randomisation", call, "personality", 0x0040000)
    attempt("readable is executable", call, "personality", 0x0400000)


def set_the_clock():
    now = (ctypes.c_int64 * 2)(int(time.time()), int(time.time() % 1 * 10**9))
    attempt("clock_settime", call, "clock_settime", 0, now)
    now[1] //= 1000
    attempt("settimeofday", call, "settimeofday", now, None)
    timex = ctypes.create_string_buffer(256)
    ctypes.c_uint32.from_buffer(timex, 0).value = 0x4000  # ADJ_TICK, to its usual value
    ctypes.c_int64.from_buffer(timex, 88).value = 10_000
    attempt("adjtimex", call, "adjtimex", timex)
    attempt("clock_adjtime", call, "clock_adjtime", 0, timex)


def change_the_host_name():
    tried()
    name = FACTS["marker"].encode()
    for what in ("sethostname", "setdomainname"):
        try:
            held(f"{what}: {call(what, ctypes.c_char_p(name), len(name))}")
        except OSError as error:
            held(f"{what}: {error!r}")


def administer_the_kernel():
    # Arguments that the kernel itself would refuse: only the way to it counts.
    nothing = ctypes.c_char_p(b"/nonexistent/" + FACTS["marker"].encode())
    for name, arguments in (
        ("init_module", (nothing, 0, nothing)),
        ("finit_module", (-1, nothing, 0)),
        ("delete_module", (nothing, 0x800)),
        ("kexec_load", (0, 1 << 20, None, 0)),
        ("reboot", (0, 0, 0, None)),
        ("swapon", (nothing, 0)),
        ("acct", (nothing,)),
        ("quotactl", (0x800002 << 8, nothing, 0, None)),
        ("syslog", (10, None, 0)),
        ("iopl", (3,)),
        ("ioperm", (0x80, 1, 1)),
        ("lookup_dcookie", (0, None, 0)),
    ):
        try:
            escaped(f"{name} gave {call(name, *arguments)}")
        except OSError as error:
            refused = error.errno in (1, 13, 38)  # EPERM, EACCES, ENOSYS
            (held if refused else escaped)(f"{name}: {error.strerror}")


def leave_kernel_objects():
    # System V objects outlive their maker where they are not its namespace's own.
    tried()
    for name, arguments in (
        ("shmget", (FACTS["key"], 4096, 0o1666)),
        ("msgget", (FACTS["key"], 0o1666)),
        ("semget", (FACTS["key"], 1, 0o1666)),
        ("mq_open", (ctypes.c_char_p(FACTS["marker"].encode()), 0o102, 0o666, None)),
    ):
        try:
            held(f"{name}: {call(name, *arguments)}")
        except OSError as error:
            held(f"{name}: {error!r}")


def use_secret_memory():
    attempt("memfd_secret", call, "memfd_secret", 0)


def call_as_32_bit():
    # The i386 gate and the x32 numbers have other tables than the filter's.
    import mmap

    if os.uname().machine != "x86_64":
        held("only x86-64 has this gate")
        return
    tried()
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    escaped(f"getpid through int 0x80: {ctypes.CFUNCTYPE(ctypes.c_int)(address)()}")


def call_as_x32():
    if os.uname().machine != "x86_64":
        held("only x86-64 has these numbers")
        return
    tried()
    attempt("getpid as x32", raw, 0x40000000 | 39)
    attempt("execve as x32", raw, 0x40000000 | 520, None, None, None)


def steer_its_own_jail():
    # A second filter or rule set may be added, but what binds it may not be taken off.
    tried()
    if LIBC.prctl(22, 0, 0, 0, 0) == 0 and LIBC.prctl(21, 0, 0, 0, 0) == 0:
        escaped("the filter is off")
    LIBC.prctl(38, 0, 0, 0, 0)
    if LIBC.prctl(39, 0, 0, 0, 0) == 0:
        escaped("no_new_privs is off")
    LIBC.prctl(1, 0, 0, 0, 0)  # no signal when the parent ends
    LIBC.prctl(36, 1, 0, 0, 0)  # adopts orphans itself
    LIBC.prctl(4, 1, 0, 0, 0)  # may be traced

    def stay():
        os.setsid()
        time.sleep(120)

    try:
        fork_with(stay)
    except OSError as error:
        held(repr(error))


# -- benign ----------------------------------------------------------------------------------------


def use_numpy():
    import numpy

    values = numpy.arange(10_000, dtype=numpy.float64)
    say(f"DONE {float(values @ values):.0f} {numpy.linalg.det(numpy.eye(20)):.1f}")


def use_sympy():
    import sympy

    x = sympy.Symbol("x")
    say(f"DONE {sympy.integrate(sympy.sin(x) ** 2, (x, 0, sympy.pi))} {sympy.factorint(360360)}")


def use_the_library():
    import collections
    import decimal
    import itertools
    import json
    import random
    import re
    import tempfile

    with tempfile.NamedTemporaryFile("w+") as file:
        json.dump(list(itertools.islice(itertools.count(), 5)), file)
        file.seek(0)
        numbers = json.load(file)
    random.seed(1)
    words = collections.Counter(re.findall(r"\w+", "a b a"))
    say(f"DONE {numbers} {words['a']} {decimal.Decimal(1) / 3:.3} {sys.stdin.read()!r}")
