"""Engineering: unit conversion, speed and distance, and rates of work.

`CONVERSION`, `MOTION` and `WORK` each draw one problem by `generate(rng, level)`, three levels.
Results are whole; from level 2 conversion and motion ask for a number with unit (kind "unit").
"""

from __future__ import annotations

import random

from phiforge.synth.procedural.family import Draft, Family, tell
from phiforge.synth.procedural.words import NAMES

# (big unit, small unit, small units in a big one)
SMALL_TABLE = (
    ("weeks", "days", 7),
    ("dozens", "pieces", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("gallons", "quarts", 4),
)
METRIC_TABLE = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("h", "min", 60),
    ("min", "s", 60),
    ("l", "ml", 1000),
    ("kV", "V", 1000),
    ("A", "mA", 1000),
)
ADDING_UNITS = (
    "Add {a} {big} and {b} {small} to {c} {big} and {d} {small}. How many {small} is that?",
    "One part takes {a} {big} and {b} {small}, the other {c} {big} and {d} {small}. "
    "How many {small} are both?",
    "How many {small} are {a} {big} and {b} {small} plus {c} {big} and {d} {small}?",
    "First {a} {big} and {b} {small}, then {c} {big} and {d} {small}. Give the sum in {small}.",
    "Convert {a} {big} and {b} {small} and then {c} {big} and {d} {small} to {small} in all.",
)
MIXED_UNITS = (
    "Convert {a} {big} and {b} {small} to {small}.",
    "How many {small} are {a} {big} and {b} {small}?",
    "A value is {a} {big} plus {b} {small}. Give it in {small}.",
    "Write {a} {big} and {b} {small} in {small}.",
    "What is the sum of {a} {big} and {b} {small} in {small}?",
)
CONVERT_SPEED = (
    "A car goes at {a} km/h. How many m does it cover in {t} s?",
    "At {a} km/h, how far in m is it in {t} s?",
    "How many m are driven in {t} s at {a} km/h?",
    "A wind blows at {a} km/h. Give its way in {t} s in m.",
    "Find the distance in m for {t} s at {a} km/h.",
)


def draw_conversion(rng: random.Random, level: int) -> Draft:
    """Level 1: two mixed lengths or times summed below 100; 2: metric units; 3: speeds."""
    return (_small_units, _metric_units, _speed_units)[level - 1](rng)


def _small_units(rng: random.Random) -> Draft:
    big, small, size = rng.choice(SMALL_TABLE)
    most = min(16, 90 // size - 1)
    a = rng.randint(2, most - 2)
    c = rng.randint(2, most - a)
    room = 99 - (a + c) * size
    b = rng.randint(2, min(room - 2, 29))
    d = rng.randint(2, min(room - b, 29))
    total = a * size + b + c * size + d
    one, two = a * size + b, c * size + d
    steps = [
        f"{a}*{size}={a * size}",
        f"{a * size}+{b}={one}",
        f"{c}*{size}={c * size}",
        f"{c * size}+{d}={two}",
        f"{one}+{two}={total}",
    ]
    values = {"a": a, "b": b, "c": c, "d": d, "big": big, "small": small}
    missing = dict.fromkeys("ac", f"the number of {big} is not given")
    key = f"{a} {big} {b} {small} {c} {d}"
    return _finish(rng, ADDING_UNITS, values, missing, steps, str(total), "number", key)


def _metric_units(rng: random.Random) -> Draft:
    big, small, size = rng.choice(METRIC_TABLE)
    a, b = rng.randint(2, 99), rng.randint(1, size - 1)
    steps = [f"{a}*{size}={a * size}", f"{a * size}+{b}={a * size + b}"]
    values = {"a": a, "b": b, "big": big, "small": small}
    missing = {"a": f"the number of {big} is not given", "b": f"the number of {small} is not given"}
    answer = f"{a * size + b} {small}"
    return _finish(rng, MIXED_UNITS, values, missing, steps, answer, "unit", f"{a}{big}{b}{small}")


def _speed_units(rng: random.Random) -> Draft:
    fifths, seconds = rng.randint(1, 25), rng.randint(2, 999)  # 18 km/h are 5 m/s
    fast, slow = 18 * fifths, 5 * fifths
    steps = [
        f"{fast}*1000={fast * 1000}",
        f"{fast * 1000}/3600={slow}",
        f"{slow}*{seconds}={slow * seconds}",
    ]
    values: dict[str, object] = {"a": fast, "t": seconds}
    missing = {"a": "the speed is not given", "t": "the time is not given"}
    answer = f"{slow * seconds} m"
    return _finish(rng, CONVERT_SPEED, values, missing, steps, answer, "unit", f"{fast} {seconds}s")


LEGS = (
    "After {s} km {name} rides {t} hours at {v} km/h and {u} hours at {w} km/h. "
    "How many km is that in all?",
    "A bus at km {s} goes at {v} km/h for {t} hours, then at {w} km/h for {u} hours. "
    "At which km is it now?",
    "A boat is {s} km from port, sails on for {t} hours at {v} km/h and {u} hours at {w} km/h. "
    "How far is it from port?",
    "{s} km are done. For {t} hours a train runs at {v} km/h, for {u} hours at {w} km/h. "
    "How many km in all?",
    "{name} walks {s} km, then {v} km/h for {t} hours and {w} km/h for {u} hours. "
    "What is the distance?",
)
AVERAGE = (
    "{name} rides {t} hours at {v} km/h and {u} hours at {w} km/h. What is the average speed?",
    "A bus goes at {v} km/h for {t} hours, then at {w} km/h for {u} hours. Find its mean speed.",
    "A boat sails {t} hours at {v} km/h and another {u} hours at {w} km/h. "
    "What speed is that on average?",
    "For {t} hours a train runs at {v} km/h, for {u} hours at {w} km/h. Give the average speed.",
    "{name} drives {v} km/h for {t} hours and {w} km/h for {u} hours. How fast is that on average?",
)
MEETING = (
    "Two trains {d} km apart drive towards each other at {v} and {w} km/h. "
    "After how many hours do they meet?",
    "{name} and a friend are {d} km apart and ride towards each other at {v} km/h and {w} km/h. "
    "When do they meet, in hours?",
    "A road is {d} km long. Cars start at both ends at {v} and {w} km/h. "
    "How many hours until they meet?",
    "From two ports {d} km apart boats leave towards each other at {v} and {w} km/h. "
    "After what time do they meet?",
    "At {v} and {w} km/h two buses close a gap of {d} km. How many hours does it take?",
)


def draw_motion(rng: random.Random, level: int) -> Draft:
    """Level 1: distance of two legs below 100 km; 2: average speed; 3: two who meet."""
    if level == 3:
        return _meeting(rng)
    t, u = (rng.randint(2, 6) for _ in range(2))
    if level == 1:
        v = rng.randint(2, 80 // t)
        w = rng.randint(1, (97 - t * v) // u)
    else:
        v = rng.randint(10, 90)
        # Choose the second speed so that the average is whole.
        mean = v + rng.randint(1, 30) * u
        w = mean + (mean - v) * t // u
    first, second = t * v, u * w
    total = first + second
    steps = [f"{t}*{v}={first}", f"{u}*{w}={second}", f"{first}+{second}={total}"]
    values = {"name": rng.choice(NAMES), "t": t, "u": u, "v": v, "w": w}
    missing = {
        "t": "the time of the first part is not given",
        "u": "the time of the second part is not given",
        "v": "the first speed is not given",
        "w": "the second speed is not given",
    }
    key = f"{t}x{v} {u}x{w}"
    if level == 1:
        s = rng.randint(2, 99 - total)
        values["s"], missing["s"] = s, "the distance at the start is not given"
        steps.append(f"{total}+{s}={total + s}")
        return _finish(rng, LEGS, values, missing, steps, str(total + s), "number", f"{key} {s}")
    steps += [f"{t}+{u}={t + u}", f"{total}/{t + u}={total // (t + u)}"]
    answer = f"{total // (t + u)} km/h"
    return _finish(rng, AVERAGE, values, missing, steps, answer, "unit", f"mean {key}")


def _meeting(rng: random.Random) -> Draft:
    v, w, hours = rng.randint(5, 120), rng.randint(5, 120), rng.randint(2, 12)
    distance = (v + w) * hours
    steps = [f"{v}+{w}={v + w}", f"{distance}/{v + w}={hours}"]
    values = {"name": rng.choice(NAMES), "d": distance, "v": v, "w": w}
    missing = {"d": "the distance is not given", "v": "the first speed is not given"}
    key = f"meet {v} {w} {distance}"
    return _finish(rng, MEETING, values, missing, steps, f"{hours} h", "unit", key)


OUTPUT = (
    "One machine makes {a} parts an hour, another {b}. {s} parts are ready. "
    "How many are there after {h} hours?",
    "There are {s} parts in store. Two machines add {a} and {b} parts an hour for {h} hours. "
    "How many parts is that?",
    "{name} packs {a} boxes an hour and a friend {b}. They work {h} hours and had {s} before. "
    "How many boxes are packed?",
    "Two pumps bring {a} and {b} liters a minute into a tank with {s} liters. "
    "How many liters after {h} minutes?",
    "A tank with {s} liters is fed by pipes of {a} and {b} liters a minute. "
    "What does it hold after {h} minutes?",
)
DURATION = (
    "One machine makes {a} parts an hour, another {b}. {s} parts are ready. "
    "How many hours until there are {total}?",
    "There are {s} parts in store. Two machines add {a} and {b} parts an hour. "
    "When are there {total} parts, in hours?",
    "{name} packs {a} boxes an hour and a friend {b}. {s} of {total} boxes are packed. "
    "How many hours remain?",
    "Two pumps bring {a} and {b} liters a minute into a tank with {s} liters. "
    "After how many minutes are there {total} liters?",
    "A tank with {s} liters is fed by pipes of {a} and {b} liters a minute. "
    "How many minutes until it holds {total} liters?",
)
TOGETHER = (
    "{name} needs {a} hours for a job, a friend {b} hours. {n} such jobs wait. "
    "How many hours do both need together?",
    "One pump fills a tank in {a} hours, another in {b} hours. "
    "How long do both take for {n} tanks, in hours?",
    "A machine does an order in {a} hours, a second one in {b} hours. "
    "In how many hours do both do {n} orders?",
    "Alone, two printers need {a} and {b} hours for a book. How many hours for {n} books together?",
    "Two teams need {a} and {b} days for a wall. How many days for {n} walls together?",
)
# Times (a, b) whose product divided by their sum is whole.
WORK_PAIRS = tuple((a, b) for a in range(2, 201) for b in range(2, 201) if (a * b) % (a + b) == 0)


def draw_work(rng: random.Random, level: int) -> Draft:
    """Level 1: output of two rates below 100; 2: the time they need; 3: jobs done together."""
    if level == 3:
        return _together(rng)
    limit = 100 if level == 1 else 1000
    h = rng.randint(2, 9)
    rate = rng.randint(3, limit * 8 // 10 // h)
    a = rng.randint(1, rate - 1)
    made = rate * h
    s = rng.randint(2, limit - 1 - made)
    values = {"name": rng.choice(NAMES), "a": a, "b": rate - a, "s": s, "h": h, "total": made + s}
    missing = {
        "a": "the first rate is not given",
        "b": "the second rate is not given",
        "s": "the amount at the start is not given",
        "h": "the time is not given",
        "total": "the amount at the end is not given",
    }
    key = f"{a}+{rate - a} x{h} +{s}"
    steps = [f"{a}+{rate - a}={rate}"]
    if level == 1:
        steps += [f"{rate}*{h}={made}", f"{made}+{s}={made + s}"]
        return _finish(rng, OUTPUT, values, missing, steps, str(made + s), "number", key)
    steps += [f"{made + s}-{s}={made}", f"{made}/{rate}={h}"]
    return _finish(rng, DURATION, values, missing, steps, str(h), "number", key)


def _together(rng: random.Random) -> Draft:
    a, b = rng.choice(WORK_PAIRS)
    n = rng.randint(2, 40)
    one = a * b // (a + b)
    steps = [
        f"{a}*{b}={a * b}",
        f"{a}+{b}={a + b}",
        f"{a * b}/{a + b}={one}",
        f"{n}*{one}={n * one}",
    ]
    values = {"name": rng.choice(NAMES), "a": a, "b": b, "n": n}
    missing = {"a": "the first time is not given", "b": "the second time is not given"}
    key = f"together {a} {b} {n}"
    return _finish(rng, TOGETHER, values, missing, steps, str(n * one), "number", key)


def _finish(
    rng: random.Random,
    templates: tuple[str, ...],
    values: dict[str, object],
    missing: dict[str, str],
    steps: list[str],
    answer: str,
    kind: str,
    key: str,
) -> Draft:
    told = tell(rng, templates, values, missing)
    return Draft(told.question, tuple(steps), answer, kind, key, told.bogus, told.refusal)


CONVERSION = Family("conversion", "engineering", 3, draw_conversion)
MOTION = Family("motion", "engineering", 3, draw_motion)
WORK = Family("work", "engineering", 3, draw_work)
