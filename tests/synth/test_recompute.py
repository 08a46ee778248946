"""Answers recomputed from the question's text alone, by independent code.

Run: pytest tests/synth/test_recompute.py.
"""

import datetime
import itertools
import re
from fractions import Fraction

import pytest

from phiforge.synth.procedural import Item, generate

LINK = r"(\w+) (?:is|comes|sits|plays) (\w+)"
AFTER = re.compile(rf"(?:Right after|Behind|Right of|After|Next below) {LINK}")
BEFORE = re.compile(rf"(?:Just before|Before|Left of|Just above) {LINK}")
SAID = re.compile(r"(\w+) (?:says that|calls) (\w+) (is honest|tells the truth|lies|a liar)")
START = re.compile(r"\. (?:It is known that )?(\w+) (is honest|always|lies|is a liar)")


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
    for item in items("ordering", level):
        follower = dict(AFTER.findall(item.question))
        follower |= {a: b for b, a in BEFORE.findall(item.question)}
        name = re.search(r", (\w+)", item.question).group(1)
        for _ in range(numbers(item.question)[-1] - 1):
            name = follower[name]
        assert name == item.answer


@pytest.mark.parametrize("level", [1, 2])
def test_ordering_without_links_is_open(level):
    """Of all lines of the named people that fit the sentences, no name is always at the place."""
    for item in items("ordering", level, 60):
        follower = dict(AFTER.findall(item.bogus_question))
        follower |= {a: b for b, a in BEFORE.findall(item.bogus_question)}
        first = re.search(r", (\w+)", item.bogus_question).group(1)
        rest = sorted({first, *follower, *follower.values()} - {first})
        place = numbers(item.bogus_question)[-1]
        found = set()
        for order in itertools.permutations(rest):
            line = [first, *order]
            if all(line.index(b) == line.index(a) + 1 for a, b in follower.items()):
                found.add(line[place - 1] if place <= len(line) else None)
        assert None in found or len(found) > 1, item.bogus_question


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


def possible(question: str) -> set[bool]:
    """Whether the asked person is honest, in every world that fits the statements."""
    claims = SAID.findall(question)
    start, known = START.search(question).groups()
    asked = re.search(r"Is (\w+) honest", question).group(1)
    people = sorted({start, asked, *(name for claim in claims for name in claim[:2])})
    found = set()
    for values in itertools.product((True, False), repeat=len(people)):
        world = dict(zip(people, values, strict=True))
        fits = all(
            world[a] == (world[b] == (what in ("is honest", "tells the truth")))
            for a, b, what in claims
        )
        if fits and world[start] == (known in ("is honest", "always")):
            found.add(world[asked])
    return found


@pytest.mark.parametrize("level", [1, 2, 3])
def test_knights_by_trying_all(level):
    for item in items("knights", level, 40):
        assert possible(item.question) == {item.answer == "honest"}
        assert possible(item.bogus_question) == {True, False}


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
