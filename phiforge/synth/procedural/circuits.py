"""Engineering: Ohm's law in networks of resistors, in whole volts, amperes and ohms.

`CIRCUITS.generate(rng, level)` draws one. Level 1: resistors in series, voltages below 60;
level 2: also a current from a voltage, below 1,000; level 3: a parallel pair within a series.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from phiforge.synth.procedural.family import Draft, Family, refuse
from phiforge.synth.procedural.words import VAGUE

SERIES = (
    "Resistors of {list} ohms are in series. The current is {i} amperes. What is the voltage?",
    "A current of {i} amperes flows through {list} ohms in series. How many volts is that?",
    "A circuit has {list} ohms in series and carries {i} amperes. Find the voltage.",
    "What voltage drives {i} amperes through {list} ohms in series?",
    "In a series circuit of {list} ohms the current is {i} amperes. How many volts are needed?",
    "A source sends {i} amperes through resistors of {list} ohms in series. What is its voltage?",
)
SUPPLY = (
    "Resistors of {list} ohms and a lamp of {u} volts are in series. The current is {i} amperes. "
    "What is the supply voltage?",
    "A lamp takes {u} volts and is in series with {list} ohms at {i} amperes. "
    "How many volts does the source give?",
    "A motor of {u} volts is in series with {list} ohms. The current is {i} amperes. "
    "Find the supply voltage.",
    "At {i} amperes the source feeds {list} ohms and a lamp of {u} volts in series. "
    "What is its voltage?",
    "A current of {i} amperes flows through {list} ohms and then a motor of {u} volts. "
    "What voltage is needed in all?",
)
CURRENT = (
    "A source of {u} volts feeds {list} ohms in series. How many amperes flow?",
    "Resistors of {list} ohms are in series at {u} volts. What is the current?",
    "What current flows when {u} volts drive {list} ohms in series?",
    "A series circuit of {list} ohms has a supply of {u} volts. Find the current in amperes.",
    "The supply gives {u} volts to {list} ohms in series. How many amperes is that?",
)
PARALLEL = (
    "Resistors of {p} and {q} ohms are in parallel, with {list} ohms in series. "
    "The current is {i} amperes. What is the voltage?",
    "A current of {i} amperes flows through {list} ohms and then through {p} and {q} ohms in "
    "parallel. How many volts is that?",
    "A circuit has {p} and {q} ohms in parallel and {list} ohms in series, and carries {i} "
    "amperes. Find the voltage.",
    "What voltage drives {i} amperes through {list} ohms in series with a pair of {p} and {q} "
    "ohms in parallel?",
    "In series are {list} ohms and a parallel pair of {p} and {q} ohms. The current is {i} "
    "amperes. How many volts are needed?",
)
LIMITS = {1: 60, 2: 1_000, 3: 1_000}  # volts stay below their level's limit
# Amperes; small ones more often, as they leave room for more sums.
CURRENTS = (2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 9)
# Parallel pairs (p, q) whose product divided by their sum is whole.
PAIRS = tuple(
    (p, q) for p in range(2, 61) for q in range(2, 61) if (p * q) % (p + q) == 0 and p != q
)


def draw(rng: random.Random, level: int) -> Draft:
    """One circuit of the level's kinds; the answer is a whole number of volts or amperes."""
    if level == 1:
        return rng.choice((_series, _supply))(rng, LIMITS[1])
    if level == 2:
        return rng.choice((_series, _supply, _current))(rng, LIMITS[2])
    return _parallel(rng, LIMITS[3])


def _draw_total(rng: random.Random, low: int, high: int) -> int:
    """A sum of resistors; larger sums more often, as they have more compositions."""
    return max(rng.randint(low, high), rng.randint(low, high))


def _parts(rng: random.Random, total: int, num: int) -> list[int]:
    """`num` positive whole numbers of a given sum, every composition equally likely."""
    cuts = sorted(rng.sample(range(1, total), num - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _listed(parts: Sequence[object]) -> str:
    """[3, 4, 5] -> "3, 4 and 5"; one part is itself."""
    return (
        " and ".join([", ".join(map(str, parts[:-1])), str(parts[-1])])
        if parts[1:]
        else (str(parts[0]))
    )


def _sum_steps(parts: list[int]) -> list[str]:
    """One line per addition: [3, 4, 5] -> ["3+4=7", "7+5=12"]."""
    steps, total = [], parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{part}={total + part}")
        total += part
    return steps


def _series(rng: random.Random, limit: int) -> Draft:
    i = rng.choice(CURRENTS)
    parts = _parts(rng, _draw_total(rng, 6, (limit - 1) // i), 3 if limit == LIMITS[1] else 4)
    total = sum(parts)
    steps = [*_sum_steps(parts), f"{i}*{total}={i * total}"]
    return _finish(rng, SERIES, {"i": i}, parts, steps, i * total, "the current")


def _supply(rng: random.Random, limit: int) -> Draft:
    i = rng.choice(CURRENTS)
    num = rng.choice((2, 2, 3))
    parts = _parts(rng, _draw_total(rng, num + 1, (limit - 10) // i), num)
    drop = i * sum(parts)
    u = rng.randint(2, limit - 1 - drop)
    steps = [*_sum_steps(parts), f"{i}*{sum(parts)}={drop}", f"{drop}+{u}={drop + u}"]
    return _finish(rng, SUPPLY, {"i": i, "u": u}, parts, steps, drop + u, "the current")


def _current(rng: random.Random, limit: int) -> Draft:
    i = rng.randint(2, 12)
    parts = _parts(rng, rng.randint(6, (limit - 1) // i), 3)
    total = sum(parts)
    steps = [*_sum_steps(parts), f"{i * total}/{total}={i}"]
    return _finish(rng, CURRENT, {"u": i * total}, parts, steps, i, "the voltage")


def _parallel(rng: random.Random, limit: int) -> Draft:
    p, q = rng.choice(PAIRS)
    pair = p * q // (p + q)
    i = rng.randint(2, 9)
    parts = _parts(rng, rng.randint(3, (limit - 1) // i - pair), rng.choice((1, 2)))
    total = pair + sum(parts)
    steps = [
        f"{p}*{q}={p * q}",
        f"{p}+{q}={p + q}",
        f"{p * q}/{p + q}={pair}",
        *_sum_steps([pair, *parts]),
        f"{i}*{total}={i * total}",
    ]
    return _finish(rng, PARALLEL, {"i": i, "p": p, "q": q}, parts, steps, i * total, "the current")


def _finish(
    rng: random.Random,
    templates: tuple[str, ...],
    values: dict[str, int],
    parts: list[int],
    steps: list[str],
    answer: int,
    source: str,
) -> Draft:
    """The draft; its bogus variant blurs the current (or voltage), or one resistor."""
    template = rng.choice(templates)
    blurred: dict[str, object] = dict(values)
    shown: list[object] = list(parts)
    if rng.random() < 0.5:
        blurred["i" if source == "the current" else "u"] = rng.choice(VAGUE)
        missing = f"{source} is not given"
    else:
        shown[rng.randrange(len(shown))] = "unknown"
        missing = "one resistor is not given"
    key = f"{values} {parts}"
    return Draft(
        question=template.format(list=_listed(parts), **values),
        steps=tuple(steps),
        answer=str(answer),
        kind="number",
        key=key,
        bogus_question=template.format(list=_listed(shown), **blurred),
        refusal=refuse(missing),
    )


CIRCUITS = Family("circuits", "engineering", 3, draw)
