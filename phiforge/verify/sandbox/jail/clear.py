"""Removes a folder that a foreign program filled: however deep, closed or oddly named.

`remove(folder)` follows no link and needs no depth; a program that still runs cannot mislead it.
"""

from __future__ import annotations

import contextlib
import os
import stat

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(folder: str) -> None:
    """Remove `folder` and all below it; what cannot be removed stays, without an exception.

    Folders with content give it to the topmost one and go: paths stay short, where walking down
    would reach the longest path that the kernel takes, or Python's limit of recursion.
    """
    with contextlib.suppress(OSError):
        top = _open(folder, None)
        try:
            before = None
            while (names := set(os.listdir(top))) and names != before:
                before = names
                for name in names:
                    _remove_entry(name, top)
        finally:
            os.close(top)
        os.rmdir(folder)


def _remove_entry(name: str, top: int) -> None:
    """Remove one entry of `top`; folders in it become entries of `top`, under new names."""
    with contextlib.suppress(OSError):
        if not _is_folder(name, top):
            os.unlink(name, dir_fd=top)
            return
        inner = _open(name, top)
        try:
            for entry in os.listdir(inner):
                if _is_folder(entry, inner):
                    os.close(_open(entry, inner))  # moving a folder writes its ".."
                    new = os.urandom(12).hex()  # no name that the program could have foreseen
                    os.rename(entry, new, src_dir_fd=inner, dst_dir_fd=top)
                else:
                    os.unlink(entry, dir_fd=inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _open(name: str, parent: int | None) -> int:
    """A descriptor of a folder, which is opened to us first; never one that a link leads to."""
    place = os.open(name, os.O_PATH | _OPEN, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{place}", 0o700)  # the very folder, whatever the name is by now
        return os.open(".", _OPEN, dir_fd=place)
    finally:
        os.close(place)
