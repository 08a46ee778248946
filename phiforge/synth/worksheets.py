"""Plain-text worksheets: problems with solutions one after the other, the form pretraining reads.

`entry(question, solution)` is one problem; `few_shot_prompt(shots, question)` asks a base model in
the same form; `fill(entries, max_tokens)` groups entries into texts. Nothing is written.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from phiforge.synth.procedural import Item

STOP = "\n\n"  # what follows a solution; a base model's answer ends there
STYLES = ("worked", "skipping", "terse")

# The pre-tokenizer's pattern (cl100k's) in Python's `re`: letters, numbers of 1-3 digits, the rest.
_PIECE = re.compile(
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.IGNORECASE,
)


def estimate_tokens(text: str) -> int:
    """Tokens of a text before any tokenizer is trained: pieces of the pre-tokenizer.

    Numbers below 100 and frequent words are one token each; a number of three digits counts two.
    """
    return sum(2 if len(p) == 3 and p.isdigit() else 1 for p in _PIECE.findall(text))


def entry(question: str, solution: str) -> str:
    """One solved problem of a worksheet."""
    return f"{open_entry(question)}{solution}{STOP}"


def open_entry(question: str) -> str:
    """A problem up to where its solution begins."""
    return f"Question: {question}\nSolution:\n"


def few_shot_prompt(shots: Sequence[tuple[str, str]], question: str) -> str:
    """Solved problems (question, solution), then a question for a base model; stop at STOP."""
    return "".join(entry(*shot) for shot in shots) + open_entry(question)


def choose_style(rng: random.Random, shares: Mapping[str, float]) -> str:
    """One of STYLES, drawn by its share."""
    return rng.choices(STYLES, [shares[style] for style in STYLES])[0]


def solution(item: Item, style: str) -> str:
    """The item's solution in a style; a problem of one step has no shorter "skipping" than worked.

    Raises ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; allowed is one of {', '.join(STYLES)}")
    if style == "skipping":
        return item.skipping or item.worked
    return item.worked if style == "worked" else item.terse


def fill(entries: Iterable[str], max_tokens: int) -> Iterator[list[int]]:
    """Group entries in order: yields the indices of each text of at most `max_tokens` tokens.

    An entry longer than `max_tokens` becomes a text of its own.
    """
    group: list[int] = []
    used = 0
    for index, text in enumerate(entries):
        tokens = estimate_tokens(text)
        if group and used + tokens > max_tokens:
            yield group
            group, used = [], 0
        group.append(index)
        used += tokens
    if group:
        yield group
