"""Source files that cannot be used: an error that names file and remedy, or skipped with a reason.

The run is the command line on the micro recipe with one bad file among its texts.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import Result, output_hashes
from undisturbed import Undisturbed

BAD: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "the file is empty"),
    "blank.md": (b" \n\n\t", "the file is empty"),
    "binary.txt": (b"\x7fELF\0\0\1\2" * 40, "the file is binary, not text"),
    "latin1.txt": ("déjà vu\n".encode("latin-1"), "not UTF-8 text (byte 0xe9 at 1)"),
    "utf16.txt": ("plain words".encode("utf-16"), "the file is binary, not text"),
    "cut.jsonl": (b'{"id": "a", "text": "wor', "not a JSON line"),
    "other.jsonl": (b'{"id": "a", "body": "words"}\n', "field 'text' holds no text"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\0\0\0", "gzip file"),
    "cut.parquet": (b"PAR1", "not a readable Parquet file"),
    "empty.html": (b"<html><body></body></html>", "the page holds no text"),
    "unreadable.txt": (b"words\n", "Permission denied"),
}


@pytest.fixture
def texts(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed.recipe.parent / "texts", tmp_path / "texts")
    return tmp_path / "texts"


def sources(texts: Path, **more: str) -> str:
    return "curate.sources=" + json.dumps([{"name": "docs", "path": str(texts), **more}])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_stops_the_run_and_its_removal_mends_it(
    run: Callable[..., Result], texts: Path, undisturbed: Undisturbed, tmp_path: Path, name: str
):
    data, reason = BAD[name]
    file = texts / name
    file.write_bytes(data)
    if name.startswith("unreadable"):
        file.chmod(0)
    arguments = ("--until", "curate", "--set", sources(texts))
    stopped = run(*arguments, obey_permissions={})
    assert stopped.code == 1, stopped
    assert "Traceback" not in stopped.error
    last = stopped.error.splitlines()[-1]
    assert last.startswith(f"error: {file}")
    assert reason in last
    assert "correct or remove the file, or set on_error: skip" in last
    file.unlink()
    assert run(*arguments).code == 0
    found = output_hashes(tmp_path / "micro")
    assert found == {k: v for k, v in undisturbed.hashes.items() if k.startswith("curate/")}


def test_skipping_keeps_the_rest_and_says_why_each_file_went(
    run: Callable[..., Result], texts: Path, undisturbed: Undisturbed, tmp_path: Path
):
    for name, (data, _) in BAD.items():
        (texts / name).write_bytes(data)
    (texts / "unreadable.txt").chmod(0)
    skipping = sources(texts, on_error="skip")
    done = run("--until", "curate", "--set", skipping, obey_permissions={})
    assert done.code == 0, done.error
    assert f"dropped {len(BAD)}: unusable" in done.error
    curate = tmp_path / "micro" / "curate"
    assert (
        output_hashes(curate.parent)["curate/documents.jsonl"]
        == (undisturbed.hashes["curate/documents.jsonl"])
    )
    rows = [json.loads(line) for line in (curate / "dropped.jsonl").read_text().splitlines()]
    reasons = {row["metadata"]["where"].split(":")[0]: row["metadata"]["error"] for row in rows}
    assert set(reasons) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in reasons[name]


def test_only_bad_files_is_an_error_even_when_skipping(run: Callable[..., Result], texts: Path):
    for file in texts.iterdir():
        file.write_bytes(b"\0")
    stopped = run("--set", sources(texts, on_error="skip"))
    assert stopped.code == 1
    assert "source 'docs': no document is left of what it holds" in stopped.error


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda texts: shutil.rmtree(texts), "no such file or folder"),
        (lambda texts: [f.unlink() for f in texts.iterdir()], "no file of a known format"),
        (lambda texts: texts.chmod(0), "texts: "),
    ],
)
def test_a_folder_without_files_is_named(run: Callable[..., Result], texts: Path, prepare, message):
    prepare(texts)
    stopped = run("--set", sources(texts), obey_permissions={})
    if texts.exists():
        os.chmod(texts, 0o755)
    assert stopped.code == 1, stopped
    assert f"{texts}" in stopped.error
    assert message in stopped.error
    assert "Traceback" not in stopped.error
