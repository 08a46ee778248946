"""Files that are there whole or not at all: atomic writes, hashes, fsync.

Call `with atomic_path(path) as temporary: ...` or `write_json(path, value)`; `content_hash(path)`
gives one SHA-256 for a file or a folder; `with naming(path): ...` makes errors say where they are.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into errors of the operating system that do not say which file they are about.

    A full disk met while writing names no file, and in the libraries written in Rust (safetensors,
    tokenizers) is no OSError: both leave as an OSError with a file name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None or isinstance(error, ValueError | RuntimeError):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move it into place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            sync_file(temporary)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that writers killed in the middle left below `folder`."""
    for file in folder.rglob(".*.tmp"):
        if file.is_file():
            file.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync_file(path: Path) -> None:
    """Make a file's bytes (or every file of a folder) survive a power cut."""
    if path.is_dir():
        for child in path.rglob("*"):
            if child.is_file():
                sync_file(child)
        return sync_folder(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a folder's entries (a rename) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and file hashes."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()
