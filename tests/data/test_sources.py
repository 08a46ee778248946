"""Sources: every format read, every unusable file named, nothing of this machine in the text."""

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from phiforge.core.records import Document
from phiforge.data.python_library import MODULES, documentation
from phiforge.data.sources import Skipped, Source, document_id, read_items, read_source

ROWS = [{"id": 7, "text": "first", "metadata": {"a": 1}}, {"text": "second", "license": "MIT"}]


def files(folder: Path, **settings: object) -> Source:
    return Source.model_validate({"name": "s", "path": folder, **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffplain\r\ntext\n\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("# Title\n\n    indented")
    (tmp_path / "sub" / "c.html").write_text("<h1>Page</h1><p>words</p>")
    (tmp_path / "sub" / "d.py").write_text("def f():\n    pass\n")
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "third"}).encode()))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "__pycache__" / "x.py").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    return tmp_path


def test_a_folder_of_all_formats(folder: Path):
    found = {doc.text: doc for doc in read_source(files(folder, licence="CC0-1.0"))}
    assert set(found) == {
        "plain\ntext\n",
        "# Title\n\n    indented\n",
        "# Page\n\nwords\n",
        "def f():\n    pass\n",
        "first\n",
        "second\n",
        "third\n",
    }
    page = found["# Page\n\nwords\n"]
    assert page.id == document_id(page.text)
    assert page.metadata == {"path": "sub/c.html", "source": "s", "licence": "CC0-1.0"}
    first = found["first\n"].metadata
    assert (first["a"], first["original_id"], first["path"]) == (1, 7, "e.jsonl")


def test_order_ids_and_paths_do_not_depend_on_the_place(folder: Path, tmp_path: Path):
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    before = list(read_source(files(folder)))
    folder.rename(moved)
    assert list(read_source(files(moved))) == before


def test_parquet_and_another_column(tmp_path: Path):
    table = pyarrow.Table.from_pylist([{"body": "one", "id": "x"}, {"body": "two", "id": "y"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents = list(read_source(files(tmp_path / "a.parquet", text_field="body")))
    assert [document.text for document in documents] == ["one\n", "two\n"]
    with pytest.raises(
        ValueError, match="field 'text' holds no text; set text_field to one of bod"
    ):
        list(read_source(files(tmp_path / "a.parquet")))


def test_include_and_max_documents(folder: Path):
    assert len(list(read_source(files(folder, include=("**/*.py", "*.md"))))) == 2
    assert len(list(read_source(files(folder, max_documents=3)))) == 3


BROKEN = {
    "empty.txt": (b"  \n", "the file is empty"),
    "binary.md": (b"ab\0cd", "the file is binary"),
    "latin.txt": ("été".encode("latin-1"), "not UTF-8 text .byte 0xe9 at 0."),
    "empty.html": (b"<script>1</script>", "the page holds no text"),
    "cut.jsonl": (b'{"text": "whole"}\n{"text": "cu', "cut.jsonl:2: not a JSON line"),
    "list.jsonl": (b"[1]", "list.jsonl:1: a row must be a JSON object, found list"),
    "none.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b'{"text": " "}', "field 'text' is empty"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 99)[:-9], "the gzip file is cut short"),
    "not.jsonl.gz": (b"no gzip", "not a gzip file"),
    "cut.parquet": (b"PAR1abc", "not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unusable_file_is_an_error_with_name_and_remedy(tmp_path: Path, name: str):
    data, error = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*{error}|{error}.*") as caught:
        list(read_source(files(tmp_path)))
    assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1
    assert "on_error: skip" in str(caught.value)


def test_unusable_files_are_skipped_with_a_reason(tmp_path: Path):
    for name, (data, _) in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    items = list(read_items(files(tmp_path, on_error="skip")))
    assert sorted(i.text for i in items if isinstance(i, Document)) == ["good\n", "whole\n"]
    skipped = {item.where for item in items if isinstance(item, Skipped)}
    assert {where.partition(":")[0] for where in skipped} == set(BROKEN)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt: PermissionError"):
        list(read_source(files(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kind": "files"}, "path is missing"),
        ({"kind": "huggingface"}, "dataset is missing"),
        ({"kind": "python-docs", "path": "x"}, "path: has no effect on a source of kind python-d"),
        ({"kind": "files", "path": "x", "modules": ["re"]}, "modules: has no effect"),
        ({"kind": "files", "path": "x", "colour": 1}, "colour"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings: dict, error: str):
    with pytest.raises(ValidationError, match=error):
        Source(name="s", **settings)


def test_missing_paths_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        list(read_source(files(tmp_path / "none")))
    with pytest.raises(ValueError, match="no file of a known format"):
        list(read_source(files(tmp_path)))


def test_python_documentation_is_the_same_every_time_and_anonymous():
    source = Source(name="docs", kind="python-docs", modules=("textwrap", "configparser", "enum"))
    first, second = list(read_source(source)), list(read_source(source))
    assert first == second
    assert [document.metadata["module"] for document in first] == list(source.modules or ())
    text = "".join(document.text for document in first)
    assert "## Functions\n\ndedent(text)\n    Remove any common leading whitespace" in text
    assert sys.prefix not in text
    assert " 0x7" not in text
    assert first[0].metadata["licence"] == "PSF-2.0"


def test_python_documentation_names_a_module_that_is_not_there():
    with pytest.raises(ValueError, match="module 'no_such': ModuleNotFoundError"):
        list(documentation(["no_such"]))


def test_python_source_is_the_code():
    source = Source(name="code", kind="python-source", modules=("textwrap", "math", "json.decoder"))
    documents = list(read_source(source))
    # math is written in C and has no source code.
    assert [document.metadata["module"] for document in documents] == ["textwrap", "json.decoder"]
    assert "def dedent(text):" in documents[0].text
    assert len(MODULES) == len(set(MODULES)) > 100
