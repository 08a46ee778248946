"""Folders that programs leave behind are removed, whatever was done to hinder it.

Run: pytest tests/verify/sandbox/test_clear.py.
"""

import os
from pathlib import Path

from phiforge.verify.sandbox.jail import clear


def test_a_folder_too_deep_for_a_path_goes(tmp_path: Path):
    folder = tmp_path / "work"
    folder.mkdir()
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for depth in range(1200):
            Path(f"file{depth}").touch()
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
        os.close(here)
    clear.remove(str(folder))
    assert not folder.exists()


def test_names_modes_and_kinds_that_hinder(tmp_path: Path):
    folder = tmp_path / "work"
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed" / "inner" / "file").touch()
    for name in (b"x" * 255, b"new\nline", b"\xff\xfe", b"-rf", b"*"):
        (folder / os.fsdecode(name)).mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "same" / "same" / "same").mkdir(parents=True)
    for path in (folder / "closed" / "inner", folder / "closed", folder):
        path.chmod(0)
    clear.remove(str(folder))
    assert not folder.exists()


def test_links_are_removed_not_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    outside.chmod(0o755)
    folder = tmp_path / "work"
    (folder / "inner").mkdir(parents=True)
    (folder / "to-folder").symlink_to(outside)
    (folder / "inner" / "to-folder").symlink_to(outside)
    (folder / "inner" / "to-file").symlink_to(outside / "kept.txt")
    clear.remove(str(folder))
    assert not folder.exists()
    assert (outside / "kept.txt").read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o755


def test_what_is_not_there_is_no_error(tmp_path: Path):
    clear.remove(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("kept")
    clear.remove(str(tmp_path / "file"))
    assert (tmp_path / "file").exists()
