"""Procedural problems: exact answers, worked and terse solutions, unanswerable variants.

`generate("stories", 1, "train", seed=0, count=10)` yields Items; `FAMILIES` names every family.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from phiforge.synth.procedural.algebra import EQUATIONS, PROBABILITY, SEQUENCES
from phiforge.synth.procedural.budget import BUDGET
from phiforge.synth.procedural.circuits import CIRCUITS
from phiforge.synth.procedural.days import WEEKDAYS
from phiforge.synth.procedural.family import SPLITS, Draft, Family, Item, Split, items, split_of
from phiforge.synth.procedural.money import CREDIT, INTEREST, PERCENT
from phiforge.synth.procedural.ordering import ORDERING
from phiforge.synth.procedural.rates import CONVERSION, MOTION, WORK
from phiforge.synth.procedural.stories import STORIES
from phiforge.synth.procedural.truth import BOOLEAN, KNIGHTS

__all__ = [
    "FAMILIES",
    "NANO_FAMILIES",
    "SPLITS",
    "Draft",
    "Family",
    "Item",
    "Split",
    "family_named",
    "generate",
    "split_of",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(STORIES, EQUATIONS, SEQUENCES, PROBABILITY),  # mathematics
        *(BUDGET, PERCENT, INTEREST, CREDIT),  # finance
        *(CIRCUITS, CONVERSION, MOTION, WORK),  # engineering
        *(ORDERING, BOOLEAN, KNIGHTS, WEEKDAYS),  # logic
    )
}
NANO_FAMILIES = ("stories", "budget", "circuits", "weekdays")


def family_named(name: str) -> Family:
    """The family of that name; ValueError with the nearest names when there is none."""
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=3) or sorted(FAMILIES)
    raise ValueError(f"no family {name!r}; did you mean: {', '.join(near)}")


def generate(
    family: str, level: int, split: Split, seed: int, count: int, start: int = 0
) -> Iterator[Item]:
    """Items start..start+count-1; item i is a function of (family, level, split, seed, i) alone."""
    return items(family_named(family), level, split, seed, count, start)
