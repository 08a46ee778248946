"""Recall and copying tasks: solvable, as long as asked for, reproducible.

Run: pytest tests/synth/test_recall.py.
"""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiforge.synth.procedural.drills import drill_document
from phiforge.synth.procedural.recall import (
    PLAIN_KEYS,
    VALUES,
    copy_document,
    fit_copy,
    fit_needle,
    fit_recall,
    make_copy,
    make_needle,
    make_recall,
    needle_document,
    recall_document,
)
from phiforge.synth.worksheets import estimate_tokens


def looked_up(prompt: str) -> str:
    *lines, query = prompt.splitlines()
    pairs = dict(line.removeprefix("key ").split(": ") for line in lines)
    assert len(pairs) == len(lines), "keys repeat"
    return pairs[query.removeprefix("key ").removesuffix("?")]


@given(st.integers(1, 400), st.integers())
def test_the_answer_is_in_the_list(num, seed):
    task = make_recall(random.Random(seed), num)
    assert task.prompt.count("\n") == num
    assert looked_up(task.prompt) == task.answer


def test_depth_chooses_the_pair():
    for depth, line in ((0, 0), (1, -1), (0.5, 5)):
        task = make_recall(random.Random(0), 11, depth)
        asked = task.prompt.splitlines()[-1].removesuffix("?")
        assert task.prompt.splitlines()[:-1][line].startswith(f"{asked}:")
    with pytest.raises(ValueError, match="depth"):
        make_recall(random.Random(0), 3, 2.0)
    with pytest.raises(ValueError, match="num_pairs"):
        make_recall(random.Random(0), 0)


def test_values_and_keys_can_be_told_apart():
    assert len(set(PLAIN_KEYS)) == len(PLAIN_KEYS)
    assert not set(VALUES) & set(PLAIN_KEYS)
    assert not [(a, b) for a in VALUES for b in VALUES if a != b and b.startswith(a)]


@pytest.mark.parametrize("length", [estimate_tokens, len])
@pytest.mark.parametrize("max_tokens", [64, 128, 512, 1024, 4096])
def test_fit_fills_the_room(length, max_tokens):
    for fit in (fit_recall, fit_copy):
        task = fit(random.Random(4), length, max_tokens)
        used = length(f"{task.prompt} {task.answer}\n")
        assert 0.75 * max_tokens < used <= max_tokens
        assert task == fit(random.Random(4), length, max_tokens)


def test_nothing_fits():
    with pytest.raises(ValueError, match="too few"):
        fit_recall(random.Random(0), estimate_tokens, 5)


def test_copy_repeats_the_line():
    task = make_copy(random.Random(0), 30)
    assert task.prompt == f"list: {task.answer}\ncopy:"
    assert len(set(task.answer.split())) == 30
    text = copy_document(random.Random(0), estimate_tokens, 100)
    first, second, _ = text.split("\n")
    assert first.removeprefix("list:") == second.removeprefix("copy:")


@pytest.mark.parametrize("max_tokens", [64, 127, 511])
def test_recall_documents_answer_every_question(max_tokens):
    for seed in range(20):
        text = recall_document(random.Random(seed), estimate_tokens, max_tokens)
        assert estimate_tokens(text) <= max_tokens
        given_pairs = dict(line[4:].split(": ") for line in text.splitlines() if ":" in line)
        asked = [line[4:].split("? ") for line in text.splitlines() if "?" in line]
        assert asked
        assert all(given_pairs[key] == value for key, value in asked)


def test_drills_are_true_and_small():
    lines = drill_document(random.Random(1), 60, 2_000).splitlines()
    assert len(lines) == 2_000
    for line in lines:
        left, _, right = line.partition("=")
        assert eval(left) == int(right), line
        assert max(map(int, re.findall(r"\d+", line))) < 60
    assert {re.sub(r"\d+", "", line)[0] for line in lines} == set("+-*/")
    with pytest.raises(ValueError, match="below is 5"):
        drill_document(random.Random(0), 5, 1)


def test_needle_is_one_pair_among_arithmetic():
    task = make_needle(random.Random(3), 20, depth=0.5)
    lines = task.prompt.splitlines()
    pairs = [(i, line) for i, line in enumerate(lines) if line.endswith(task.answer)]
    assert len(lines) == 22
    assert pairs[0][0] == 10
    key = lines[-1].removesuffix("?")
    assert pairs[0][1] == f"{key}: {task.answer}"
    assert all(re.fullmatch(r"\d+[-+*/]\d+=\d+", line) for line in lines[:10] + lines[11:-1])
    with pytest.raises(ValueError, match="depth is 2"):
        make_needle(random.Random(0), 3, depth=2)
    with pytest.raises(ValueError, match="num_lines is -1"):
        make_needle(random.Random(0), -1)


@given(st.integers(0, 1000), st.integers(30, 600))
def test_needles_fit_and_fill(seed, room):
    task = fit_needle(random.Random(seed), estimate_tokens, room)
    used = estimate_tokens(f"{task.prompt} {task.answer}\n")
    assert room - 6 <= used <= room


@given(st.integers(0, 1000), st.integers(40, 600))
def test_needle_documents_answer_their_questions(seed, room):
    text = needle_document(random.Random(seed), estimate_tokens, room)
    (value,) = {line.split(": ")[1] for line in text.splitlines() if ": " in line}
    asked = [line for line in text.splitlines() if "?" in line]
    assert all(line.endswith(f"? {value}") for line in asked)
    assert estimate_tokens(text) <= max(room, 16 + 18)
    assert text == needle_document(random.Random(seed), estimate_tokens, room)
