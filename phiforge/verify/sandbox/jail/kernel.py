"""System calls that Python's `os` does not have: namespaces, mounts, capabilities, prctl, seccomp.

Each function is one call, or a few that belong together; OSError says which call failed.
"""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_CHILD_SUBREAPER = 24, 28, 36
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2
_SECUREBITS = 0b11 | 0b1100  # uid 0 gives no capabilities, and that is locked
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (ctypes.c_char_p,) * 3 + (ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4


def checked(result: int, what: str) -> int:
    """`result` of a C call, or OSError naming `what`."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(what: str, number: int, *arguments: object) -> int:
    """The system call `number`; integers go as C longs, buffers as pointers."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(_libc.syscall(ctypes.c_long(number), *words), what)


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones."""
    checked(_libc.unshare(flags), "unshare")


def set_host_name(name: str) -> None:
    """The host name of this UTS namespace."""
    raw = name.encode()
    checked(_libc.sethostname(raw, len(raw)), "sethostname")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    raw_kind = kind.encode() if kind else None
    result = _libc.mount(os.fsencode(source), os.fsencode(target), raw_kind, flags, data.encode())
    checked(result, f"mount {kind or 'bind'} on {target}")


def set_mount_attributes(target: str, attributes: int, recursive: bool) -> None:
    """Add read-only, nosuid ... to a mount and, if wanted, to all below it (Linux 5.12)."""

    class MountAttributes(ctypes.Structure):
        _fields_ = [(n, ctypes.c_uint64) for n in ("add", "clear", "propagation", "userns_fd")]

    wanted = MountAttributes(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    pointer, size = ctypes.byref(wanted), ctypes.sizeof(wanted)
    name = ctypes.c_char_p(os.fsencode(target))
    what = f"mount_setattr {target}"
    system_call(what, _SYS_MOUNT_SETATTR, _AT_FDCWD, name, flags, pointer, size)


def change_root(folder: str) -> None:
    """Make the mount point `folder` the root and lose sight of the old one."""
    os.chdir(folder)
    here = ctypes.c_char_p(b".")
    system_call("pivot_root", _SYS_PIVOT_ROOT[platform.machine()], here, here)
    checked(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that forked it ends; at once if it already has."""
    checked(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl PDEATHSIG")
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def own_proc_files() -> None:
    """Let this process write its own /proc files after a change of user."""
    checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl DUMPABLE")


def refuse_new_privileges() -> None:
    """No program started from here on gains anything from setuid bits or file capabilities."""
    checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")


def drop_capabilities() -> None:
    """Give up every capability, for good; harmless where there are none."""
    if holds_capabilities():
        _libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0)
        for capability in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
                break
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    if holds_capabilities():
        raise OSError("capabilities are still held after capset")


def holds_capabilities() -> bool:
    """Whether this process has any effective or permitted capability."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: twice 32 bits
    checked(_libc.capget(header, data), "capget")
    return any(data[i] for i in (0, 1, 3, 4))


def install_filter(program: bytes) -> None:
    """Install a seccomp filter (packed `struct sock_filter`s) for this process and its children."""

    class FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    wanted = FilterProgram(len(program) // 8, program)
    address = ctypes.addressof(wanted)
    result = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address, 0, 0)
    checked(result, "prctl SECCOMP")
