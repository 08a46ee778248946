"""The words that wordings are made of: names, things, places, and rules for plurals.

Short and frequent on purpose: a byte-level BPE of two thousand entries makes each one token.
Constants and small pure functions; nothing is written.
"""

from __future__ import annotations

NAMES = (
    "Tom", "Ana", "Ben", "Eva", "Max", "Mia", "Leo", "Zoe", "Sam", "Ida", "Kai", "Lin",
    "Omar", "Nora", "Raj", "Sara", "Ivan", "Mei", "Hugo", "Lena", "Finn", "Rosa", "Yuki", "Paul",
)  # fmt: skip

THINGS = (
    "apples", "pens", "books", "coins", "cards", "eggs", "stones", "shells", "stamps", "balls",
    "nuts", "cakes", "cups", "plums", "keys", "hats", "toys", "seeds", "lamps", "pears",
)  # fmt: skip

BOXES = ("bags", "boxes", "packs", "sets", "bowls")

GOODS = (
    "pen", "book", "cup", "hat", "lamp", "cake", "ball", "toy", "bag", "map", "belt", "clock",
)  # fmt: skip

VAGUE = ("some", "a few", "several", "many")


def plural(noun: str) -> str:
    """English plural of a regular noun: "box" -> "boxes", "city" -> "cities", "pen" -> "pens"."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def counted(count: int, noun: str) -> str:
    """A count with its noun in the right number: (1, "day") -> "1 day", (2, "day") -> "2 days"."""
    return f"{count} {noun if count == 1 else plural(noun)}"
