"""Key-value recall and copying: tasks that can only be solved by looking far back in the context.

`make_needle(rng, num_lines)` hides one pair among arithmetic, `make_recall(rng, num_pairs)` lists
nothing but pairs, `make_copy(rng, num_items)` asks for a line again; `fit_*` draw the largest task
that a tokenizer's length allows, `*_document` are training texts of the same form. Recall as in
HELMET (arXiv 2410.02694); one pair is solved by a far smaller model than many.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phiforge.synth.procedural.drills import fact
from phiforge.synth.procedural.words import BOXES, GOODS, NAMES, THINGS

FILLER_BELOW = 60  # the numbers of the arithmetic around a needle
Length = Callable[[str], int]  # tokens of a text

# No value is the beginning of another, so that an answer can be checked by its beginning.
VALUES = (
    "red", "blue", "green", "gold", "pink", "gray", "white", "black", "brown", "amber", "silver",
    "orange", "sun", "moon", "star", "rain", "snow", "wind", "fire", "tree", "leaf", "rose",
    "bird", "fish", "horse", "lion", "wolf", "bear", "river", "hill", "sand", "iron",
)  # fmt: skip
NUMBER_KEYS = tuple(str(number) for number in range(10, 100))
WORD_KEYS = (*NAMES, *THINGS, *GOODS, *BOXES)
# Only for lists longer than the other keys allow: a small vocabulary need not hold them otherwise.
MORE_KEYS = (
    "air", "arm", "bank", "bed", "bell", "boat", "bone", "bus", "car", "cat", "chair", "city",
    "coat", "cow", "desk", "dog", "door", "duck", "ear", "eye", "farm", "flag", "foot", "fork",
    "game", "gate", "girl", "glass", "hand", "head", "house", "ice", "jar", "king", "lake", "land",
    "law", "leg", "line", "milk", "mouse", "nose", "oil", "park", "path", "pig", "plate", "pot",
    "road", "rock", "roof", "room", "rope", "salt", "sea", "ship", "shoe", "soap", "song", "soup",
)  # fmt: skip
PLAIN_KEYS = (*NUMBER_KEYS, *WORD_KEYS, *MORE_KEYS)
COPY_ITEMS = (*VALUES, *WORD_KEYS, *NUMBER_KEYS)


@dataclass(frozen=True)
class Task:
    """A plain-text prompt and what must follow it: a right completion starts with " " + answer."""

    prompt: str
    answer: str


def draw_keys(rng: random.Random, num: int) -> list[str]:
    """Distinct keys: two-digit numbers while they last, then words as well, then "word number".

    Raises ValueError when there are not that many.
    """
    if num <= len(NUMBER_KEYS):
        return rng.sample(NUMBER_KEYS, num)
    if num <= len(PLAIN_KEYS):
        return rng.sample(PLAIN_KEYS, num)
    pairs = len(WORD_KEYS) * len(NUMBER_KEYS)
    if num > pairs:
        raise ValueError(f"num_pairs is {num}; there are {pairs} distinct keys at most")
    chosen = rng.sample(range(pairs), num)
    words, numbers = WORD_KEYS, NUMBER_KEYS
    return [f"{words[c // len(numbers)]} {numbers[c % len(numbers)]}" for c in chosen]


def draw_pairs(rng: random.Random, num_pairs: int) -> list[tuple[str, str]]:
    """`num_pairs` distinct keys, each with a value; values repeat."""
    return [(key, rng.choice(VALUES)) for key in draw_keys(rng, num_pairs)]


def recall_list(pairs: Sequence[tuple[str, str]]) -> str:
    """The list as text, one "key 47: amber" a line."""
    return "".join(f"key {key}: {value}\n" for key, value in pairs)


def recall_query(key: str) -> str:
    """The question for one key, which the value follows after a space."""
    return f"key {key}?"


def make_recall(rng: random.Random, num_pairs: int, depth: float | None = None) -> Task:
    """A list of `num_pairs` pairs and the question for one of them.

    depth: where the asked pair stands, 0 = first, 1 = last; None = anywhere.
    Raises ValueError for num_pairs < 1 or a depth outside 0..1.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; use 1 or more")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; use 0 (first pair) to 1 (last pair), or None")
    pairs = draw_pairs(rng, num_pairs)
    # Drawn whatever the depth, so that the same rng gives the same list at every depth.
    anywhere = rng.randrange(num_pairs)
    key, value = pairs[anywhere if depth is None else round(depth * (num_pairs - 1))]
    return Task(recall_list(pairs) + recall_query(key), value)


def make_needle(rng: random.Random, num_lines: int, depth: float | None = None) -> Task:
    """`num_lines` lines of arithmetic with one pair among them, and the question for that pair.

    depth: where the pair stands, 0 = before all lines, 1 = after them; None = anywhere.
    Raises ValueError for num_lines < 0 or a depth outside 0..1.
    """
    if num_lines < 0:
        raise ValueError(f"num_lines is {num_lines}; use 0 or more")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; use 0 (before all lines) to 1 (after them), or None")
    key, value = draw_pairs(rng, 1)[0]
    lines = [f"{fact(rng, FILLER_BELOW)}\n" for _ in range(num_lines)]
    anywhere = rng.randint(0, num_lines)
    lines.insert(
        anywhere if depth is None else round(depth * num_lines), recall_list([(key, value)])
    )
    return Task("".join(lines) + recall_query(key), value)


def make_copy(rng: random.Random, num_items: int) -> Task:
    """A line of `num_items` words and numbers, to be repeated; all differ while the words last."""
    if num_items < 1:
        raise ValueError(f"num_items is {num_items}; use 1 or more")
    pool = COPY_ITEMS if num_items <= len(COPY_ITEMS) else (*COPY_ITEMS, *MORE_KEYS)
    items: list[str] = []
    while len(items) < num_items:
        items += rng.sample(pool, min(len(pool), num_items - len(items)))
    text = " ".join(items)
    return Task(f"list: {text}\ncopy:", text)


def fit_recall(
    rng: random.Random, length: Length, max_tokens: int, depth: float | None = None
) -> Task:
    """The recall task with the most pairs whose prompt and answer have at most `max_tokens` tokens.

    length: tokens of a text, e.g. lambda text: len(tokenizer.encode(text)).
    Raises ValueError when not even one pair fits.
    """
    return _fit(rng, lambda r, num: make_recall(r, num, depth), length, max_tokens)


def fit_needle(
    rng: random.Random, length: Length, max_tokens: int, depth: float | None = None
) -> Task:
    """The needle task with the most lines whose prompt and answer have at most `max_tokens`."""
    return _fit(rng, lambda r, num: make_needle(r, num, depth), length, max_tokens)


def fit_copy(rng: random.Random, length: Length, max_tokens: int) -> Task:
    """The longest copying task whose prompt and answer have at most `max_tokens` tokens."""
    return _fit(rng, make_copy, length, max_tokens)


def _fit(
    rng: random.Random,
    make: Callable[[random.Random, int], Task],
    length: Length,
    max_tokens: int,
) -> Task:
    seed = rng.getrandbits(64)

    def task(num: int) -> Task:
        return make(random.Random(seed), num)

    def fits(num: int) -> bool:
        drawn = task(num)
        return length(f"{drawn.prompt} {drawn.answer}\n") <= max_tokens

    if not fits(1):
        raise ValueError(f"max_tokens is {max_tokens}; too few for even one item")
    low, high = 1, 2
    while high <= max_tokens and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return task(low)


def recall_document(
    rng: random.Random, length: Length, max_tokens: int, list_share: float = 0.6
) -> str:
    """A training text: a list of about `list_share` of the tokens, then questions with answers.

    Questions ask for the pairs in random order, again and again, until the text is full.
    """
    task = fit_recall(rng, length, max(16, int(max_tokens * list_share)))
    text = task.prompt[: task.prompt.rindex("key ")]
    pairs = [tuple(line[4:].split(": ")) for line in text.splitlines()]
    used = length(text)
    lines: list[str] = []
    while True:
        for key, value in rng.sample(pairs, len(pairs)):
            line = f"{recall_query(key)} {value}\n"
            used += length(line)
            if used > max_tokens and lines:
                return text + "".join(lines)
            lines.append(line)


def needle_document(rng: random.Random, length: Length, max_tokens: int) -> str:
    """A training text: arithmetic with one pair somewhere, then asked for again and again.

    The questions begin anywhere and take every other line, so that both the pair's place and its
    distance from a question take every value.
    """
    task = fit_needle(rng, length, max(24, int(max_tokens * rng.uniform(0.1, 0.9))))
    text = task.prompt[: task.prompt.rindex("key ")]
    query = task.prompt[len(text) :]
    used = length(text)
    lines: list[str] = []
    while True:
        asked = rng.random() < 1 / 2
        line = f"{query} {task.answer}\n" if asked else f"{fact(rng, FILLER_BELOW)}\n"
        used += length(line)
        if used > max_tokens and lines:
            return text + "".join(lines)
        lines.append(line)


def copy_document(rng: random.Random, length: Length, max_tokens: int) -> str:
    """A training text: a line of words and the same line again, about `max_tokens` tokens."""
    task = fit_copy(rng, length, max_tokens)
    return f"{task.prompt} {task.answer}\n"
