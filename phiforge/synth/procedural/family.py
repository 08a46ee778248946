"""What a family of procedural problems is: a draw function, levels, disjoint train and test splits.

A family turns a random generator and a level into a Draft; `items` turns drafts into Items of one
split. Nothing is written here: `phiforge.synth.synthesize` writes the files.

Disjoint splits by construction: every draft carries a *key*, the canonical text of its parameters
(operands, operations, names that matter; never the wording, nor the level). The key's hash alone
decides the split, and `items` redraws until the split is the one asked for. So no key is in both.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from phiforge.synth.procedural.words import VAGUE

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
TEST_SHARE_PERCENT = 10
MAX_REDRAWS = 10_000


@dataclass(frozen=True)
class Draft:
    """One drawn problem before it knows its family: what a family's draw function returns.

    steps: the lines of the worked solution, without the last line "Answer: X".
    key: canonical parameters, without wording. bogus_question and refusal: both or neither.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    kind: str
    key: str
    bogus_question: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Item:
    """One problem with every way to answer it.

    worked: all steps, then "Answer: X". skipping: the first step, then "Answer: X" (the other steps
    are folded into the answer; None when there is only one step). terse: "Answer: X" alone.
    kind: "number", "unit", "choice" or "text" (see `phiforge.verify.answers`).
    bogus_question: the same problem made unanswerable, with the refusal that says why, or None.
    """

    family: str
    field: str
    level: int
    question: str
    worked: str
    terse: str
    answer: str
    kind: str
    bogus_question: str | None
    refusal: str | None
    key: str
    skipping: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of problems: `generate(rng, level)` draws one Draft, level in 1..levels."""

    name: str
    field: str
    levels: int
    generate: Callable[[random.Random, int], Draft]


def split_of(key: str) -> Split:
    """The split a key belongs to: "test" for TEST_SHARE_PERCENT of all keys, else "train"."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 100 < TEST_SHARE_PERCENT else "train"


def items(
    family: Family, level: int, split: Split, seed: int, count: int, start: int = 0
) -> Iterator[Item]:
    """Items start..start+count-1 of a family; item i is a function of the other arguments and i.

    Raises ValueError for a level outside 1..family.levels or an unknown split.
    """
    if not 1 <= level <= family.levels:
        raise ValueError(
            f"level of family {family.name!r} is {level}; allowed is 1..{family.levels}"
        )
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed is one of {', '.join(SPLITS)}")
    for index in range(start, start + count):
        yield _item(family, level, split, seed, index)


def _item(family: Family, level: int, split: Split, seed: int, index: int) -> Item:
    # A text seed is hashed with SHA-512 by `random`: the same stream on every machine and process.
    rng = random.Random(f"{family.name}/{level}/{split}/{seed}/{index}")
    for _ in range(MAX_REDRAWS):
        draft = family.generate(rng, level)
        key = f"{family.name}:{draft.key}"
        if split_of(key) == split:
            return _finish(family, level, draft, key)
    raise AssertionError(f"family {family.name} has too few problems at level {level}")


def _finish(family: Family, level: int, draft: Draft, key: str) -> Item:
    last = f"Answer: {draft.answer}"
    return Item(
        family=family.name,
        field=family.field,
        level=level,
        question=draft.question,
        worked="\n".join((*draft.steps, last)),
        terse=last,
        answer=draft.answer,
        kind=draft.kind,
        bogus_question=draft.bogus_question,
        refusal=draft.refusal,
        key=key,
        skipping="\n".join((draft.steps[0], last)) if len(draft.steps) > 1 else None,
    )


def refuse(missing: str) -> str:
    """The refusal that names what is wrong with a question."""
    return f"I cannot answer this: {missing}."


def sentences(parts: Sequence[str]) -> str:
    """Parts joined with single spaces; empty parts are dropped."""
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Telling:
    """A question, the same question with one quantity hidden, and the refusal that names it."""

    question: str
    bogus: str
    refusal: str


def tell(
    rng: random.Random,
    templates: Sequence[str],
    values: Mapping[str, object],
    missing: Mapping[str, str],
) -> Telling:
    """Fill one of the templates, and once more with one of the quantities in `missing` hidden.

    missing: name of a value -> what the refusal says when it is hidden ("the price is not given").
    """
    template = rng.choice(templates)
    hidden = rng.choice([name for name in missing if f"{{{name}}}" in template])
    vague = {**values, hidden: rng.choice(VAGUE)}
    return Telling(template.format(**values), template.format(**vague), refuse(missing[hidden]))
