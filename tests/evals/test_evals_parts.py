"""Asking, grading, prompts, recall tasks, bits per byte and scores, each on its own."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_run import CONTEXT, model, problems, tokenizer

from phiforge.core.records import Problem
from phiforge.core.stats import mcnemar, wilson
from phiforge.evals import ask, scores
from phiforge.evals.bits import bits_per_byte
from phiforge.evals.longcontext import context_questions, longest_answer
from phiforge.evals.prompts import chat_questions, choose_problems, few_shot_questions, read_shots
from phiforge.inference.interface import Completion


class Scripted:
    """A Generator that says what it is told, prompt by prompt."""

    def __init__(self, answers: dict[str, str]):
        self.answers, self.tokenizer, self.calls = answers, tokenizer(), 0

    def generate(self, prompts: Sequence[Any], *, n: int = 1, **_: Any) -> list[list[Completion]]:
        self.calls += 1
        texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        return [[Completion(self.answers[t], (1, 2), None, "stop")] * n for t in texts]

    def score(self, prompts: Any, completions: Any) -> Any:
        raise AssertionError("not asked for")


def _problem(name: str, answer: str | None, kind: str = "number") -> Problem:
    return Problem(id=name, prompt=name, answer=answer, kind=kind, metadata={"family": "f"})


def test_all_questions_go_in_one_call_and_are_graded() -> None:
    engine = Scripted({"a": "2+2=4\nAnswer: 4", "b": "I cannot answer this: no number.", "c": "x"})
    asked = chat_questions([_problem("a", "4"), _problem("b", None, "refusal"), _problem("c", "1")])
    rows = ask.ask(engine, asked, checkpoint="sft", temperature=0.0, max_tokens=9)
    assert engine.calls == 1
    assert [(t.correct, t.refused) for t in rows] == [(True, False), (True, True), (False, False)]
    assert ask.ask(engine, [], checkpoint="sft", temperature=0.0, max_tokens=9) == []


def test_expected_beginning_replaces_the_grader() -> None:
    question = ask.Question(
        suite="recall", problem=_problem("p", "amber", "text"), prompt="p", expected="amber"
    )
    assert ask.grade(question, " amber\nkey 4")
    assert not ask.grade(question, " key amber")


def test_transcripts_come_back_as_written(tmp_path: Path) -> None:
    rows = [_transcript("a", 1, True), _transcript("a", 2, False, text="é <b>\n")]
    path = tmp_path / "transcripts" / "a.jsonl"
    assert ask.write(path, rows) == 2
    assert ask.read(path) == rows
    path.write_text('{"checkpoint": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not a transcript"):
        ask.read(path)


def test_few_shot_prompts_take_as_many_examples_as_fit(tmp_path: Path) -> None:
    from phiforge.core.records import write_records

    write_records(tmp_path / "train.jsonl", problems("train", 3))
    shots = read_shots(tmp_path / "train.jsonl", 2)
    assert {name: len(found) for name, found in shots.items()} == {"stories": 2, "ordering": 2}
    asked = problems("test", 2)
    questions, count = few_shot_questions(asked, shots, tokenizer(), 10_000)
    assert count == 2
    assert str(questions[0].prompt).startswith(f"Question: {shots['stories'][0][0]}\nSolution:\n")
    assert str(questions[0].prompt).endswith(f"Question: {asked[0].prompt}\nSolution:\n")
    size = max(len(tokenizer().encode(str(q.prompt))) for q in questions)
    assert few_shot_questions(asked, shots, tokenizer(), size - 1)[1] == 1
    with pytest.raises(ValueError, match="lower max_tokens"):
        few_shot_questions(asked, shots, tokenizer(), 5)


def test_problems_are_the_first_of_each_family_and_variant(tmp_path: Path) -> None:
    from phiforge.core.records import write_records

    path = tmp_path / "test.jsonl"
    write_records(path, problems("test", 4, 2))
    chosen = choose_problems(path, 3, 1)
    assert [p.id.split("/")[-1] for p in chosen] == ["0", "1", "2", "4"] * 2
    with pytest.raises(ValueError, match="no problem to ask"):
        choose_problems(path, 0, 0)


def test_context_questions_fill_their_length_at_all_depths() -> None:
    questions = context_questions(
        tokenizer(), context=CONTEXT, lengths=(1, 4), num=3, seed=0, tasks=("recall", "copy")
    )
    assert len(questions) == 12
    assert len({q.problem.id for q in questions}) == 12
    for question in questions:
        length = question.problem.metadata["length"]
        text = f"{question.prompt} {question.expected}\n"
        tokens = len(tokenizer().encode(text))
        assert 0.6 * CONTEXT * length < tokens <= CONTEXT * length
    assert [q.problem.metadata["depth"] for q in questions[:3]] == [0.0, 0.5, 1.0]
    first, last = str(questions[3].prompt).splitlines(), str(questions[5].prompt).splitlines()
    assert first[0].split(":")[0] + "?" == first[-1]
    assert last[-2].split(":")[0] + "?" == last[-1]
    copies = [q for q in questions if q.suite == "copy"]
    assert longest_answer(tokenizer(), copies) >= max(
        len(tokenizer().encode(f" {q.expected}\n")) for q in copies
    )


def test_chat_recall_is_asked_in_a_message_and_graded_by_its_answer_line() -> None:
    (question,) = context_questions(
        tokenizer(), context=CONTEXT, lengths=(2,), num=1, seed=0, chat=True
    )
    messages: Any = question.prompt
    assert len(tokenizer().encode_chat(messages, add_generation_prompt=True)) < 2 * CONTEXT
    assert ask.grade(question, f"Answer: {question.problem.answer}")
    assert not ask.grade(question, "Answer: nothing")


def test_bits_per_byte_in_windows_is_the_plain_sum_when_one_window_holds_all() -> None:
    phi, words = model(64), tokenizer()
    documents = [words.encode("The first text is about tea."), words.encode("rain and snow")]
    found = bits_per_byte(phi, words, documents, context=64)
    nats = size = 0.0
    for ids in documents:
        logits_btv = phi(torch.tensor([ids[:-1]]))
        nats += F.cross_entropy(logits_btv[0], torch.tensor(ids[1:]), reduction="sum").item()
        size += len(words.decode(ids[1:]).encode())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.num_bytes == size
    assert found.num_tokens == sum(map(len, documents)) - 2
    assert bits_per_byte(phi, words, documents[:1], context=64).low is None


@pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 13, 16, 17, 30])
def test_windows_score_every_token_but_the_first_once(length: int) -> None:
    from phiforge.evals.bits import _windows

    ids, context = list(range(length)), 8
    scored = []
    for window in _windows(0, ids, context):
        assert len(window.token_ids) <= context + 1
        scored += window.token_ids[window.given + 1 :]
        # All but the first window's tokens see at least half a context.
        assert window.token_ids[0] == 0 or window.given >= context // 2 - 1
    assert scored == ids[1:]


def test_bits_per_byte_without_text_says_so() -> None:
    with pytest.raises(ValueError, match="no held-out text"):
        bits_per_byte(model(64), tokenizer(), [[], [5]], context=8)


def _transcript(
    checkpoint: str, i: int, correct: bool, *, suite: str = "problems", refused: bool = False,
    family: str = "f", temperature: float = 0.0, sample: int = 0, text: str = "",
) -> ask.Transcript:  # fmt: skip
    return ask.Transcript(
        checkpoint=checkpoint, suite=suite, id=f"{suite}/{family}/{i}", prompt="p", response=text,
        answer="4", correct=correct, refused=refused, temperature=temperature, sample=sample,
        finish_reason="stop", prompt_tokens=3, response_tokens=2,
        metadata={"family": family, "length": 2.0},
    )  # fmt: skip


def test_accuracy_by_family_with_wilson_intervals() -> None:
    rows = [_transcript("a", i, i < 3, family="f") for i in range(4)]
    rows += [_transcript("a", i, False, family="g") for i in range(2)]
    cells = scores.accuracy(rows)
    assert [(c["family"], c["k"], c["n"]) for c in cells] == [
        ("all", 3, 6),
        ("f", 3, 4),
        ("g", 0, 2),
    ]
    interval = wilson(3, 6)
    assert (cells[0]["low"], cells[0]["high"]) == (interval.low, interval.high)


def test_repeated_samples_are_clustered_by_problem() -> None:
    rows = [_transcript("a", i, i < 5, sample=s) for i in range(10) for s in range(8)]
    (cell,) = scores.accuracy(rows)
    assert (cell["n"], cell["problems"]) == (80, 10)
    # Samples of a problem all agree: the interval is that of 10 answers, not of 80.
    assert cell["high"] - cell["low"] > 1.5 * (wilson(40, 80).high - wilson(40, 80).low)


def test_comparisons_are_paired_and_corrected() -> None:
    first = [_transcript("sft", i, i % 2 == 0) for i in range(40)]
    second = [replace(t, checkpoint="dpo", correct=i % 8 != 1) for i, t in enumerate(first)]
    other = [_transcript(c, i, False, suite="bogus", refused=c == "dpo") for c in ("sft", "dpo")
             for i in range(12)]  # fmt: skip
    rows = scores.comparisons([*first, *second, *other], ["sft", "dpo"], seed=0)
    (test,) = [row for row in rows if row["measure"] == "accuracy"]
    expected = mcnemar([t.correct for t in first], [t.correct for t in second])
    assert test["difference"] == expected.difference > 0
    assert (test["p_value"], test["gained"], test["lost"]) == (expected.p_value, 15, 0)
    bogus = [row for row in rows if row.get("asked") == "bogus"]
    assert [(row["difference"], row["n"]) for row in bogus] == [(1.0, 12)]
    assert all(row["p_holm"] >= row["p_value"] for row in rows)


def test_comparison_uses_only_questions_both_answered() -> None:
    rows = [_transcript("a", i, True) for i in range(5)]
    rows += [_transcript("b", i, True) for i in range(3, 9)]
    (test,) = [r for r in scores.comparisons(rows, ["a", "b"], 0) if r["measure"] == "accuracy"]
    assert test["n"] == 2


def test_comparison_of_repeated_samples_is_a_bootstrap_over_problems() -> None:
    rows = [
        _transcript(c, i, (i + s) % 4 < (1 if c == "a" else 3), sample=s)
        for c in ("a", "b")
        for i in range(20)
        for s in range(4)
    ]
    (test,) = [r for r in scores.comparisons(rows, ["a", "b"], 0) if r["measure"] == "accuracy"]
    assert test["n"] == 20
    assert test["difference"] == pytest.approx(0.5)
    assert test["p_value"] < 0.01


def test_refusals_count_the_lowest_temperature_alone() -> None:
    rows = [_transcript("a", i, False, suite="bogus", refused=i < 2) for i in range(3)]
    for t in (0.0, 1.0):
        rows += [_transcript("a", i, True, temperature=t, refused=t > 0) for i in range(3)]
    cells = {row["asked"]: (row["k"], row["n"]) for row in scores.refusals(rows)}
    assert cells == {"bogus": (2, 3), "answerable": (0, 3)}
