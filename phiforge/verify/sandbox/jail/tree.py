"""The file tree that programs see: a read-only root with an interpreter in it and little else.

`enter(paths, staging)` builds it in a mount namespace of the caller's own and makes it the root;
`mount_work(limits)` adds the bounded, writable folder of one run.
"""

from __future__ import annotations

import os

from . import kernel

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SYSTEM_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
LOADER_CACHE = "/etc/ld.so.cache"
WORK = "/home/sandbox"
WORK_LINKS = ("/tmp", "/dev/shm")  # the latter: semaphores of multiprocessing

_READ_ONLY = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
_PLACE_BYTES = 2**20  # of the directories and links that make up the tree


def enter(paths: list[str], staging: str) -> None:
    """Make a tree of `paths` the root of this process's mount namespace.

    `staging` is an empty folder to build in. Raises OSError where mounts are not allowed.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", staging, "tmpfs", kernel.MS_NODEV, f"mode=755,size={_PLACE_BYTES}")
    for path in outermost(paths):
        if is_system_link(path):
            _make_parents(staging + path)
            os.symlink(os.readlink(path), staging + path)  # /lib -> usr/lib
        elif os.path.exists(path):
            _bind(path, staging + path, _READ_ONLY | kernel.MOUNT_ATTR_NODEV)
    for device in DEVICES:
        _bind(device, staging + device, _READ_ONLY | kernel.MOUNT_ATTR_NOEXEC)
    os.makedirs(staging + WORK, mode=0o755, exist_ok=True)
    for place in WORK_LINKS:
        if not os.path.lexists(staging + place):
            os.symlink(WORK, staging + place)
    attributes = _READ_ONLY | kernel.MOUNT_ATTR_NODEV
    kernel.set_mount_attributes(staging, attributes, recursive=False)
    kernel.change_root(staging)


def mount_work(disk_bytes: int, num_files: int) -> None:
    """The writable folder of one run: memory, bounded in bytes and files, gone with the run."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    # Blocks of deleted-but-open files count too; the root of the mount takes an inode.
    # For everybody: nobody but the run sees this mount, which root may have made for another user.
    options = f"mode=777,size={disk_bytes},nr_inodes={num_files + 1}"
    kernel.mount("tmpfs", WORK, "tmpfs", flags, options)


def outermost(paths: list[str]) -> list[str]:
    """`paths` without those that lie in another of them."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(path.startswith(other + "/") and not os.path.islink(other) for other in kept):
            kept.append(path)
    return kept


def is_system_link(path: str) -> bool:
    """/lib -> usr/lib and the like: to be made again, not to be followed."""
    return os.path.islink(path) and os.path.dirname(path) in ("/", "/usr")


def _bind(source: str, target: str, attributes: int) -> None:
    _make_parents(target)
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o644))
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.set_mount_attributes(target, attributes, recursive=True)


def _make_parents(target: str) -> None:
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
