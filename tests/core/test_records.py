"""Records survive every file format; bad content is named by file and line."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.core.records import Chat, Document, Pair, Problem, read_records, write_records

RECORDS = [
    Document(id="a", text="uno\ndos é 漢", metadata={"licence": "MIT", "n": [1, 2]}),
    Document(id="b", text="", metadata={}),
]
PAIR = Pair(
    id="p",
    prompt=[{"role": "user", "content": "1+1"}],
    chosen="2",
    rejected="3",
    prompt_token_ids=[1, 2],
    chosen_token_ids=[3],
    rejected_token_ids=[4],
)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_round_trip(tmp_path, name):
    assert write_records(tmp_path / name, RECORDS) == 2
    assert list(read_records(tmp_path / name, Document)) == RECORDS
    write_records(tmp_path / name, [PAIR])
    assert list(read_records(tmp_path / name, Pair)) == [PAIR]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_any_text_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("t") / "x.jsonl.gz"
    records = [Document(id=str(i), text=text) for i, text in enumerate(texts)]
    write_records(path, records)
    assert list(read_records(path, Document)) == records


def test_same_records_same_bytes(tmp_path):
    write_records(tmp_path / "a.jsonl.gz", RECORDS)
    write_records(tmp_path / "b.jsonl.gz", RECORDS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_folder_is_read_in_name_order(tmp_path):
    write_records(tmp_path / "2.jsonl", RECORDS[1:])
    write_records(tmp_path / "1.jsonl", RECORDS[:1])
    (tmp_path / "notes.txt").write_text("not records")
    assert [d.id for d in read_records(tmp_path, Document)] == ["a", "b"]


def test_unknown_fields_are_kept_as_metadata(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a", "text": "t", "url": "u"}\n\n')
    assert next(read_records(path, Document)).metadata == {"url": "u"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"', r"x.jsonl:2: not valid JSON"),
        ('{"text": "a"}', r"x.jsonl:2: field 'id' is missing"),
        ('{"id": "a"}', r"x.jsonl:2: Document lacks text"),
        ('{"id": "a", "text": 3}', r"x.jsonl:2: field 'text' must be str, found int"),
        ("[1]", r"x.jsonl:2: expected a JSON object, found list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "0", "text": ""}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_records(path, Document))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"id": "a", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl:1: not UTF-8"):
        list(read_records(tmp_path / "b.jsonl", Document))
    whole = gzip.compress(b'{"id": "a", "text": "a"}\n' * 1000)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        list(read_records(tmp_path / "c.jsonl.gz", Document))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="not a readable Parquet"):
        list(read_records(tmp_path / "d.parquet", Document))
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_records(tmp_path / "none.jsonl", Document))
    with pytest.raises(ValueError, match=r"\.jsonl"):
        write_records(tmp_path / "x.csv", [])


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.jsonl"
    write_records(path, RECORDS)
    before = path.read_bytes()

    def broken():
        yield RECORDS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_records(path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_problem_and_chat(tmp_path):
    problem = Problem(id="q", prompt=[1, 2], answer="3", kind="number")
    chat = Chat(id="c", messages=[{"role": "user", "content": "hi"}])
    write_records(tmp_path / "p.jsonl", [problem])
    write_records(tmp_path / "c.jsonl", [chat])
    assert list(read_records(tmp_path / "p.jsonl", Problem)) == [problem]
    assert list(read_records(tmp_path / "c.jsonl", Chat)) == [chat]
