"""Finance: change after shopping, savings plans and simple discounts, with whole dollars.

`BUDGET.generate(rng, level)` draws one. Level 1 keeps every number below 60, level 2 below 1,000,
level 3 has one more purchase and stays below 10,000.
"""

from __future__ import annotations

import random

from phiforge.synth.procedural.family import Draft, Family, tell
from phiforge.synth.procedural.words import GOODS, NAMES, plural

LIMITS = {1: 60, 2: 1_000, 3: 10_000}

SHOPPING = (
    "{name} has {money} dollars and buys {n} {goods} at {price} dollars each{more}. "
    "How many dollars are left?",
    "{name} buys {n} {goods} for {price} dollars each{more} and pays with {money} dollars. "
    "How much is the change?",
    "The budget is {money} dollars. {name} orders {n} {goods} at {price} dollars each{more}. "
    "What is left?",
    "With {money} dollars {name} pays for {n} {goods} of {price} dollars each{more}. "
    "How much money remains?",
    "A shop sells {goods} at {price} dollars. {name} takes {n} of them{more} and gives "
    "{money} dollars. What change is due?",
)
SAVING = (
    "{name} has {money} dollars and saves {price} dollars a week for {n} weeks, "
    "then spends {spent} dollars. How much is left?",
    "{name} earns {price} dollars a day for {n} days and had {money} dollars before. "
    "After paying {spent} dollars, what is left?",
    "An account holds {money} dollars. {name} pays in {price} dollars {n} times and takes out "
    "{spent} dollars. What is the balance?",
    "A fund of {money} dollars gets {n} payments of {price} dollars and then pays {spent} dollars. "
    "What is in the fund?",
    "{name} starts with {money} dollars, gets {price} dollars a month for {n} months and spends "
    "{spent} dollars. How much remains?",
)
DISCOUNT = (
    "A {good} costs {price} dollars, now {off} dollars less. {name} buys {n} and pays with "
    "{money} dollars. What is the change?",
    "{name} has {money} dollars. Each {good} is {price} dollars minus a discount of {off} "
    "dollars. What is left after buying {n}?",
    "The price of a {good} falls by {off} dollars from {price} dollars. {name} buys {n} out of "
    "{money} dollars. How much remains?",
    "{name} gets {off} dollars off each {good} of {price} dollars, buys {n} and gives {money} "
    "dollars. How much comes back?",
    "With {money} dollars {name} buys {n} {goods} at {price} dollars less {off} dollars each. "
    "How much money is left?",
)


def draw(rng: random.Random, level: int) -> Draft:
    """One of the three forms; the answer is an amount of whole dollars."""
    form = rng.choice((_shopping, _shopping, _saving, _discount))
    return form(rng, level, LIMITS[level])


def _words(rng: random.Random) -> dict[str, object]:
    good = rng.choice(GOODS)
    return {"name": rng.choice(NAMES), "good": good, "goods": plural(good)}


def _product(rng: random.Random, below: int, level: int) -> tuple[int, int]:
    """Two factors >= 2 whose product is below `below` (which is at least 8)."""
    n = rng.randint(2, min(9 if level == 1 else 12, (below - 1) // 2))
    return n, rng.randint(2, min((below - 1) // n, 30 if level == 1 else below))


def _shopping(rng: random.Random, level: int, limit: int) -> Draft:
    n, price = _product(rng, limit * 3 // 4, level)
    cost = n * price
    steps = [f"{n}*{price}={cost}"]
    extras: list[int] = []
    more = ""
    for _ in range(rng.choice((0, 1, 1)) + level // 3):
        extra = rng.randint(2, (limit - 1 - cost) // 3)
        extras.append(extra)
        steps.append(f"{cost}+{extra}={cost + extra}")
        cost += extra
        more += f" and a {rng.choice(GOODS)} for {extra} dollars"
    money = rng.randint(cost + 1, limit - 1)
    steps.append(f"{money}-{cost}={money - cost}")
    key = f"shop {money} {n}x{price} {extras}"
    values = {**_words(rng), "money": money, "n": n, "price": price, "more": more}
    return _finish(rng, SHOPPING, values, steps, money - cost, key)


def _saving(rng: random.Random, level: int, limit: int) -> Draft:
    n, price = _product(rng, limit * 3 // 4, level)
    saved = n * price
    money = rng.randint(2, limit - 1 - saved)
    spent = rng.randint(2, saved + money - 1)
    total = money + saved
    steps = [f"{n}*{price}={saved}", f"{money}+{saved}={total}", f"{total}-{spent}={total - spent}"]
    values = {**_words(rng), "money": money, "n": n, "price": price, "spent": spent}
    key = f"save {money} {n}x{price} {spent}"
    return _finish(rng, SAVING, values, steps, total - spent, key)


def _discount(rng: random.Random, level: int, limit: int) -> Draft:
    n, net = _product(rng, limit * 9 // 10, level)
    cost = n * net
    off = rng.randint(2, max(2, min(limit - 1 - net, limit // 2)))
    money = rng.randint(cost + 1, limit - 1)
    steps = [f"{net + off}-{off}={net}", f"{n}*{net}={cost}", f"{money}-{cost}={money - cost}"]
    values = {**_words(rng), "money": money, "n": n, "price": net + off, "off": off}
    key = f"off {money} {n}x({net + off}-{off})"
    return _finish(rng, DISCOUNT, values, steps, money - cost, key)


def _finish(
    rng: random.Random,
    templates: tuple[str, ...],
    values: dict[str, object],
    steps: list[str],
    answer: int,
    key: str,
) -> Draft:
    saving = templates is SAVING
    missing = {
        "money": "the amount of money is not given",
        "n": f"the number of {'payments' if saving else values['goods']} is not given",
        "price": f"the {'amount of each payment' if saving else 'price'} is not given",
        "spent": "the amount spent is not given",
        "off": "the discount is not given",
    }
    told = tell(rng, templates, values, missing)
    return Draft(
        question=told.question,
        steps=tuple(steps),
        answer=str(answer),
        kind="number",
        key=key,
        bogus_question=told.bogus,
        refusal=told.refusal,
    )


BUDGET = Family("budget", "finance", 3, draw)
