"""Logic: weekdays and dates, counted forwards and backwards.

`WEEKDAYS.generate(rng, level)` draws one. Level 1: a weekday after two spans of days; level 2: a
date some days later; level 3: a weekday from the weekday of another date of the same year.
"""

from __future__ import annotations

import random

from phiforge.synth.procedural.family import Draft, Family, tell
from phiforge.synth.procedural.words import NAMES

MOST_DAYS = 59  # level 1 counts no further, so that every number is one token and a known fact
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30),
    ("July", 31), ("August", 31), ("September", 30), ("October", 31), ("November", 30),
    ("December", 31),
)  # fmt: skip

SPANS = (
    "Today is {day}. A trip starts in {a} days and takes {b} days. On which weekday is it over?",
    "{name} starts on a {day}, works {a} days and rests {b} days. Which weekday is it then?",
    "It is {day}. In {a} days a letter leaves and {b} days later it arrives. On which weekday?",
    "A test begins on {day}. After {a} days comes a break of {b} days. What weekday follows?",
    "From {day} count {a} days and then {b} days. Which day of the week is that?",
)
LATER = (
    "Which date is {a} days after {month} {date}, in a year with 28 days in February?",
    "In a year with 28 days in February {name} leaves on {month} {date} and is away for {a} days. "
    "Which date is it then?",
    "In a common year, what date follows {month} {date} by {a} days?",
    "A common year: a bill of {month} {date} is due in {a} days. On which date?",
    "Count {a} days from {month} {date} in a common year. What date is it?",
)
BETWEEN = (
    "In a common year {month} {date} is a {day}. Which weekday is {to} {end}?",
    "{month} {date} of a common year falls on {day}. On which weekday does {to} {end} fall?",
    "A common year has a {day} on {month} {date}. What day of the week is {to} {end}?",
    "{name} was born on {day}, {month} {date}, of a common year. What weekday was {to} {end}?",
    "If {month} {date} is a {day} in a common year, what weekday is {to} {end}?",
)


def draw(rng: random.Random, level: int) -> Draft:
    """One problem of the level's kind; the answer is a weekday or a date such as "March 4"."""
    return (_spans, _later, _between)[level - 1](rng)


def _walk(day: int, days: int) -> tuple[str, list[str]]:
    """The weekday some days later, and the lines: whole weeks off, then the days left."""
    weeks, rest = divmod(days, 7)
    lines = [f"{weeks}*7={weeks * 7}", f"{days}-{weeks * 7}={rest}"] if weeks else []
    passed = [WEEK[(day + i) % 7] for i in range(rest + 1)]
    return passed[-1], [*lines, " ".join(passed)]


def _spans(rng: random.Random) -> Draft:
    day, total = rng.randrange(7), max(rng.randint(9, MOST_DAYS), rng.randint(9, MOST_DAYS))
    a = rng.randint(2, total - 2)
    b = total - a
    weekday, lines = _walk(day, total)
    values = {"name": rng.choice(NAMES), "day": WEEK[day], "a": a, "b": b}
    missing = {
        "a": "the first number of days is not given",
        "b": "the second number of days is not given",
    }
    steps = [f"{a}+{b}={a + b}", *lines]
    return _finish(rng, SPANS, values, missing, steps, weekday, f"{WEEK[day]} {a} {b}")


def _later(rng: random.Random) -> Draft:
    month, days = rng.randrange(8), rng.randint(10, 120)
    date = rng.randint(1, MONTHS[month][1])
    count, now = date + days, month
    steps = [f"{date}+{days}={count}"]
    while count > MONTHS[now][1]:
        name, length = MONTHS[now]
        steps.append(f"{name} {length}: {count}-{length}={count - length}")
        count -= length
        now += 1
    values = {"name": rng.choice(NAMES), "month": MONTHS[month][0], "date": date, "a": days}
    missing = {"a": "the number of days is not given"}
    answer = f"{MONTHS[now][0]} {count}"
    return _finish(rng, LATER, values, missing, steps, answer, f"{MONTHS[month][0]} {date}+{days}")


def _between(rng: random.Random) -> Draft:
    month, day = rng.randrange(9), rng.randrange(7)
    to = rng.randint(month + 1, min(month + 4, 11))
    date, end = rng.randint(1, MONTHS[month][1]), rng.randint(1, MONTHS[to][1])
    total = MONTHS[month][1] - date
    steps = [f"{MONTHS[month][1]}-{date}={total}"]
    for name, length in MONTHS[month + 1 : to]:
        steps.append(f"{name} {length}: {total}+{length}={total + length}")
        total += length
    steps.append(f"{total}+{end}={total + end}")
    weekday, lines = _walk(day, total + end)
    values = {
        "name": rng.choice(NAMES),
        "month": MONTHS[month][0],
        "date": date,
        "day": WEEK[day],
        "to": MONTHS[to][0],
        "end": end,
    }
    missing = {"end": f"the day in {MONTHS[to][0]} is not given"}
    key = f"{MONTHS[month][0]} {date} {WEEK[day]} {MONTHS[to][0]} {end}"
    return _finish(rng, BETWEEN, values, missing, [*steps, *lines], weekday, key)


def _finish(
    rng: random.Random,
    templates: tuple[str, ...],
    values: dict[str, object],
    missing: dict[str, str],
    steps: list[str],
    answer: str,
    key: str,
) -> Draft:
    told = tell(rng, templates, values, missing)
    # "February a few" does not read; a hidden day of the month is just "a day in February".
    bogus = told.bogus
    if "end" in values:
        bogus = templates[0].format(**{**values, "end": "one day"})
        bogus = bogus.replace(f"{values['to']} one day", f"one day in {values['to']}")
    return Draft(told.question, tuple(steps), answer, "text", key, bogus, told.refusal)


WEEKDAYS = Family("weekdays", "logic", 3, draw)
