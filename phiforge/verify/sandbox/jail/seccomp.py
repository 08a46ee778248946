"""The system call filter: a list of what is allowed, as a program for the kernel's seccomp.

Call `program("x86_64")` and give the bytes to `kernel.install_filter`: it cannot be taken off
again, and every child inherits it. A pure function; nothing is written.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Union

from .syscalls import ALLOWED, METADATA, NUMBERS, REFUSED

MACHINES = tuple(NUMBERS)

# include/uapi/linux/seccomp.h and audit.h
ALLOW = 0x7FFF0000
KILL = 0x80000000  # the whole process
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # x86-64 runs a second table of calls under this bit


def refuse(code: int) -> int:
    """The fate "fail with this error number"."""
    return 0x00050000 | code


EPERM = refuse(errno.EPERM)
ENOSYS = refuse(errno.ENOSYS)

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6], little-endian.
_NUMBER, _ARCHITECTURE = 0, 4
_ALL_BITS = 0xFFFFFFFF


def low(argument: int) -> int:
    """Where the lower half of an argument lies: all that the kernel reads of an int."""
    return 16 + 8 * argument


def high(argument: int) -> int:
    return 20 + 8 * argument


# A decision is a fate, or a choice between decisions by one 32-bit word of the call's data.
# `Union`, because `|` does not take a name that is defined only below.
Decision = Union[int, "Switch", "AnyBit"]


@dataclass(frozen=True)
class Switch:
    """By the word's value, without the bits in `ignoring`."""

    word: int
    cases: tuple[tuple[int, Decision], ...]
    default: Decision
    ignoring: int = 0


@dataclass(frozen=True)
class AnyBit:
    """By whether the word has any of the bits."""

    word: int
    bits: int
    yes: Decision
    no: Decision


def cases(values: Iterable[int], then: Decision) -> tuple[tuple[int, Decision], ...]:
    return tuple((value, then) for value in values)


def one_of(word: int, values: Iterable[int], otherwise: Decision, then: Decision = ALLOW) -> Switch:
    return Switch(word, cases(values, then), otherwise)


# ---- calls whose arguments decide ----------------------------------------------------------------

_CLONE_THREAD = 0x00010000
# CLONE_NEW{TIME,NS,CGROUP,UTS,IPC,USER,PID,NET}; CLONE_PARENT, whose child would be the
# supervisor's, with an exit signal of the program's choice; CLONE_PTRACE.
_CLONE_REFUSED = 0x7E020080 | 0x00008000 | 0x00002000
_SET_ID_BITS = 0o6000
_CREATES = 0o100 | 0o20000000  # O_CREAT, O_TMPFILE: open() reads its mode
_MSG_OOB = 1
_AF_UNIX, _SOCK_STREAM, _SOCK_NONBLOCK_CLOEXEC = 1, 1, 0x800 | 0x80000
_SOL_SOCKET = 1
_PRIO_PROCESS = 0
_PERSONALITY_QUERY = 0xFFFFFFFF

PRCTL = {
    "PR_GET_PDEATHSIG": 2,
    "PR_GET_DUMPABLE": 3,
    "PR_SET_NAME": 15,
    "PR_GET_NAME": 16,
    "PR_GET_SECCOMP": 21,
    "PR_CAPBSET_READ": 23,
    "PR_SET_TIMERSLACK": 29,
    "PR_GET_TIMERSLACK": 30,
    "PR_SET_NO_NEW_PRIVS": 38,  # set already, and cannot be unset
    "PR_GET_NO_NEW_PRIVS": 39,
    "PR_SET_THP_DISABLE": 41,  # allocators ask for huge pages or against them
    "PR_GET_THP_DISABLE": 42,
    "PR_SVE_GET_VL": 51,  # how long this machine's vectors are
    "PR_GET_TAGGED_ADDR_CTRL": 56,
    "PR_SME_GET_VL": 64,
    "PR_SET_VMA": 0x53564D41,  # libc names its mappings
}
ARCH_PRCTL = {
    "ARCH_SET_GS": 0x1001,
    "ARCH_SET_FS": 0x1002,  # every start of a libc
    "ARCH_GET_FS": 0x1003,
    "ARCH_GET_GS": 0x1004,
    "ARCH_GET_XCOMP_SUPP": 0x1021,
    "ARCH_GET_XCOMP_PERM": 0x1022,
    "ARCH_REQ_XCOMP_PERM": 0x1023,  # linear algebra with AMX
}
FCNTL = {
    "F_DUPFD": 0,
    "F_GETFD": 1,
    "F_SETFD": 2,
    "F_GETFL": 3,
    "F_SETFL": 4,
    "F_GETLK": 5,
    "F_SETLK": 6,
    "F_SETLKW": 7,
    "F_GETOWN": 9,
    "F_GETOWN_EX": 16,
    "F_OFD_GETLK": 36,
    "F_OFD_SETLK": 37,
    "F_OFD_SETLKW": 38,
    "F_DUPFD_CLOEXEC": 1030,
    "F_SETPIPE_SZ": 1031,
    "F_GETPIPE_SZ": 1032,
}  # without F_SETOWN and F_SETSIG: together with O_ASYNC they are a kill(); without leases
IOCTL = {
    "TCGETS": 0x5401,
    "TCGETS2": 0x802C542A,
    "TIOCGPGRP": 0x540F,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
}
_TYPES_FOR_OTHERS = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C}  # puts input into a terminal
_CLONES_FILES = {"FICLONE": 0x40049409, "FICLONERANGE": 0x4020940D}
SETSOCKOPT = {
    "SO_REUSEADDR": 2,
    "SO_SNDBUF": 7,
    "SO_RCVBUF": 8,
    "SO_RCVTIMEO": 20,
    "SO_SNDTIMEO": 21,
}


def _files() -> dict[str, Decision]:
    """No file ever gets a set-user-id or set-group-id bit, whichever call makes it."""

    def mode(argument: int) -> AnyBit:
        return AnyBit(low(argument), _SET_ID_BITS, EPERM, ALLOW)

    # isatty() takes ENOTTY for no; programs that copy files take EOPNOTSUPP for "this file system
    # has no clones" and copy the bytes.
    ioctl = Switch(
        low(1),
        (
            *cases(IOCTL.values(), ALLOW),
            *cases(_TYPES_FOR_OTHERS.values(), EPERM),
            *cases(_CLONES_FILES.values(), refuse(errno.EOPNOTSUPP)),
        ),
        refuse(errno.ENOTTY),
    )
    return {
        "open": AnyBit(low(1), _CREATES, mode(2), ALLOW),
        "openat": AnyBit(low(2), _CREATES, mode(3), ALLOW),
        "creat": mode(1),
        "chmod": mode(1),
        "fchmod": mode(1),
        "fchmodat": mode(2),
        "fchmodat2": mode(2),
        "fcntl": one_of(low(1), FCNTL.values(), EPERM),
        "ioctl": ioctl,
    }


def _socket_pairs() -> dict[str, Decision]:
    """Connected stream pairs only: a datagram socket could still be sent on to any address."""

    def without_oob(flags: int, then: Decision = ALLOW) -> AnyBit:
        # Out-of-band bytes of local sockets let a browser's sandbox be broken: CVE-2025-38236.
        return AnyBit(low(flags), _MSG_OOB, EPERM, then)

    no_address = AnyBit(low(4), _ALL_BITS, EPERM, AnyBit(high(4), _ALL_BITS, EPERM, ALLOW))
    stream = Switch(low(1), ((_SOCK_STREAM, ALLOW),), EPERM, ignoring=_SOCK_NONBLOCK_CLOEXEC)
    return {
        "socketpair": one_of(low(0), (_AF_UNIX,), EPERM, then=stream),
        "setsockopt": one_of(
            low(1), (_SOL_SOCKET,), EPERM, then=one_of(low(2), SETSOCKOPT.values(), EPERM)
        ),
        "sendto": without_oob(3, then=no_address),
        "recvfrom": without_oob(3),
        "sendmsg": without_oob(2),
        "recvmsg": without_oob(2),
    }


def _processes(new: bool, own_pid: int | None) -> dict[str, Decision]:
    def sent_to(argument: int) -> Decision:
        return ALLOW if own_pid is None else one_of(low(argument), (own_pid,), EPERM)

    def of_itself(argument: int) -> Decision:
        return ALLOW if own_pid is None else one_of(low(argument), (0, own_pid), EPERM)

    kind = ALLOW if new else AnyBit(low(0), _CLONE_THREAD, ALLOW, EPERM)
    clone = AnyBit(low(0), _CLONE_REFUSED, EPERM, AnyBit(high(0), _ALL_BITS, EPERM, kind))
    fork = ALLOW if new else EPERM
    return {
        "clone": clone,
        "fork": fork,
        "vfork": fork,
        "kill": sent_to(0),
        "tgkill": sent_to(0),
        # Takes a thread's id; only the main thread's is known. musl raises signals by this call.
        "tkill": sent_to(0),
        "rt_sigqueueinfo": sent_to(0),
        "rt_tgsigqueueinfo": sent_to(0),
        "pidfd_open": sent_to(0),
        "pidfd_send_signal": ALLOW if own_pid is None else EPERM,
        "sched_setaffinity": of_itself(0),
        "setpriority": one_of(low(0), (_PRIO_PROCESS,), EPERM, then=of_itself(1)),
        "prlimit64": one_of(low(0), {0, own_pid or 0}, EPERM),
        "prctl": one_of(low(0), PRCTL.values(), EPERM),
        "arch_prctl": one_of(low(0), ARCH_PRCTL.values(), EPERM),
        "personality": one_of(low(0), (_PERSONALITY_QUERY,), EPERM),
    }


# ---- from decisions to instructions --------------------------------------------------------------

# A classic BPF instruction: code, jump if true, jump if false (both relative), operand.
# include/uapi/linux/filter.h; an allowed number that needs no argument costs the kernel nothing
# after the filter's start: it evaluates those once, if the program uses these codes alone.
_Instruction = tuple[int, int, int, int | Decision]
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_JUMP, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x05, 0x15, 0x35, 0x45


def _ranges(cases: Iterable[tuple[int, Decision]], default: Decision) -> list[tuple[int, Decision]]:
    """(first value, decision), ascending: neighbours of one decision are one range."""
    starts: dict[int, Decision] = {0: default}
    for value, decision in sorted(cases, key=lambda case: case[0]):
        starts[value] = decision
        if value < _ALL_BITS:
            starts[value + 1] = default
    ranges = list(starts.items())
    return [r for i, r in enumerate(ranges) if i == 0 or r[1] != ranges[i - 1][1]]


def _search(
    ranges: list[tuple[int, Decision]], leaf: Callable[[Decision], list[_Instruction]]
) -> list[_Instruction]:
    """Binary search of the loaded word: nine comparisons where a chain would need hundreds."""
    if len(ranges) == 1:
        return leaf(ranges[0][1])
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle], leaf), _search(ranges[middle:], leaf)
    return [(_IF_AT_LEAST, len(below), 0, ranges[middle][0]), *below, *above]


def _assemble(decision: Decision) -> list[_Instruction]:
    if isinstance(decision, int):
        return [(_RETURN, 0, 0, decision)]
    load: _Instruction = (_LOAD, 0, 0, decision.word)
    if isinstance(decision, AnyBit):
        yes, no = _assemble(decision.yes), _assemble(decision.no)
        return [load, (_IF_ANY_BIT, 0, len(yes), decision.bits), *yes, *no]
    kept = _ALL_BITS & ~decision.ignoring
    keep: list[_Instruction] = [(_AND, 0, 0, kept)] if decision.ignoring else []
    return [load, *keep, *_search(_ranges(decision.cases, decision.default), _assemble)]


def _leaf(decision: Decision) -> list[_Instruction]:
    """Conditional jumps reach 255 instructions, plain ones any: checks lie behind the search."""
    if isinstance(decision, int):
        return _assemble(decision)
    return [(_JUMP, 0, 0, decision)]


def _resolve(search: list[_Instruction]) -> list[_Instruction]:
    """Put each check behind the search once, and let the plain jumps lead there."""
    code, places = list(search), {}
    for index, (operation, _, _, decision) in enumerate(search):
        if operation != _JUMP:
            continue
        if decision not in places:
            places[decision] = len(code)
            code += _assemble(decision)
        code[index] = (_JUMP, 0, 0, places[decision] - index - 1)
    return code


def fates(
    machine: str, *, processes: bool = True, own_pid: int | None = None, metadata: bool = True
) -> dict[str, Decision]:
    """What happens to each call by name; calls missing here fail with ENOSYS.

    clone3 and openat2 must stay missing: their flags lie in memory, which a filter cannot read,
    and libc then falls back to the older calls.
    """
    decisions: dict[str, Decision] = dict.fromkeys(ALLOWED, ALLOW)
    decisions |= dict.fromkeys(REFUSED, EPERM)
    decisions |= _files() | _socket_pairs() | _processes(processes, own_pid)
    if not metadata:
        decisions |= dict.fromkeys(METADATA, EPERM)
    return {name: decisions[name] for name in NUMBERS[machine] if name in decisions}


def program(
    machine: str, *, processes: bool = True, own_pid: int | None = None, metadata: bool = True
) -> bytes:
    """The packed `struct sock_filter` array for one machine; the last ones are remembered.

    `processes=False` refuses new processes; threads stay. `own_pid` lets signals go to that process
    alone, and the limits, priority and processors of that process alone be set. `metadata=False`
    refuses what Landlock does not see: modes and times of files, and before its third version
    their truncation by name; without a read-only tree these would reach the user's own files.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine {machine!r}: the filter knows {', '.join(MACHINES)} only")
    if own_pid is not None and not 0 < own_pid < 2**22:
        raise ValueError(f"own_pid {own_pid}: a process id lies between 1 and {2**22 - 1}")
    return _pack(machine, processes, own_pid, metadata)


@lru_cache(maxsize=8)
def _pack(machine: str, processes: bool, own_pid: int | None, metadata: bool) -> bytes:
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        code += [(_IF_ANY_BIT, 0, 1, _X32), (_RETURN, 0, 0, KILL)]
    by_name = fates(machine, processes=processes, own_pid=own_pid, metadata=metadata)
    by_number = [(NUMBERS[machine][name], decision) for name, decision in by_name.items()]
    code += _resolve(_search(_ranges(by_number, ENOSYS), _leaf))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
