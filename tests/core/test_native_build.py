"""Kernels are compiled once, checked before they are loaded, and may be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiforge.core.native import build

SOURCE = """
#include "answer.h"
// compile with: -DPART=2 (a flag of this file's own)
extern "C" const char* phiforge_simd() { return "generic"; }
extern "C" int answer() { return HALF * PART; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one small kernel, and an empty cache."""
    try:
        build._compiler(os.environ.get("CXX", ""), os.environ["PATH"])
    except build.CompileError as error:
        pytest.skip(str(error))
    source = tmp_path / "source"
    source.mkdir()
    (source / "small.cpp").write_text(SOURCE)
    (source / "answer.h").write_text("#define HALF 21\n")
    monkeypatch.setattr(build, "_FOLDER", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PHIFORGE_NATIVE", raising=False)
    build._build.cache_clear()
    yield source
    build._build.cache_clear()


def libraries() -> list[Path]:
    return sorted(build.cache_folder().glob("*.so"))


def test_compiles_once_and_says_so(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = build.describe("small")
    assert library is not None
    assert library.handle.answer() == 42
    assert library.simd == "generic"
    assert "-DPART=2" in library.flags
    assert capfd.readouterr().err.count("compiling small.cpp") == 1
    build._build.cache_clear()
    written = libraries()[0].stat().st_mtime_ns
    assert build.load("small").answer() == 42  # type: ignore[union-attr]
    assert libraries()[0].stat().st_mtime_ns == written
    assert capfd.readouterr().err == ""
    assert build.unavailable("small") is None


def test_changed_header_compiles_anew(folder: Path) -> None:
    assert build.load("small").answer() == 42  # type: ignore[union-attr]
    (folder / "answer.h").write_text("#define HALF 4\n")
    build._build.cache_clear()
    assert build.load("small").answer() == 8  # type: ignore[union-attr]
    assert len(libraries()) == 2


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "no checksum"])
def test_damaged_file_is_compiled_anew(folder: Path, damage: str) -> None:
    # In another process: replacing a file that this one has loaded would prove nothing.
    def answer() -> str:
        code = (
            "import sys; from pathlib import Path; from phiforge.core.native import build; "
            f"build._FOLDER = Path({str(folder)!r}); print(build.load('small').answer())"
        )
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert answer() == "42"
    (library,) = libraries()
    data = library.read_bytes()
    if damage == "no checksum":
        library.with_suffix(".sha256").unlink()
    elif damage == "flipped":
        library.write_bytes(data[:1000] + bytes([data[1000] ^ 255]) + data[1001:])
    else:
        library.write_bytes(data[: len(data) // 2 if damage == "half" else 0])
    assert answer() == "42"
    assert library.read_bytes()[:4] == data[:4]
    assert build._is_whole(library)


def test_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    assert build.load("small") is None
    assert build.unavailable("small") == "PHIFORGE_NATIVE=off"
    monkeypatch.setenv("PHIFORGE_NATIVE", "fast")
    with pytest.raises(ValueError, match="auto, generic, off"):
        build.load("small")


def test_missing_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    assert build.load("small") is None
    assert "install g++ or clang, or set CXX" in str(build.unavailable("small"))
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    assert "no-such-compiler" in str(build.unavailable("small"))


def test_refused_source(folder: Path) -> None:
    (folder / "small.cpp").write_text('#include "answer.h"\nint broken( {\n')
    assert build.load("small") is None
    reason = str(build.unavailable("small"))
    assert "cannot compile small.cpp" in reason
    assert "broken" in reason
    assert not libraries()
    assert not list(build.cache_folder().glob("tmp*"))


def test_unwritable_cache_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert build.load("small") is None
    assert os.devnull in str(build.unavailable("small"))
