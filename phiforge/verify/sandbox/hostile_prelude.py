"""What every hostile program starts with: how it says that it got through, and raw system calls.

`hostile.py` puts this text before each program; it imports the standard library only.
Writes lines to stdout: TRIED, HELD: why not, ESCAPED: what got through.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

MIB = 2**20
FACTS: dict[str, Any] = {}  # filled in at the program's end: paths, ports and process numbers
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

# name: (x86-64, aarch64); of our own, so that a wrong number in the filter's table shows.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280),
    "capget": (125, 90), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "clone": (56, 220), "clone3": (435, 435),
    "delete_module": (176, 106), "fanotify_init": (300, 262), "finit_module": (313, 273),
    "fsopen": (430, 430), "init_module": (175, 105), "inotify_add_watch": (254, 27),
    "inotify_init1": (294, 26), "io_uring_setup": (425, 425), "ioperm": (173, None),
    "iopl": (172, None), "kcmp": (312, 272), "kexec_load": (246, 104), "keyctl": (250, 219),
    "lookup_dcookie": (212, 18), "memfd_secret": (447, 447), "mknodat": (259, 33),
    "mount": (165, 40), "mount_setattr": (442, 442), "mq_open": (240, 180), "msgget": (68, 186),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pivot_root": (155, 41),
    "prlimit64": (302, 261), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "ptrace": (101, 117), "quotactl": (179, 60), "reboot": (169, 142), "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138), "semget": (64, 190), "setdomainname": (171, 162),
    "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170),
    "shmat": (30, 196), "shmdt": (67, 197), "shmget": (29, 194), "swapon": (167, 224),
    "syslog": (103, 116), "tgkill": (234, 131), "tkill": (200, 130), "umount2": (166, 39),
    "unshare": (272, 97), "userfaultfd": (323, 282), "vhangup": (153, 58),
}  # fmt: skip


def say(line: str) -> None:
    """One line of evidence, written at once: the program may not live to flush."""
    os.write(1, line.replace("\n", " ")[:300].encode("utf-8", "replace") + b"\n")


def tried() -> None:
    say("TRIED")


def held(why: object) -> None:
    say(f"HELD: {why}")


def escaped(what: object) -> None:
    say(f"ESCAPED: {what}")


def attempt(what: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Does it; getting through is an escape, an error of the system is how it is held."""
    try:
        result = action(*arguments)
    except (OSError, MemoryError) as error:
        held(f"{what}: {error!r}")
        return None
    escaped(f"{what}: {result!r}")
    return result


def call(name: str, *arguments: Any) -> int:
    """A system call by name; OSError with its errno, also where the machine has no such call."""
    number = NUMBERS[name][("x86_64", "aarch64").index(os.uname().machine)]
    if number is None:
        raise OSError(38, f"{name}: no such call on this machine")
    return raw(number, *arguments)


def raw(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *wide)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def fork_with(child: Callable[[], object]) -> int:
    """A child process that does one thing and ends; its errors go to stderr."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
    except OSError as error:
        held(f"child: {error!r}")
    finally:
        os._exit(0)


def read_some(path: str) -> bytes:
    """The first bytes of a file, which go to stdout too: the attack looks for its secret there."""
    with open(path, "rb") as file:
        text = file.read(4096)
    say(f"read {path}: {text[:200]!r}")
    return text


def take_name() -> None:
    """The marker as process name, inherited by children: how the attack finds them afterwards."""
    LIBC.prctl(15, FACTS["marker"].encode(), 0, 0, 0)  # PR_SET_NAME


def write_everywhere(payload: bytes) -> None:
    """To every open descriptor but the standard ones: the report is among them."""
    for descriptor in range(3, 256):
        try:
            os.write(descriptor, payload)
        except OSError:
            continue


def send_to(family: int, kind: int, address: Any) -> str:
    """The marker to a listener of the attack's own."""
    import socket

    with socket.socket(family, kind) as connection:
        connection.settimeout(2)
        connection.connect(address)
        connection.send(FACTS["marker"].encode())
    return f"sent to {address!r}"
