"""The synthesize stage: files, shares, lengths, lineage, and the same bytes whatever the workers.

Run: pytest tests/synth/test_synthesize.py.
"""

import itertools
import random
from collections import Counter

import pytest

from phiforge.core.config import Exec
from phiforge.core.records import Chat, Document, Problem, read_records
from phiforge.core.store import StageDir
from phiforge.synth import synthesize
from phiforge.synth.procedural import NANO_FAMILIES, generate
from phiforge.synth.synthesize import SynthesizeConfig, problems_of, run
from phiforge.synth.worksheets import (
    choose_style,
    entry,
    estimate_tokens,
    few_shot_prompt,
    fill,
    solution,
)
from phiforge.verify.answers import is_correct

FILES = ("documents", "long_documents", "chats", "problems_train", "problems_test")
SMALL = {
    "families": {name: {"levels": [1], "count": 60} for name in NANO_FAMILIES},
    "recall": {
        "documents": 20,
        "copies": 10,
        "long_documents": 10,
        "long_copies": 10,
        "long_worksheets": 10,
    },
    "chats": {"per_family": 100, "recall": 5, "identity": 5},
    "train_count": 20,
    "test_count": 20,
    "test_bogus_count": 5,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthesize")
    metrics = run(SynthesizeConfig(**SMALL), {}, StageDir.scratch(folder, Exec(workers=1)))
    return folder, metrics


def documents(folder, name):
    return list(read_records(folder / f"{name}.jsonl", Document))


def test_same_bytes_whatever_the_workers(made, tmp_path):
    run(SynthesizeConfig(**SMALL), {}, StageDir.scratch(tmp_path, Exec(workers=2)))
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (made[0] / f"{name}.jsonl").read_bytes()


def test_another_seed_gives_other_problems(made):
    config = SynthesizeConfig(**SMALL, seed=1)
    before = {p.prompt for p in read_records(made[0] / "problems_test.jsonl", Problem)}
    assert len(before & {p.prompt for p in problems_of(config, "test")}) < len(before) / 4


def test_documents_fit_the_context_and_hold_all_problems(made):
    found = documents(made[0], "documents")
    assert all(estimate_tokens(d.text) < 128 for d in found)
    assert {d.metadata["source"] for d in found} == {"problems", "recall"}
    problems = [d for d in found if d.metadata["source"] == "problems"]
    assert sum(d.metadata["problems"] for d in problems) == 240
    assert sum(d.text.count("Question: ") for d in problems) == 240
    assert len({d.id for d in found}) == len(found)


def test_worksheets_can_be_made_again_from_their_lineage(made):
    for document in documents(made[0], "documents")[:40]:
        meta = document.metadata
        items = generate(
            meta["family"],
            meta["level"],
            "train",
            meta["seed"],
            meta["problems"],
            meta["first_index"],
        )
        parts = [
            entry(i.question, solution(i, s)) for i, s in zip(items, meta["styles"], strict=True)
        ]
        assert "".join(parts) == document.text


def test_long_documents_are_beyond_twice_the_context(made):
    found = documents(made[0], "long_documents")
    assert len(found) == 30
    assert Counter(d.metadata["task"] for d in found) == {"recall": 10, "copy": 10, "worksheet": 10}
    assert all(d.metadata["source"] == "long" for d in found)
    lengths = [estimate_tokens(d.text) for d in found]
    assert min(lengths) > 2 * 128
    assert max(lengths) < 4 * 128
    assert max(lengths) > 3.9 * 128


def test_chats_hold_the_shares(made):
    chats = list(read_records(made[0] / "chats.jsonl", Chat))
    styles = Counter(c.metadata["style"] for c in chats)
    assert sum(styles.values()) == 410
    assert 30 <= styles["refusal"] <= 90
    assert styles["worked"] > styles["terse"] > 100
    assert styles["recall"] == styles["identity"] == 5
    for chat in chats:
        assert [m["role"] for m in chat.messages] == ["user", "assistant"]
        refuses = chat.messages[1]["content"].startswith("I cannot answer this: ")
        assert refuses == (chat.metadata["style"] == "refusal")
    assert any("phiforge nano" in c.messages[1]["content"] for c in chats)


def test_problems_are_checkable_and_splits_disjoint(made):
    splits = {
        s: list(read_records(made[0] / f"problems_{s}.jsonl", Problem)) for s in ("train", "test")
    }
    keys = {s: {p.metadata["key"] for p in problems} for s, problems in splits.items()}
    assert len(keys["test"]) == len(splits["test"]) == 4 * 25
    assert len(keys["train"]) == len(splits["train"]) == 4 * 20
    assert not keys["train"] & keys["test"]
    for problem in splits["test"]:
        assert problem.metadata["split"] == "test"
        bogus = problem.metadata["variant"] == "bogus"
        assert bogus == (problem.kind == "refusal") == (problem.answer is None)
        right = problem.metadata["refusal" if bogus else "worked"]
        assert is_correct(problem, right)
        assert not is_correct(problem, "Answer: 123456 of nothing")


def test_train_keys_of_documents_are_not_tested(made):
    tested = {p.metadata["key"] for p in read_records(made[0] / "problems_test.jsonl", Problem)}
    for name in NANO_FAMILIES:
        assert not tested & {item.key for item in generate(name, 1, "train", 0, 60)}


def test_metrics_count_what_was_written(made):
    metrics = made[1]
    assert metrics["documents"]["records"] == len(documents(made[0], "documents"))
    assert metrics["documents"]["worked"] + metrics["documents"]["terse"] == 240
    assert metrics["documents"]["problems_tokens"] > 5_000
    assert metrics["problems_test"] == {"answerable": 80, "bogus": 20}


def test_levels_share_the_counts():
    plan = {"families": {"stories": {"levels": [1, 3], "count": 5}}, "test_count": 5}
    found = Counter(
        p.metadata["level"] for p in problems_of(SynthesizeConfig(**plan), "test") if p.answer
    )
    assert found == {1: 3, 3: 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worked_share": 0.9}, "must be 1"),
        ({"families": {"storys": {}}}, "did you mean: stories"),
        ({"families": {"stories": {"levels": [9]}}}, r"allowed is 1\.\.3"),
        ({"families": {"stories": {"count": -1}}}, "greater than or equal to 0"),
        ({"recal": {}}, "Extra inputs"),
    ],
)
def test_bad_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        SynthesizeConfig(**change)


def test_too_few_distinct_problems_is_an_error(monkeypatch):
    def three(family, level, split, seed, count, start=0):
        return generate(family, level, split, seed, count, start % 3)

    monkeypatch.setattr(synthesize, "generate", three)
    monkeypatch.setattr(synthesize, "MOST_REPEATS", 20)
    found = problems_of(SynthesizeConfig(families={"stories": {}}, test_count=4), "test")
    assert len(list(itertools.islice(found, 3))) == 3
    with pytest.raises(ValueError, match="distinct test problems"):
        next(found)


def test_fill_keeps_order_and_limits():
    entries = [entry(f"What is {n}?", f"Answer: {n}") for n in range(10)]
    groups = list(fill(entries, 40))
    assert [i for group in groups for i in group] == list(range(10))
    assert all(sum(estimate_tokens(entries[i]) for i in g) <= 40 for g in groups)
    assert list(fill(["a " * 99], 10)) == [[0]]


def test_few_shot_prompt_ends_where_the_answer_begins():
    prompt = few_shot_prompt([("1+1?", "Answer: 2")], "2+2?")
    assert prompt == "Question: 1+1?\nSolution:\nAnswer: 2\n\nQuestion: 2+2?\nSolution:\n"


def test_styles_are_drawn_by_share():
    rng = random.Random(0)
    drawn = Counter(
        choose_style(rng, {"worked": 0.5, "skipping": 0.2, "terse": 0.3}) for _ in range(4_000)
    )
    assert abs(drawn["skipping"] / 4_000 - 0.2) < 0.03
    item = next(generate("stories", 1, "train", 0, 1))
    assert solution(item, "skipping").splitlines()[0] == item.worked.splitlines()[0]
    with pytest.raises(ValueError, match="style"):
        solution(item, "long")
