"""Logic: who stands at which place, when only neighbours are told and the sentences are shuffled.

`ORDERING.generate(rng, level)` draws one. Level 1 has 4-5 names; level 2 has 5-6 and tells some
neighbours backwards; level 3 has 6-8. The first of the line is always told.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from phiforge.synth.procedural.family import Draft, Family, refuse, sentences
from phiforge.synth.procedural.words import NAMES

SIZES = {1: (4, 5), 2: (5, 6), 3: (6, 8)}
NEAREST_PLACE = 3  # a nearer place would need no chain of steps


@dataclass(frozen=True)
class Setting:
    """One wording: every name follows a space, so that it is the same token everywhere."""

    opening: str
    first: str
    ahead: str  # {a} directly ahead of {b}
    behind: str  # {b} directly behind {a}
    asked: str


SETTINGS = (
    Setting(
        "In a race,", "{a} is first.", "Right after {a} comes {b}.", "Just before {b} comes {a}.",
        "Who is number {k}?",
    ),
    Setting(
        "In a queue,", "{a} is at the front.", "Behind {a} is {b}.", "Before {b} is {a}.",
        "Who is at place {k}?",
    ),
    Setting(
        "On a bench,", "{a} sits at the left end.", "Right of {a} sits {b}.",
        "Left of {b} sits {a}.", "Who sits at seat {k} from the left?",
    ),
    Setting(
        "At a show,", "{a} plays first.", "After {a} plays {b}.", "Before {b} plays {a}.",
        "Who plays as number {k}?",
    ),
    Setting(
        "By height,", "{a} is the tallest.", "Next below {a} is {b}.",
        "Just above {b} is {a}.", "Who is number {k}?",
    ),
    Setting(
        "At the doctor,", "{a} is seen first.", "After {a} comes {b}.", "Before {b} comes {a}.",
        "Who is seen as number {k}?",
    ),
)  # fmt: skip


def draw(rng: random.Random, level: int) -> Draft:
    """One line of names; the answer is the name at the asked place."""
    num = rng.randint(*SIZES[level])
    line: list[str] = rng.sample(NAMES, num)
    place = rng.randint(NEAREST_PLACE, num)
    setting = rng.choice(SETTINGS)
    links = [_link(rng, setting, line, i, level) for i in range(num - 1)]
    first = setting.first.format(a=line[0])
    asked = setting.asked.format(k=place)
    order = list(range(num - 1))
    rng.shuffle(order)
    steps = tuple(f"{i + 1} {name}" for i, name in enumerate(line[:place]))
    lost, dropped = rng.choice(_gaps(num, place))
    told = [links[i] for i in order]
    gap = [links[i] for i in order if i not in dropped]
    return Draft(
        question=sentences([setting.opening, first, *told, asked]),
        steps=steps,
        answer=line[place - 1],
        kind="text",
        key=">".join(line),
        bogus_question=sentences([setting.opening, first, *gap, asked]),
        refusal=refuse(f"it is not said who comes after {line[lost]}"),
    )


def _gaps(num: int, place: int) -> list[tuple[int, frozenset[int]]]:
    """Links to drop so that the place is open: (the first of them, all of them).

    One link alone would not do: what is left has only one order. Either everything after a name
    is dropped, or two links are, so that two groups of two or more names could stand either way.
    """
    ends = [(lost, frozenset(range(lost, num - 1))) for lost in range(1, place - 1)]
    swaps = [
        (lost, frozenset((lost, other)))
        for lost in range(place - 1)
        for other in range(lost + 2, num - 2)
    ]
    return ends + swaps * 2


def _link(rng: random.Random, setting: Setting, line: list[str], i: int, level: int) -> str:
    backwards = level > 1 and rng.random() < 0.5
    wording = setting.behind if backwards else setting.ahead
    return wording.format(a=line[i], b=line[i + 1])


ORDERING = Family("ordering", "logic", 3, draw)
