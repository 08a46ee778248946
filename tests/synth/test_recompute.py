"""Answers recomputed from the question's text alone, by independent code.

Run: pytest tests/synth/test_recompute.py.
"""

import datetime
import itertools
import re
from fractions import Fraction

import pytest

from phiforge.synth.procedural import Item, generate


def items(name: str, level: int, count: int = 120) -> list[Item]:
    return list(generate(name, level, "test", seed=11, count=count))


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_equations_hold(level):
    for item in items("equations", level):
        left, right = re.search(r"(\S*x\S*)=([^\s?.]+)", item.question).groups()
        x = Fraction(int(item.answer))
        assert eval(left, {"x": x}) == eval(right, {"x": x}), item.question


@pytest.mark.parametrize("level", [1, 2])
def test_probability_counts(level):
    for item in items("probability", level):
        counts = dict(zip(("red", "blue", "green"), numbers(item.question)[:3], strict=True))
        colour = re.search(r"(red|blue|green)\?", item.question).group(1)
        share = Fraction(counts[colour], sum(counts.values()))
        assert Fraction(item.answer) == (1 - share if "not " in item.question else share)


def test_probability_of_two_by_enumeration():
    for item in items("probability", 3, 15):
        counts = dict(zip(("red", "blue", "green"), numbers(item.question)[:3], strict=True))
        colour = re.search(r"(red|blue|green)\?", item.question).group(1)
        balls = [c for c, n in counts.items() for _ in range(n)]
        pairs = list(itertools.permutations(balls, 2))
        hits = sum(a == b == colour for a, b in pairs)
        assert Fraction(item.answer) == Fraction(hits, len(pairs))


@pytest.mark.parametrize("level", [1, 2])
def test_circuits_in_series(level):
    for item in items("circuits", level):
        amperes = re.search(r"(\d+) amperes", item.question)
        volts = re.search(r"(\d+) volts", item.question)
        listed = re.search(r"((?:\d+, )*\d+ and \d+) ohms", item.question).group(1)
        ohms = sum(numbers(listed))
        if amperes is None:
            assert int(item.answer) * ohms == int(volts.group(1))
        else:
            extra = int(volts.group(1)) if volts else 0
            assert int(item.answer) == int(amperes.group(1)) * ohms + extra


@pytest.mark.parametrize("level", [1, 2, 3])
def test_ordering_has_one_solution(level):
    """The links of the sentences, followed from the told first, name the asked place."""
    after = re.compile(
        r"(?:Right after|Behind|Right of|After|Next below) (\w+) (?:is|comes|sits|plays) (\w+)"
    )
    before = re.compile(
        r"(?:Just before|Before|Left of|Just above) (\w+) (?:is|comes|sits|plays) (\w+)"
    )
    for item in items("ordering", level):
        follower = dict(after.findall(item.question))
        follower |= {a: b for b, a in before.findall(item.question)}
        name = re.search(r", (\w+)", item.question).group(1)
        for _ in range(numbers(item.question)[-1] - 1):
            name = follower[name]
        assert name == item.answer
        lost = re.search(r"after (\w+)\.", item.refusal).group(1)
        assert lost not in dict(after.findall(item.bogus_question))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_boolean_by_rewriting(level):
    rule = re.compile(r"(\b[P-Z]) is ([^.]+)\.")
    for item in items("boolean", level):
        values = {}
        for target, body in rule.findall(item.question):
            if body in ("true", "false"):
                values[target] = body == "true"
                continue
            names = [values[n] for n in re.findall(r"\b[P-Z]\b", body)]
            if "but not both" in body:
                values[target] = names[0] is not names[1]
            elif "implies" in body:
                values[target] = names[1] if names[0] else True
            elif body.startswith("not"):
                values[target] = not names[0]
            else:
                values[target] = all(names) if " and " in body else any(names)
        asked = re.findall(r"\b[P-Z]\b", item.question)[-1]
        assert item.answer == ("true" if values[asked] else "false"), item.question


@pytest.mark.parametrize("level", [1, 2, 3])
def test_knights_by_trying_all(level):
    said = re.compile(r"(\w+) (?:says that|calls) (\w+) (is honest|tells the truth|lies|a liar)")
    for item in items("knights", level, 40):
        claims = said.findall(item.question)
        people = sorted({name for claim in claims for name in claim[:2]})
        start = re.search(
            r"\. (?:It is known that )?(\w+) (is honest|always|lies|is a liar)", item.question
        )
        known = start.group(2) in ("is honest", "always")
        worlds = []
        for values in itertools.product((True, False), repeat=len(people)):
            world = dict(zip(people, values, strict=True))
            good = all(
                world[a] == (world[b] == (what in ("is honest", "tells the truth")))
                for a, b, what in claims
            )
            if good and world[start.group(1)] == known:
                worlds.append(world)
        asked = re.search(r"Is (\w+) honest", item.question).group(1)
        assert {world[asked] for world in worlds} == {item.answer == "honest"}


def test_weekdays_against_the_calendar():
    week = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    for item in items("weekdays", 1):
        day = re.search("|".join(week), item.question).group(0)
        assert item.answer == week[(week.index(day) + sum(numbers(item.question))) % 7]
    months = [datetime.date(2023, m, 1).strftime("%B") for m in range(1, 13)]
    for item in items("weekdays", 2):
        month, date = re.search(rf"({'|'.join(months)}) (\d+)", item.question).groups()
        days = int(re.search(r"(\d+) days(?! in Feb)", item.question).group(1))
        start = datetime.date(2023, months.index(month) + 1, int(date))
        end = start + datetime.timedelta(days)
        assert item.answer == f"{months[end.month - 1]} {end.day}"
    for item in items("weekdays", 3):
        (m1, d1), (m2, d2) = re.findall(rf"({'|'.join(months)}) (\d+)", item.question)
        one = datetime.date(2023, months.index(m1) + 1, int(d1))
        two = datetime.date(2023, months.index(m2) + 1, int(d2))
        day = re.search("|".join(week), item.question).group(0)
        assert item.answer == week[(week.index(day) + (two - one).days) % 7]


def test_compound_interest_by_formula():
    for level in (2, 3):
        for item in items("interest", level):
            amounts = numbers(item.question)
            total = max(amounts)
            rate = int(re.search(r"(\d+) percent", item.question).group(1))
            assert Fraction(item.answer) == total * (1 + Fraction(rate, 100)) ** level


@pytest.mark.parametrize("level", [1, 2, 3])
def test_credit_by_search_over_roles(level):
    """Extra cost = payments + first payment - price, for some assignment of the numbers."""
    for item in items("credit", level):
        found = {
            n * rate + down - price
            for n, rate, down, price in itertools.permutations(numbers(item.question))
        }
        assert int(item.answer) in found
