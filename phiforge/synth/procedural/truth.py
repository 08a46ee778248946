"""Logic: chains of true and false statements, and people who tell the truth or lie.

`BOOLEAN` and `KNIGHTS` each draw one problem by `generate(rng, level)`, three levels. Solutions
derive one value after the other; the answer is a choice of two words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from phiforge.synth.procedural.family import Draft, Family, refuse, sentences
from phiforge.synth.procedural.words import NAMES

LETTERS = "PQRSTUVWXYZ"
WORDS = {True: "true", False: "false"}
Values = dict[str, bool]


@dataclass(frozen=True)
class Rule:
    """`target` is `operator` of the names in `sources`."""

    target: str
    operator: str
    sources: tuple[str, ...]


OPERATORS: dict[str, Callable[..., bool]] = {
    "is": lambda a: a,
    "not": lambda a: not a,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
    "implies": lambda a, b: not a or b,
}
LEVEL_OPERATORS = {
    1: ("not", "and", "or"),
    2: ("not", "and", "or", "xor"),
    3: ("not", "and", "or", "xor", "implies"),
}
RULE_WORDS = {
    "not": "{t} is not {a}.",
    "and": "{t} is {a} and {b}.",
    "or": "{t} is {a} or {b}.",
    "xor": "{t} is either {a} or {b} but not both.",
    "implies": "{t} is that {a} implies {b}.",
}
OPENINGS = (
    "Facts:",
    "We know this.",
    "Given are the values.",
    "In a circuit of gates,",
    "A table says:",
)
ASKED = (
    "Is {t} true or false?",
    "What is {t}?",
    "Find {t}.",
    "Which value has {t}?",
    "Decide {t}.",
)


def evaluate(base: Values, rules: list[Rule]) -> Values:
    """All values that follow from the base values by the rules, taken in their order."""
    values = dict(base)
    for rule in rules:
        values[rule.target] = OPERATORS[rule.operator](*(values[s] for s in rule.sources))
    return values


def draw_boolean(rng: random.Random, level: int) -> Draft:
    """2 + level given values and as many rules; asks for the last. Bogus: one value unknown."""
    num = 2 + level
    letters = rng.sample(LETTERS, 2 * num)
    base = {letter: rng.random() < 0.5 for letter in letters[:num]}
    rules: list[Rule] = []
    for target in letters[num:]:
        operator = rng.choice(LEVEL_OPERATORS[level])
        # The newest value is always used, so that no rule is idle.
        newest = rules[-1].target if rules else letters[0]
        others = [name for name in (*base, *(rule.target for rule in rules)) if name != newest]
        sources = (newest,) if operator == "not" else (newest, rng.choice(others))
        rules.append(Rule(target, operator, tuple(rng.sample(sources, len(sources)))))
    values = evaluate(base, rules)
    target = rules[-1].target
    opening, asked = rng.choice(OPENINGS), rng.choice(ASKED).format(t=target)
    given = [f"{name} is {WORDS[value]}." for name, value in base.items()]
    told = [_rule_text(rule) for rule in rules]
    rng.shuffle(given)
    unknown = _decisive(base, rules, target)
    blurred = [f"{unknown} is unknown." if g.startswith(f"{unknown} ") else g for g in given]
    return Draft(
        question=sentences([opening, *given, *told, asked]),
        steps=tuple(f"{rule.target} is {WORDS[values[rule.target]]}" for rule in rules),
        answer=WORDS[values[target]],
        kind="choice",
        key=" ".join(sorted(given) + told),
        bogus_question=sentences([opening, *blurred, *told, asked]) if unknown else None,
        refusal=refuse(f"{unknown} is unknown and decides") if unknown else None,
    )


def _rule_text(rule: Rule) -> str:
    return RULE_WORDS[rule.operator].format(t=rule.target, a=rule.sources[0], b=rule.sources[-1])


def _decisive(base: Values, rules: list[Rule], target: str) -> str | None:
    """A base value that changes the target when it alone changes; None when there is none."""
    now = evaluate(base, rules)[target]
    for name, value in base.items():
        if evaluate({**base, name: not value}, rules)[target] != now:
            return name
    return None


TRUTHFUL = {True: "is honest", False: "lies"}
SAYS = {
    True: ("{a} says that {b} is honest.", "{a} says that {b} tells the truth."),
    False: ("{a} says that {b} lies.", "{a} calls {b} a liar."),
}
STARTS = {
    True: ("{a} is honest.", "{a} always tells the truth.", "It is known that {a} is honest."),
    False: ("{a} lies.", "{a} is a liar.", "It is known that {a} lies."),
}
SCENES = (
    "Each person lies or is honest.",
    "On an island everyone lies always or never.",
    "In a club all are liars or honest.",
    "A judge hears people who always lie or never do.",
    "Here people are honest or they lie.",
)


def draw_knights(rng: random.Random, level: int) -> Draft:
    """A chain of 3, 4 or 6 statements about the next person; asks for the last one."""
    line = rng.sample(NAMES, level + 3 if level < 3 else 7)
    honest = [rng.random() < 0.5 for _ in line]
    said = [
        rng.choice(SAYS[honest[i] == honest[i + 1]]).format(a=line[i], b=line[i + 1])
        for i in range(len(line) - 1)
    ]
    start = rng.choice(STARTS[honest[0]]).format(a=line[0])
    scene, asked = rng.choice(SCENES), f"Is {line[-1]} honest or does {line[-1]} lie?"
    order = list(range(len(said)))
    if level > 1:
        rng.shuffle(order)
    lost = rng.randrange(len(said))
    told = [said[i] for i in order]
    gap = [said[i] for i in order if i != lost]
    values = "".join("H" if value else "L" for value in honest)
    return Draft(
        question=sentences([scene, start, *told, asked]),
        steps=tuple(f"{n} {TRUTHFUL[h]}" for n, h in zip(line, honest, strict=True)),
        answer="honest" if honest[-1] else "lies",
        kind="choice",
        key=f"{' '.join(line)} {values}",
        bogus_question=sentences([scene, start, *gap, asked]),
        refusal=refuse(f"{line[lost]} says nothing of {line[lost + 1]}"),
    )


BOOLEAN = Family("boolean", "logic", 3, draw_boolean)
KNIGHTS = Family("knights", "logic", 3, draw_knights)
