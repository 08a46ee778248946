"""Landlock: which files a process may read, which folders it may write, no TCP, no stray signals.

`restrict(readable, writable, devices)` binds the calling process and all that it starts, for good.
Linux documentation: userspace-api/landlock.
"""

from __future__ import annotations

import ctypes
import os
import stat

from . import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on x86-64 and aarch64
_VERSION_FLAG, _PATH_BENEATH = 1, 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FIRST_VERSION = (1 << 13) - 1
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NEVER_IN_WORK = _EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_BLOCK | _IOCTL_DEV
_NETWORK = 0b11  # bind and connect of TCP
_SCOPES = 0b11  # abstract Unix sockets and signals stay within


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scopes")]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def version() -> int:
    """Landlock's ABI version here (1 came with Linux 5.13); 0 where it is missing or disabled."""
    try:
        return kernel.system_call("landlock", _CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _handled(abi: int) -> int:
    files = _FIRST_VERSION
    files |= _REFER if abi >= 2 else 0
    files |= _TRUNCATE if abi >= 3 else 0
    return files | (_IOCTL_DEV if abi >= 5 else 0)


def restrict(readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Confine this process; `no_new_privs` must be set. Paths that are missing are left out."""
    abi = version()
    files = _handled(abi)
    rules = _Ruleset(files, _NETWORK if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = kernel.system_call(
        "landlock_create_ruleset", _CREATE_RULESET, ctypes.byref(rules), size, 0
    )
    try:
        for path in readable:
            _allow(ruleset, path, _READ & files)
        for path in devices:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE) & files)
        for path in writable:
            _allow(ruleset, path, files & ~_NEVER_IN_WORK)
        kernel.system_call("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            access &= _OF_FILES
        rule = ctypes.byref(_Beneath(access, descriptor))
        kernel.system_call(f"landlock_add_rule {path}", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)
