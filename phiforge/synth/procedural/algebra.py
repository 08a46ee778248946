"""Mathematics: linear equations, number sequences and drawing from an urn.

`EQUATIONS`, `SEQUENCES` and `PROBABILITY` each draw one problem by `generate(rng, level)`.
Three levels each. Equations have whole solutions; probabilities are reduced fractions.
"""

from __future__ import annotations

import math
import random

from phiforge.synth.procedural.family import Draft, Family, refuse, tell

SOLVE = (
    "Solve {left}={right} for x.",
    "Find x if {left}={right}.",
    "For which x is {left}={right}?",
    "The equation is {left}={right}. What is x?",
    "What number x makes {left}={right} true?",
)


def draw_equation(rng: random.Random, level: int) -> Draft:
    """a*x+b=c; from level 2 a*x+b=c*x+d; level 3 with a bracket. Bogus: no x fits."""
    x = rng.randint(2, 20 * level)
    a = rng.randint(2, 9 if level == 1 else 12)
    b = rng.randint(1, 90) * rng.choice((1, 1, -1))
    c = rng.randint(2, 11)
    if level == 2:
        a += 12
    if (a - c if level == 2 else a) * x + b <= 0:
        b = -b  # no line of a solution starts with a negative number
    form = (_one_sided, _two_sided, _bracket)[level - 1]
    left, right, steps = form(a, b, c, x)
    wording = rng.choice(SOLVE)
    # The same left side on both sides, with another constant: it holds for no x.
    off = rng.randint(1, 20)
    return Draft(
        question=wording.format(left=left, right=right),
        steps=tuple(steps),
        answer=str(x),
        kind="number",
        key=f"{left}={right}",
        bogus_question=wording.format(left=left, right=f"{left}+{off}"),
        refusal=refuse(f"the sides always differ by {off}, so no x fits"),
    )


def _signed(number: int) -> str:
    return f"+{number}" if number >= 0 else str(number)


def _undo(total: int, b: int) -> str:
    """The line that takes b from a total: (31, 4) -> "31-4=27"; (31, -4) -> "31+4=35"."""
    return f"{total}{_signed(-b)}={total - b}"


def _one_sided(a: int, b: int, _: int, x: int) -> tuple[str, str, list[str]]:
    total = a * x + b
    return f"{a}*x{_signed(b)}", str(total), [_undo(total, b), f"{a * x}/{a}={x}"]


def _two_sided(a: int, b: int, c: int, x: int) -> tuple[str, str, list[str]]:
    d = (a - c) * x + b
    steps = [f"{a}-{c}={a - c}", _undo(d, b), f"{d - b}/{a - c}={x}"]
    return f"{a}*x{_signed(b)}", f"{c}*x{_signed(d)}", steps


def _bracket(a: int, b: int, c: int, x: int) -> tuple[str, str, list[str]]:
    inner = a * x + b
    steps = [f"{c * inner}/{c}={inner}", _undo(inner, b), f"{a * x}/{a}={x}"]
    return f"{c}*({a}*x{_signed(b)})", str(c * inner), steps


NEXT = (
    "A sequence is {terms}. What is the next number?",
    "What comes next: {terms}?",
    "Continue the sequence {terms} by one number.",
    "The numbers are {terms}, and so on. Which number follows?",
    "Find the number after {terms}.",
)


def draw_sequence(rng: random.Random, level: int) -> Draft:
    """Level 1: one or two alternating differences; 2: also factors; 3: growing differences."""
    kind = rng.choice(KINDS[level])
    terms, steps = DRAW_TERMS[kind](rng, level)
    shown = terms[:-1]
    wording = rng.choice(NEXT)
    return Draft(
        question=wording.format(terms=_list(shown)),
        steps=tuple(steps),
        answer=str(terms[-1]),
        kind="number",
        key=_list(shown),
        bogus_question=wording.format(terms=str(shown[0])),
        refusal=refuse("one number gives no rule"),
    )


def _list(terms: list[int]) -> str:
    return ", ".join(map(str, terms))


def _adding(rng: random.Random, level: int) -> tuple[list[int], list[str]]:
    num = rng.randint(4, 5)
    if level == 1:
        step = rng.randint(2, 15)
        start = rng.randint(1, 99 - (num - 1) * step)
    else:
        start, step = rng.randint(1, 200), rng.randint(5, 90)
    terms = [start + i * step for i in range(num)]
    if rng.random() < 0.4:
        terms = terms[::-1]
    sign = "+" if terms[1] > terms[0] else "-"
    high, low = max(terms[:2]), min(terms[:2])
    return terms, [f"{high}-{low}={step}", f"{terms[-2]}{sign}{step}={terms[-1]}"]


def _multiplying(rng: random.Random, level: int) -> tuple[list[int], list[str]]:
    start, factor = rng.randint(2, 300), rng.randint(2, 5 + level)
    terms = [start * factor**i for i in range(5)]
    return terms, [f"{terms[1]}/{terms[0]}={factor}", f"{terms[-2]}*{factor}={terms[-1]}"]


def _growing(rng: random.Random, level: int) -> tuple[list[int], list[str]]:
    terms = [rng.randint(1, 90)]
    step, growth = rng.randint(2, 30), rng.randint(1, 9)
    steps = []
    for _ in range(3):
        terms.append(terms[-1] + step)
        steps.append(f"{terms[-1]}-{terms[-2]}={step}")
        step += growth
    last = step - growth
    steps += [f"{last}-{last - growth}={growth}", f"{last}+{growth}={step}"]
    steps.append(f"{terms[-1]}+{step}={terms[-1] + step}")
    return [*terms, terms[-1] + step], steps


def _alternating(rng: random.Random, level: int) -> tuple[list[int], list[str]]:
    """s, s+a, s+a+b, s+2a+b, ... with differences a and b of either sign, all terms positive."""
    most = 20 * level * level
    a, b = (rng.choice((1, -1)) * rng.randint(2, most) for _ in range(2))
    offsets = [0, a, a + b, 2 * a + b, 2 * a + 2 * b, 3 * a + 2 * b]
    high = 99 if level == 1 else 999
    room = high - max(offsets) + min(offsets)
    if a == b or room < 2:
        return _alternating(rng, level)
    start = rng.randint(1, room) - min(offsets)
    terms = [start + offset for offset in offsets]
    steps = []
    for one, two in ((terms[0], terms[1]), (terms[1], terms[2])):
        steps.append(f"{max(one, two)}-{min(one, two)}={abs(one - two)}")
    steps.append(f"{terms[-2]}{'+' if a > 0 else '-'}{abs(a)}={terms[-1]}")
    return terms, steps


KINDS = {
    1: ("add", "alternate", "alternate", "alternate"),
    2: ("add", "alternate", "multiply"),
    3: ("grow", "grow", "multiply"),
}
DRAW_TERMS = {
    "add": _adding,
    "alternate": _alternating,
    "multiply": _multiplying,
    "grow": _growing,
}

URN = (
    "A bag holds {a} red, {b} blue and {c} green balls. {act} is {goal}?",
    "There are {a} red, {b} blue and {c} green cards in a box. {act} is {goal}?",
    "In a jar are {a} red, {b} blue and {c} green stones. {act} is {goal}?",
    "From {a} red, {b} blue and {c} green tickets some are drawn blind. {act} is {goal}?",
    "A drawer has {a} red, {b} blue and {c} green pens. {act} is {goal}?",
)
ACTS = {
    1: "One is taken. What is the probability that it",
    2: "One is taken. What is the probability that it",
    3: "Two are taken, one after the other, without putting back. "
    "What is the probability that each",
}


def draw_probability(rng: random.Random, level: int) -> Draft:
    """Level 1: one colour; 2: not one colour; 3: two of one colour without putting back."""
    counts = [rng.randint(2, 30 if level == 1 else 12 * level) for _ in range(3)]
    index = rng.randrange(3)
    colour = ("red", "blue", "green")[index]
    total = sum(counts)
    first = counts[0] + counts[1]
    steps = [f"{counts[0]}+{counts[1]}={first}", f"{first}+{counts[2]}={total}"]
    top, bottom = counts[index], total
    if level == 2:
        top = total - counts[index]
        steps.append(f"{total}-{counts[index]}={top}")
    if level == 3:
        n = counts[index]
        top, bottom = n * (n - 1), total * (total - 1)
        steps += [f"{n}*{n - 1}={top}", f"{total}*{total - 1}={bottom}"]
    divisor = math.gcd(top, bottom)
    answer = f"{top // divisor}/{bottom // divisor}"
    if divisor > 1:
        steps.append(f"{top}/{bottom}={answer}")
    goal = f"not {colour}" if level == 2 else colour
    values = {**dict(zip("abc", counts, strict=True)), "act": ACTS[level], "goal": goal}
    names = zip("abc", ("red", "blue", "green"), strict=True)
    missing = {letter: f"the number of {name} ones is not given" for letter, name in names}
    told = tell(rng, URN, values, missing)
    key = f"{counts} {goal} {'pair' if level == 3 else 'one'}"
    return Draft(told.question, tuple(steps), answer, "number", key, told.bogus, told.refusal)


EQUATIONS = Family("equations", "mathematics", 3, draw_equation)
SEQUENCES = Family("sequences", "mathematics", 3, draw_sequence)
PROBABILITY = Family("probability", "mathematics", 3, draw_probability)
