"""Every family's problems: exact solutions, disjoint splits, wording, unanswerable variants.

Run: pytest tests/synth/test_procedural.py.
"""

import random
import re
from fractions import Fraction

import pytest

from phiforge.core.records import Problem
from phiforge.synth.procedural import (
    FAMILIES,
    NANO_FAMILIES,
    generate,
    split_of,
)
from phiforge.synth.procedural.days import WEEK
from phiforge.synth.procedural.family import tell
from phiforge.synth.procedural.words import BOXES, GOODS, NAMES, THINGS
from phiforge.synth.worksheets import estimate_tokens
from phiforge.verify.answers import extract_answer, is_correct, is_refusal

EVERY = [(name, level) for name, f in FAMILIES.items() for level in range(1, f.levels + 1)]
NUMERIC = re.compile(r"(?:[A-Z][a-z]+ \d+: )?([\d.+*/-]+)=([\d./]+)")


def value(expression: str) -> Fraction:
    """Exact value of numbers joined by + - * / with the usual precedence."""
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[+-])([^+-]+)", expression):
        product = Fraction(1)
        for way, number in re.findall(r"(^|[*/])([^*/]+)", term):
            product = product / Fraction(number) if way == "/" else product * Fraction(number)
        total += -product if sign == "-" else product
    return total


def test_there_are_sixteen_families_over_four_fields():
    fields = {}
    for family in FAMILIES.values():
        fields.setdefault(family.field, []).append(family.name)
    assert set(fields) == {"mathematics", "finance", "engineering", "logic"}
    assert all(len(names) == 4 for names in fields.values())
    assert {FAMILIES[name].field for name in NANO_FAMILIES} == set(fields)


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_solutions_are_exact_and_end_alike(name, level):
    checked = 0
    for item in generate(name, level, "train", seed=3, count=150):
        problem = Problem(id="x", prompt=item.question, answer=item.answer, kind=item.kind)
        styles = [item.worked, item.terse, *([item.skipping] if item.skipping else [])]
        for text in styles:
            assert text.splitlines()[-1] == f"Answer: {item.answer}"
            assert extract_answer(text) == item.answer
            assert is_correct(problem, text)
            assert not is_refusal(text)
        assert item.terse == f"Answer: {item.answer}"
        for line in item.worked.splitlines():
            if "=" in line:
                match = NUMERIC.fullmatch(line)
                assert match, line
                assert value(match.group(1)) == value(match.group(2)), line
                checked += 1
        assert not re.search(r"\d [-+*/=]|[-+*/=] \d", item.worked), "spaces cost tokens"
    assert checked or FAMILIES[name].field == "logic"


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_bogus_variants_differ_and_are_refused(name, level):
    bogus = 0
    for item in generate(name, level, "train", seed=5, count=100):
        assert (item.bogus_question is None) == (item.refusal is None)
        if item.bogus_question is None:
            continue
        bogus += 1
        assert item.bogus_question != item.question
        assert "{" not in item.question + item.bogus_question
        assert item.refusal is not None
        assert is_refusal(item.refusal)
        assert extract_answer(item.refusal) is None
        assert item.refusal.startswith("I cannot answer this: ")
    assert bogus >= 40


@pytest.mark.parametrize("name", list(FAMILIES))
def test_item_is_a_function_of_its_index(name):
    level = FAMILIES[name].levels
    items = list(generate(name, level, "train", seed=1, count=20))
    assert items == list(generate(name, level, "train", seed=1, count=20))
    assert items[7:12] == list(generate(name, level, "train", seed=1, count=5, start=7))
    assert items != list(generate(name, level, "train", seed=2, count=20))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_no_key_is_in_both_splits(name):
    keys = {"train": set(), "test": set()}
    for split, count in (("train", 600), ("test", 150)):
        for level in range(1, FAMILIES[name].levels + 1):
            keys[split] |= {i.key for i in generate(name, level, split, seed=0, count=count)}
    assert not keys["train"] & keys["test"]
    assert all(split_of(key) == split for split in keys for key in keys[split])


def test_ten_thousand_draws_share_no_key_and_the_test_share_is_a_tenth():
    family = FAMILIES["stories"]
    rng = random.Random(0)
    keys = [f"stories:{family.generate(rng, 1).key}" for _ in range(10_000)]
    share = sum(split_of(key) == "test" for key in keys) / len(keys)
    assert 0.08 < share < 0.12
    train = {item.key for item in generate("stories", 1, "train", seed=0, count=10_000)}
    test = {item.key for item in generate("stories", 1, "test", seed=0, count=1_000)}
    assert not train & test


@pytest.mark.parametrize("name", list(FAMILIES))
def test_wording_varies(name):
    """At least five wordings per family: questions without their numbers, names and values."""
    drawn = "|".join(("red|blue|green", *NAMES, *THINGS, *GOODS, *BOXES, *WEEK))
    frames = set()
    for item in generate(name, 1, "train", seed=0, count=200):
        words = re.sub(rf"\b(?:\d+|[A-Z]|{drawn})(?:s|es)?\b", "_", item.question).split()
        frames.add((*words[:3], *words[-6:]))
    assert len(frames) >= 5


@pytest.mark.parametrize("name", NANO_FAMILIES)
def test_nano_families_are_small_and_many(name):
    items = list(generate(name, 1, "train", seed=0, count=3_000))
    numbers = [int(n) for item in items for n in re.findall(r"\d+", item.question + item.worked)]
    assert max(numbers) < 60
    questions = sorted(estimate_tokens(item.question) for item in items)
    worked = sorted(estimate_tokens(item.worked) for item in items)
    assert questions[len(items) // 2] <= 40
    assert questions[int(len(items) * 0.95)] <= 48
    assert worked[int(len(items) * 0.99)] <= 40
    # Collisions among n draws estimate the pool: n * n / 2 / pool of them are expected.
    collisions = len(items) - len({item.key for item in items})
    assert collisions < 3_000 * 3_000 / 2 / 7_000


def test_wrong_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"stories"):
        list(generate("storys", 1, "train", 0, 1))
    with pytest.raises(ValueError, match=r"allowed is 1\.\.3"):
        list(generate("stories", 4, "train", 0, 1))
    with pytest.raises(ValueError, match="split"):
        list(generate("stories", 1, "dev", 0, 1))  # type: ignore[arg-type]


def test_tell_hides_only_what_the_wording_has():
    rng = random.Random(0)
    told = tell(rng, ["{a} and {b}"], {"a": 1, "b": 2, "c": 3}, {"b": "b is not given", "c": "no"})
    assert told.question == "1 and 2"
    assert told.bogus.startswith("1 and ")
    assert not told.bogus.endswith("2")
    assert told.refusal == "I cannot answer this: b is not given."
