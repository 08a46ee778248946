"""Questions of a search: columns of files and data sets, presets, prompts, think tags.

Run: pytest tests/posttrain/test_pivotal_inputs.py.
"""

import json

import pyarrow
import pyarrow.parquet
import pytest

from phiforge.core.records import Problem
from phiforge.data.benchmarks import BENCHMARKS
from phiforge.model.tokenizer import train_tokenizer
from phiforge.posttrain.pivotal.inputs import (
    THINK,
    as_prompts,
    preset_instruction,
    read_problems,
    response_text,
)
from phiforge.posttrain.pivotal.oracles import open_oracle

ROWS = [
    {"uid": "a", "q": "1+1?", "gold": {"value": 2}, "topic": "sum"},
    {"uid": "b", "q": "2/4?", "gold": {"value": 0.5}, "topic": "quotient"},
    {"uid": "c", "q": "x?", "gold": {"value": None}, "topic": None},
]
COLUMNS = {"prompt": "q", "answer": "gold.value", "id": "uid", "kind": "number"}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
def test_chosen_columns(tmp_path, name):
    problems = read_problems(write(tmp_path / name, ROWS), **COLUMNS)
    assert [(p.id, p.prompt, p.answer) for p in problems] == [
        ("a", "1+1?", "2"),
        ("b", "2/4?", "0.5"),
        ("c", "x?", None),
    ]
    assert problems[0].metadata == {"topic": "sum"}
    assert {p.kind for p in problems} == {"number"}
    assert len(read_problems(tmp_path / name, **COLUMNS, limit=2)) == 2


def test_our_own_problems_and_other_prompts(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {
            "id": 7,
            "prompt": chat,
            "answer": ["4"],
            "kind": "choice",
            "metadata": {"options": ["x"]},
        },
        {"id": "t", "prompt": [5, 6], "answer": True},
        {"prompt": "no id", "answer": "x"},
    ]
    found = read_problems(write(tmp_path / "p.jsonl", rows))
    assert [p.id for p in found] == ["7", "t", "row/2"]
    assert [p.prompt for p in found] == [chat, [5, 6], "no id"]
    assert [p.answer for p in found] == ["4", "true", "x"]
    assert found[0].kind == "choice"
    assert found[0].metadata == {"options": ["x"]}


def test_a_folder_and_its_splits(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "1", "id": "a"}])
    write(tmp_path / "test.jsonl", [{"prompt": "b", "answer": "1", "id": "b"}])
    assert [p.id for p in read_problems(tmp_path)] == ["b", "a"]
    assert [p.id for p in read_problems(tmp_path, split="train")] == ["a"]
    with pytest.raises(ValueError, match=r"no file of split 'dev'; there are: test.jsonl, train"):
        read_problems(tmp_path, split="dev")


def test_code_needs_no_answer_column(tmp_path):
    row = {"id": "f", "prompt": "square", "tests": [{"stdin": "2", "expected": "4"}]}
    found = read_problems(write(tmp_path / "c.jsonl", [row]), kind="code")
    assert found[0].answer is None
    assert found[0].metadata["tests"] == row["tests"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"promt": "a", "answer": "1"}],
            {},
            r"1: no column 'prompt'.*mean 'promt'.*: promt, answer",
        ),
        ([{"prompt": "a", "target": "1"}], {}, "no column 'answer' for answer; there are: prompt"),
        ([{"prompt": "a", "answer": "1"}], {"id": "uid"}, "no column 'uid' for id"),
        ([{"prompt": "a", "answer": "1"}], {"answer": "a.b"}, "no column 'a.b'"),
        ([{"prompt": " ", "answer": "1"}], {}, "a prompt is a text"),
        ([{"prompt": [1.5], "answer": "1"}], {}, "a prompt is a text"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], {}, "a prompt is a text"),
        ([{"prompt": "a", "answer": ["1", "2"]}], {}, "an answer is one text"),
        ([{"prompt": "a", "answer": "1", "id": 1}] * 2, {}, r"2: id '1' is there twice"),
        ([["a"]], {}, "expected a JSON object"),
        ([], {}, "no row in it"),
        ([{"prompt": "a", "answer": "1"}], {"limit": 0}, "limit is 0"),
        ([{"prompt": "a", "answer": "1"}], {"preset": "gsm8"}, "did you mean 'gsm8k'"),
        ([{"question": "a"}], {"preset": "gsm8k", "prompt": "q"}, "prompt: has no effect"),
        ([{"question": "a"}], {"preset": "gsm8k"}, "column 'answer' is missing"),
        ([{"prompt": "a", "answer": "1"}], {"revision": "main"}, "no effect on files"),
    ],
)
def test_mistakes(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        read_problems(write(tmp_path / "q.jsonl", rows), **options)


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_problems(tmp_path / "none.jsonl")


def test_a_preset(tmp_path):
    row = {"question": "1+1?", "answer": "it is\n#### 2"}
    found = read_problems(write(tmp_path / "test.jsonl", [row]), preset="gsm8k")
    assert (found[0].prompt, found[0].answer, found[0].kind) == ("1+1?", "2", "number")
    assert found[0].metadata["split"] == "test"


# ----------------------------------------------------------------------------------- data sets


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}])
    table.save_to_disk(str(tmp_path / "one"))
    assert read_problems(tmp_path / "one")[0].prompt == "a"
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "two"))
    assert read_problems(tmp_path / "two", split="test")[0].prompt == "a"
    with pytest.raises(ValueError, match=r"no split 'train'; there are: test"):
        read_problems(tmp_path / "two")


def test_a_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, subset, **options):
        asked.append((name, subset, options["split"], options["revision"]))
        return iter([{"question": "1+1?", "answer": "#### 2"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_problems(
        "openai/gsm8k", preset="gsm8k", subset="main", split="test", revision="abc", limit=1
    )
    assert asked == [("openai/gsm8k", "main", "test", "abc")]
    assert [p.id for p in found] == ["gsm8k/test/1"]

    def fail(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="no data set that can be loaded"):
        read_problems("no/such")


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"phiforge\[hub\]"):
        read_problems("openai/gsm8k")


# ------------------------------------------------------------------------------------- prompts

TEXT = Problem(id="t", prompt=r"What is {x} in \boxed{}?", answer="1")
CHAT = Problem(id="c", prompt=[{"role": "user", "content": "hi"}], answer="1")


def only(problem, **options):
    return as_prompts([problem], **options)[0]


def test_chat_and_text():
    asked = only(TEXT, system="Be brief.", instruction=r"Use \boxed{}.")
    assert asked.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TEXT.prompt + "\n\nUse \\boxed{}."},
    ]
    assert asked.metadata == {"prompt_format": "chat", "question": TEXT.prompt}
    raw = only(TEXT, format="text", template="Q: {prompt}\nAnswer: {")
    assert raw.prompt == f"Q: {TEXT.prompt}\nAnswer: {{"
    assert raw.metadata["prompt_format"] == "text"
    assert TEXT.metadata == {}
    assert only(CHAT, system="S").prompt == [{"role": "system", "content": "S"}, *CHAT.prompt]
    own = [{"role": "system", "content": "own"}, *CHAT.prompt]
    assert only(Problem(id="o", prompt=own), system="S").prompt == own
    assert only(Problem(id="i", prompt=[1, 2])).prompt == [1, 2]


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        (TEXT, {"format": "xml"}, "format is 'xml'"),
        (TEXT, {"think": "on"}, "think is 'on'"),
        (TEXT, {"think": "open"}, "think needs tokenizer"),
        (TEXT, {"template": "Q: {question}"}, "place for"),
        (TEXT, {"format": "text", "system": "S"}, "system needs format 'chat'"),
        (CHAT, {"format": "text"}, "needs a text, not messages"),
        (CHAT, {"instruction": "brief"}, "need a text"),
    ],
)
def test_what_does_not_go_together(problem, options, message):
    with pytest.raises(ValueError, match=message):
        only(problem, **options)


def test_presets_ask_for_the_form_their_oracle_reads():
    for name, benchmark in BENCHMARKS.items():
        assert preset_instruction(name, "chat") == benchmark.instruction
        assert preset_instruction(name, "text") is None
        assert benchmark.oracle in ("number", "math", "code")
    assert r"\boxed{}" in (preset_instruction("gsm8k", "chat") or "")


# ----------------------------------------------------------------------------------- think tags


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["<think>\nwell, 1+1 is 2\n</think>\n\nAnswer: 2"] * 4
    return train_tokenizer(texts, vocab_size=380)


class SpecialTags:
    """A tokenizer to which the tags are special tokens, as some reasoning models have it."""

    def __init__(self, plain):
        self.plain, self.tags = plain, {9001: "<think>", 9002: "</think>"}

    def encode(self, text, allow_special=False):
        for index, tag in self.tags.items():
            if allow_special and tag in text:
                before, _, after = text.partition(tag)
                return [*self.encode(before), index, *self.encode(after, True)]
        return self.plain.encode(text) if text else []

    def encode_chat(self, messages, add_generation_prompt=False):
        return self.plain.encode_chat(messages, add_generation_prompt=add_generation_prompt)

    def decode(self, ids, skip_special=True):
        pieces = []
        for index in ids:
            if index not in self.tags:
                pieces.append(self.plain.decode([index], skip_special=skip_special))
            elif not skip_special:
                pieces.append(self.tags[index])
        return "".join(pieces)


@pytest.mark.parametrize("think", THINK)
@pytest.mark.parametrize("special", [False, True])
def test_think_tags_follow_the_template(tokenizer, think, special):
    used = SpecialTags(tokenizer) if special else tokenizer
    plain = tokenizer.encode_chat(CHAT.prompt, add_generation_prompt=True)
    asked = only(CHAT, think=think, tokenizer=used).prompt
    assert asked[: len(plain)] == plain
    assert used.decode(asked[len(plain) :], skip_special=False) == THINK[think]
    assert (9001 in asked) == special
    text = only(TEXT, format="text", think=think, tokenizer=used).prompt
    assert used.decode(text, skip_special=False) == TEXT.prompt + THINK[think]


def test_a_template_that_opens_think_is_not_repeated(tokenizer):
    opened = Problem(id="o", prompt="Q\n<think>\n")
    asked = only(opened, format="text", think="open", tokenizer=tokenizer).prompt
    assert tokenizer.decode(asked) == "Q\n<think>\n"
    closed = only(opened, format="text", think="closed", tokenizer=tokenizer).prompt
    assert tokenizer.decode(closed).count("<think>") == 1
    assert tokenizer.decode(closed).endswith("</think>\n\n")


@pytest.mark.parametrize("special", [False, True])
def test_the_oracle_reads_what_comes_after_the_thoughts(tokenizer, special):
    used = SpecialTags(tokenizer) if special else tokenizer
    drawn = used.encode("Answer: 3?\n</think>\n\nAnswer: 2", allow_special=True)
    assert (9002 in drawn) == special
    text = response_text(used, drawn)
    assert text == "Answer: 3?\n</think>\n\nAnswer: 2"
    with open_oracle("exact", thinking="opened") as oracle:
        two = Problem(id="two", prompt="1+1?", answer="2", kind="number")
        assert oracle(two, text) is True
        assert oracle(two, response_text(used, drawn[: len(drawn) // 3])) is False
    stop = sorted(tokenizer.stop_ids)[0]
    assert response_text(used, [*drawn, stop]) == text
