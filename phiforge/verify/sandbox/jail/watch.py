"""Looks at running programs from outside: their processes, their memory, the files they leave.

`Guard(...).exceeded()` says which bound of a run was passed, or None; a few system calls each time.
"""

from __future__ import annotations

import os
from typing import Any


def children_of(pid: int, proc: int) -> list[int]:
    """Direct children of all threads of a process; empty once it is gone. `proc`: /proc, opened."""
    found: list[int] = []
    try:
        tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:
        return found
    try:
        for thread in os.listdir(tasks):
            found += [int(word) for word in _text(f"{thread}/children", tasks).split()]
    except OSError:
        pass  # it ended between two looks
    finally:
        os.close(tasks)
    return found


def descendants_of(pid: int, proc: int) -> list[int]:
    """All processes below `pid`, without itself."""
    found: list[int] = []
    waiting = children_of(pid, proc)
    while waiting:
        found.append(waiting.pop())
        waiting += children_of(found[-1], proc)
    return found


def _text(name: str, folder: int) -> str:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def own_memory(pid: int, proc: int) -> int:
    """Bytes of resident memory that a process does not share with a file."""
    total = 0
    for line in _text(f"{pid}/status", proc).splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def deleted_files(family: list[int], device: int, proc: int) -> dict[int, int]:
    """Bytes, by inode, of files on a device that have no name any more but are still open."""
    sizes: dict[int, int] = {}
    for pid in family:
        try:
            folder = os.open(f"{pid}/fd", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            continue  # it ended
        try:
            for name in os.listdir(folder):
                found = _stat(name, folder)
                if found and found.st_dev == device and found.st_nlink == 0:
                    sizes[found.st_ino] = found.st_blocks * 512
        except OSError:
            pass
        finally:
            os.close(folder)
    return sizes


def mapped_files(family: list[int], folder: str, proc: int) -> set[int]:
    """Inodes of files that were made in a folder, have no name any more and are still mapped."""
    found = set()
    for pid in family:
        try:
            descriptor = os.open(f"{pid}/maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
            with open(descriptor, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if line.endswith(" (deleted)\n") and f" {folder}/" in line:
                        found.add(int(line.split()[4]))
        except OSError:
            continue  # it ended
    return found


def _stat(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder)
    except OSError:
        return None  # closed between two looks


class Guard:
    """Bounds that no resource limit of the kernel covers, checked many times a second."""

    def __init__(
        self, child: int, proc: int, limits: dict[str, Any], work: str | None, inner_work: str
    ) -> None:
        """`work`: folder without a bound of its own; `inner_work`: what the program calls it."""
        self._child, self._proc, self._limits, self._work = child, proc, limits, work
        self._inner_work = inner_work

    def exceeded(self) -> str | None:
        """ "memory" of all processes together, or "disk" where the work folder has no own bound."""
        family = [self._child, *descendants_of(self._child, self._proc)]
        if sum(own_memory(pid, self._proc) for pid in family) > self._limits["memory_bytes"]:
            return "memory"
        if self._work is not None and self._disk_exceeded(self._work, family):
            return "disk"
        return None

    def _disk_exceeded(self, work: str, family: list[int]) -> bool:
        deleted = deleted_files(family, os.stat(work).st_dev, self._proc)
        if mapped_files(family, self._inner_work, self._proc) - deleted.keys():
            return True  # nobody can say how large these are
        num_files, num_bytes = 0, sum(deleted.values())
        folders = [work]
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        num_files += 1
                        num_bytes += _allocated(entry)
                        if num_files > self._limits["num_files"]:
                            return True
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # removed meanwhile
            except OSError:
                return True  # closed to us, or too deep for a path: files could hide there
        return num_bytes > self._limits["disk_bytes"]


def _allocated(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0  # removed meanwhile, which must not hide its neighbours
