"""Compiles one C++ file of this folder on first use and loads it: no torch headers, no ABI ties.

`load("decoder")` gives a ctypes library or None, and `unavailable("decoder")` says why it is None.
Written: (XDG_CACHE_HOME or ~/.cache)/phiforge/native/NAME-HASH.so and its checksum.

PHIFORGE_NATIVE=off turns kernels off everywhere; PHIFORGE_NATIVE=generic compiles them without
instructions written by hand, as on a machine that lacks them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")
_BASE_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno")
# The first that compiles wins: Apple's compiler has no OpenMP, some know no -march=native.
_FLAG_CHOICES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_ERROR_LINES = 5


class CompileError(RuntimeError):
    """No compiler, or it refused; the message says which and what to do."""


@dataclass(frozen=True)
class Library:
    """One compiled file: where it lies, how it was compiled, which instructions it uses."""

    path: Path
    flags: tuple[str, ...]
    simd: str  # "avx512_bf16", "avx512", "avx2", "neon" or "generic"
    handle: ctypes.CDLL


def load(name: str) -> ctypes.CDLL | None:
    """The library of `NAME.cpp`, compiled if need be; None when kernels are off or cannot be had.

    Import torch first where the library uses threads, so that both share one pool.
    """
    library = describe(name)
    return library.handle if library else None


def describe(name: str) -> Library | None:
    """As `load`, with path, flags and instruction set."""
    found = _find(name)
    return found if isinstance(found, Library) else None


def unavailable(name: str) -> str | None:
    """Why `load` gives None; None when it gives a library."""
    found = _find(name)
    return None if isinstance(found, Library) else found


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "phiforge" / "native"


def _find(name: str) -> Library | str:
    mode = os.environ.get("PHIFORGE_NATIVE", "auto")
    if mode == "off":
        return "PHIFORGE_NATIVE=off"
    if mode not in ("auto", "generic"):
        raise ValueError(f"PHIFORGE_NATIVE is {mode!r}; choose one of: auto, generic, off")
    compiler = os.environ.get("CXX", "")
    return _build(name, mode == "generic", compiler, os.environ.get("PATH", ""), cache_folder())


@functools.cache
def _build(name: str, generic: bool, cxx: str, path: str, folder: Path) -> Library | str:
    """Asked once per process and setting: a missing compiler is not searched for again."""
    try:
        compiler = _compiler(cxx, path)
        defines = ("-DPHIFORGE_GENERIC",) if generic else ()
        return _compiled(name, compiler, _BASE_FLAGS + _own_flags(name) + defines, folder)
    except (CompileError, OSError) as error:
        return str(error)


def _own_flags(name: str) -> tuple[str, ...]:
    """Flags that a file asks for in a comment: `// compile with: -flag ...`, up to a bracket."""
    text = (_FOLDER / f"{name}.cpp").read_text(encoding="utf-8")
    asked = re.search(r"^// compile with: ([^(\n]*)", text, re.M)
    return tuple(asked.group(1).split()) if asked else ()


def _compiler(cxx: str, path: str) -> list[str]:
    command = shlex.split(cxx)
    if command and shutil.which(command[0], path=path):
        return command
    if command:
        raise CompileError(f"CXX is {cxx!r}, which is no program on this machine; correct it")
    for candidate in _COMPILERS:
        if found := shutil.which(candidate, path=path):
            return [found]
    raise CompileError("no C++ compiler: install g++ or clang, or set CXX")


def _compiled(name: str, compiler: list[str], flags: tuple[str, ...], folder: Path) -> Library:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((compiler, version, flags, _cpu())).encode())
    for source in sources(name):
        digest.update(source.read_bytes())
    target = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    if not _is_whole(target):
        _compile(name, compiler, flags, target)
    try:
        handle = ctypes.CDLL(str(target))
    except OSError:  # made on another system that shares this folder
        _compile(name, compiler, flags, target)
        handle = ctypes.CDLL(str(target))
    handle.phiforge_simd.restype = ctypes.c_char_p
    used = tuple(_flags_file(target).read_text().split())
    return Library(target, used, handle.phiforge_simd().decode(), handle)


def sources(name: str) -> list[Path]:
    """`NAME.cpp` and the headers of this folder that it includes, each once."""
    found: list[Path] = []
    waiting = [_FOLDER / f"{name}.cpp"]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        waiting += [_FOLDER / header for header in _included(path)]
    return found


def _included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.M)


def _compile(name: str, compiler: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Compiles beside the target and renames, so that processes never see half a file."""
    print(f"phiforge: compiling {name}.cpp with {compiler[0]}, once", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    errors = ""
    for choice in _FLAG_CHOICES:
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            command = [*compiler, *flags, *choice, str(_FOLDER / f"{name}.cpp"), "-o", temporary]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                _install(Path(temporary), target, flags + choice)
                return
            errors = errors or done.stderr
        finally:
            Path(temporary).unlink(missing_ok=True)
    first = "\n".join(errors.splitlines()[:_ERROR_LINES])
    raise CompileError(f"{' '.join(compiler)} cannot compile {name}.cpp:\n{first}")


def _install(made: Path, target: Path, flags: tuple[str, ...]) -> None:
    made.chmod(0o755)
    for path, text in (
        (_sum_file(target), _checksum(made)),
        (_flags_file(target), " ".join(flags)),
    ):
        handle, temporary = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    os.replace(made, target)


def _is_whole(target: Path) -> bool:
    """Whether the file is what the compiler wrote: loading half a library kills the process."""
    sums = _sum_file(target)
    if not (target.is_file() and sums.is_file() and _flags_file(target).is_file()):
        return False
    return sums.read_text() == _checksum(target)


def _sum_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _flags_file(target: Path) -> Path:
    return target.with_suffix(".flags")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cpu() -> str:
    """What -march=native looks at, so that machines sharing a home folder do not share code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.version()}"
    keys = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))
