"""Mathematics: stories of several steps of addition, subtraction and multiplication.

`STORIES.generate(rng, level)` draws one. Level 1 has 2 events and every number below 60; level 2
has 3-4 events below 1,000; level 3 has 4-6 events below 10,000.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from phiforge.synth.procedural.family import Draft, Family, refuse, sentences
from phiforge.synth.procedural.words import BOXES, NAMES, THINGS, VAGUE

LIMITS = {1: 60, 2: 1_000, 3: 10_000}  # every number in a problem stays below its level's limit
EVENTS = {1: (2, 2), 2: (3, 4), 3: (4, 6)}

OPENINGS = (
    "{name} has {start} {things}.",
    "{name} owns {start} {things}.",
    "{name} starts with {start} {things}.",
    "At first {name} has {start} {things}.",
    "{name} keeps {start} {things} in a box.",
    "There are {start} {things} on the desk of {name}.",
)
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "How many {things} does {name} have in the end?",
    "How many {things} is that in all?",
    "What is the number of {things} now?",
)
EVENT_WORDINGS = {
    "+": (
        "Then {name} buys {n} more.",
        "{name} finds {n} more.",
        "A friend gives {name} {n} more.",
        "Then {n} are added.",
        "{name} wins {n}.",
    ),
    "-": (
        "Then {name} gives away {n}.",
        "{name} loses {n}.",
        "{name} sells {n}.",
        "Then {n} are taken away.",
        "A friend takes {n}.",
    ),
    "+*": (
        "{name} gets {m} {boxes} of {n} each.",
        "Then {m} {boxes} of {n} are added.",
        "{name} buys {m} {boxes} with {n} in each.",
        "A friend brings {m} {boxes} of {n}.",
        "Then {name} finds {m} {boxes} with {n} in each.",
    ),
    "-*": (
        "{name} sells {m} {boxes} of {n} each.",
        "Then {m} {boxes} of {n} are taken away.",
        "{name} gives away {m} {boxes} of {n}.",
        "{name} loses {m} {boxes} with {n} in each.",
        "A friend takes {m} {boxes} of {n} each.",
    ),
    "*": (
        "Then the number is multiplied by {n}.",
        "Now {name} makes it {n} times as many.",
        "Then there are {n} times as many.",
        "The number becomes {n} times as large.",
        "Then {name} gets {n} times as many.",
    ),
}


@dataclass(frozen=True)
class Event:
    """One change of the number: a key of EVENT_WORDINGS and its operands (m only with boxes)."""

    sign: str
    n: int
    m: int = 0


def apply(total: int, event: Event) -> tuple[int, tuple[str, ...]]:
    """The number after the event, and the solution's lines that compute it."""
    if event.sign == "*":
        return total * event.n, (f"{total}*{event.n}={total * event.n}",)
    change, lines = event.n, ()
    if event.sign.endswith("*"):
        change = event.m * event.n
        lines = (f"{event.m}*{event.n}={change}",)
    sign = event.sign[0]
    after = total + change if sign == "+" else total - change
    return after, (*lines, f"{total}{sign}{change}={after}")


def _draw_event(rng: random.Random, total: int, limit: int, level: int) -> Event | None:
    """An event that keeps the number in 1..limit-1, or None when the drawn sign has no room."""
    sign = rng.choice(("+", "+", "-", "-", "+*", "-*", "*"))
    room = limit - 1 - total if sign[0] == "+" else total - 1
    factors = (2, 9 if level == 1 else 12)
    if sign == "*":
        most = (limit - 1) // total
        return Event("*", rng.randint(2, min(most, factors[1]))) if most >= 2 else None
    if sign.endswith("*"):
        m = rng.randint(*factors)
        most = min(room // m, 9 if level == 1 else 10 * level)
        return Event(sign, rng.randint(2, most), m) if most >= 2 else None
    most = min(room, limit // 2)
    return Event(sign, rng.randint(2, most)) if most >= 2 else None


def draw(rng: random.Random, level: int) -> Draft:
    """One story; the answer is the number in the end."""
    limit = LIMITS[level]
    start = total = rng.randint(2, limit * 6 // 10)
    events: list[Event] = []
    steps: list[str] = []
    num_events = rng.randint(*EVENTS[level])
    while len(events) < num_events:
        event = _draw_event(rng, total, limit, level)
        if event is not None:
            events.append(event)
            total, lines = apply(total, event)
            steps.extend(lines)
    question, bogus, missing = _tell(rng, start, events)
    key = str(start) + "".join(f"{e.sign}{e.m}x{e.n}" if e.m else f"{e.sign}{e.n}" for e in events)
    return Draft(
        question, tuple(steps), str(total), "number", key, bogus_question=bogus, refusal=missing
    )


def _tell(rng: random.Random, start: int, events: list[Event]) -> tuple[str, str, str]:
    """The story's text, the text with one quantity left vague, and the refusal that names it."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    words = {"name": name, "things": things, "boxes": rng.choice(BOXES)}
    opening, asked = rng.choice(OPENINGS), rng.choice(QUESTIONS).format(**words)
    told = [rng.choice(EVENT_WORDINGS[event.sign]) for event in events]

    def text(first: object, hidden: int | None = None) -> str:
        middle = [
            wording.format(
                n=vague if i == hidden and not event.m else event.n,
                m=vague if i == hidden else event.m,
                **words,
            )
            for i, (wording, event) in enumerate(zip(told, events, strict=True))
        ]
        return sentences([opening.format(start=first, **words), *middle, asked])

    vague = rng.choice(VAGUE)
    # "grows some times" does not read; leave a factor alone and blur another quantity instead.
    hidden = rng.choice([-1, *(i for i, event in enumerate(events) if event.sign != "*")])
    if hidden < 0:
        return text(start), text(vague), refuse("the first number is not given")
    missing = {"+": "how many are added", "-": "how many are taken away"}
    what = missing.get(events[hidden].sign, f"how many {words['boxes']} there are")
    return text(start), text(start, hidden), refuse(f"it is not said {what}")


STORIES = Family("stories", "mathematics", 3, draw)
