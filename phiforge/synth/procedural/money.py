"""Finance: percentages, interest and buying on credit; amounts are exact to the cent.

`PERCENT`, `INTEREST` and `CREDIT` each draw one problem by `generate(rng, level)`, three levels.
Operands are chosen so that every line of a solution is exact.
"""

from __future__ import annotations

import random
from fractions import Fraction

from phiforge.synth.procedural.family import Draft, Family, tell
from phiforge.synth.procedural.words import GOODS, NAMES

LOWER = (
    "A {good} of {price} dollars is {rate} percent cheaper{then}. {ask}",
    "The price of a {good} is {price} dollars and falls by {rate} percent{then}. {ask}",
    "{name} gets {rate} percent off a {good} of {price} dollars{then}. {ask}",
    "A shop takes {rate} percent off the {price} dollars for a {good}{then}. {ask}",
    "A {good} costs {price} dollars before a discount of {rate} percent{then}. {ask}",
)
HIGHER = (
    "A {good} of {price} dollars gets {rate} percent dearer{then}. {ask}",
    "The price of a {good} is {price} dollars and rises by {rate} percent{then}. {ask}",
    "{name} sells a {good} bought for {price} dollars at {rate} percent more{then}. {ask}",
    "A tax of {rate} percent is added to {price} dollars for a {good}{then}. {ask}",
    "A {good} costs {price} dollars before a rise of {rate} percent{then}. {ask}",
)
ASKS = ("What is the price now?", "What is the new price in dollars?", "What does it cost then?")
BEFORE = (
    "After a discount of {rate} percent a {good} costs {price} dollars. What did it cost before?",
    "{name} pays {price} dollars for a {good} that is {rate} percent cheaper. "
    "What was the old price?",
    "A {good} is {rate} percent off and now {price} dollars. What was the first price?",
    "The price of a {good} fell by {rate} percent to {price} dollars. How much was it?",
    "With {rate} percent off {name} gives {price} dollars for a {good}. What was its full price?",
)
RATES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75)


def money(amount: Fraction) -> str:
    """An amount as text: Fraction(57, 2) -> "28.5". It must be whole in ten-thousandths."""
    whole = amount * 10_000
    assert whole.denominator == 1, f"{amount} has more than four decimals"
    text = f"{int(whole) // 10_000}.{int(whole) % 10_000:04d}"
    return text.rstrip("0").rstrip(".")


def _change(amount: Fraction, rate: int, sign: str) -> tuple[Fraction, list[str]]:
    """The amount after a rise or fall by `rate` percent, and the lines that compute it."""
    product = amount * rate
    part = product / 100
    after = amount + part if sign == "+" else amount - part
    return after, [
        f"{money(amount)}*{rate}={money(product)}",
        f"{money(product)}/100={money(part)}",
        f"{money(amount)}{sign}{money(part)}={money(after)}",
    ]


def draw_percent(rng: random.Random, level: int) -> Draft:
    """Level 1: one change of a price; 2: two changes; 3: the price before a change."""
    words = {"name": rng.choice(NAMES), "good": rng.choice(GOODS), "ask": rng.choice(ASKS)}
    if level == 3:
        return _percent_before(rng, words)
    price = rng.randint(10, 999) if level == 1 else rng.randint(2, 999) * 20
    rate, sign = rng.choice(RATES), rng.choice("+-")
    after, steps = _change(Fraction(price), rate, sign)
    key, then = f"{price}{sign}{rate}%", ""
    if level == 2:
        second, way = rng.choice(RATES), rng.choice("+-")
        after, more = _change(after, second, way)
        steps += more
        key += f"{way}{second}%"
        then = f", and later {second} percent {'up' if way == '+' else 'down'}"
    values = {**words, "price": price, "rate": rate, "then": then}
    return _finish(rng, HIGHER if sign == "+" else LOWER, values, steps, money(after), key)


def _percent_before(rng: random.Random, words: dict[str, str]) -> Draft:
    rate, before = rng.choice(RATES), rng.randint(2, 4999) * 20
    left = 100 - rate
    now = before * left // 100
    steps = [f"100-{rate}={left}", f"{now}*100={now * 100}", f"{now * 100}/{left}={before}"]
    values = {**words, "price": now, "rate": rate}
    return _finish(rng, BEFORE, values, steps, str(before), f"{now}<-{rate}%")


SIMPLE = (
    "{name} saves {sum} dollars at {rate} percent simple interest for {years} years. {ask}",
    "A bank pays {rate} percent simple interest a year on {sum} dollars. {ask} It runs for "
    "{years} years.",
    "{sum} dollars are lent for {years} years at {rate} percent simple interest a year. {ask}",
    "A loan of {sum} dollars costs {rate} percent simple interest a year for {years} years. {ask}",
    "For {years} years {sum} dollars earn {rate} percent simple interest each year. {ask}",
)
COMPOUND = (
    "{name} saves {sum} dollars at {rate} percent compound interest for {years} years. {ask}",
    "A bank adds {rate} percent interest to {sum} dollars at the end of each of {years} years. "
    "{ask}",
    "{sum} dollars grow by {rate} percent a year for {years} years. {ask}",
    "A fund of {sum} dollars grows {rate} percent each year for {years} years. {ask}",
    "For {years} years the interest of {rate} percent stays with the {sum} dollars. {ask}",
)


def draw_interest(rng: random.Random, level: int) -> Draft:
    """Level 1: simple interest; 2: compound over two years; 3: compound over three years."""
    rate = rng.randint(1, 12 if level == 1 else 20)
    years = rng.randint(2, 9) if level == 1 else level
    amount = rng.randint(1, 999) * (100 if level < 3 else 10_000)
    name = rng.choice(NAMES)
    if level == 1:
        yearly = amount * rate // 100
        steps = [
            f"{amount}*{rate}={amount * rate}",
            f"{amount * rate}/100={yearly}",
            f"{yearly}*{years}={yearly * years}",
        ]
        answer, ask, templates = str(yearly * years), "How much interest is that in all?", SIMPLE
    else:
        total, steps = Fraction(amount), []
        for _ in range(years):
            total, lines = _change(total, rate, "+")
            steps += lines
        answer, ask, templates = money(total), "How many dollars are there then?", COMPOUND
    values = {"name": name, "sum": amount, "rate": rate, "years": years, "ask": ask}
    kind = "simple" if level == 1 else "compound"
    return _finish(rng, templates, values, steps, answer, f"{kind} {amount} {rate}% {years}")


CREDIT_TEMPLATES = (
    "A {good} costs {price} dollars in cash, or {down} dollars now and {n} payments of {rate} "
    "dollars. How much more is the second way?",
    "{name} pays {down} dollars and then {n} times {rate} dollars for a {good} worth {price} "
    "dollars. How much is paid above the price?",
    "The cash price of a {good} is {price} dollars. On credit it is {down} dollars and {n} "
    "months of {rate} dollars. What does the credit cost?",
    "For a {good} of {price} dollars {name} gives {down} dollars at once and {rate} dollars in "
    "each of {n} months. How many dollars too much is that?",
    "Buying a {good} takes {down} dollars plus {n} rates of {rate} dollars. Its price is {price} "
    "dollars. What is the extra cost?",
)


def draw_credit(rng: random.Random, level: int) -> Draft:
    """The extra cost of instalments; levels 1, 2, 3 stay below 100, 1,000 and 10,000."""
    limit = 10 ** (level + 1)
    n = rng.randint(2, 9 if level == 1 else 24)
    rate = rng.randint(2, limit * 7 // 10 // n)
    paid = n * rate
    down = rng.randint(2, limit - 1 - paid)
    total = paid + down
    price = rng.randint(max(2, total * 6 // 10), total - 1)
    steps = [f"{n}*{rate}={paid}", f"{paid}+{down}={total}", f"{total}-{price}={total - price}"]
    values = {
        "name": rng.choice(NAMES),
        "good": rng.choice(GOODS),
        "price": price,
        "down": down,
        "n": n,
        "rate": rate,
    }
    key = f"{n}x{rate}+{down}-{price}"
    return _finish(rng, CREDIT_TEMPLATES, values, steps, str(total - price), key)


def _finish(
    rng: random.Random,
    templates: tuple[str, ...],
    values: dict[str, object],
    steps: list[str],
    answer: str,
    key: str,
) -> Draft:
    missing = {
        "price": "the price is not given",
        "rate": f"the {'payment' if templates is CREDIT_TEMPLATES else 'rate'} is not given",
        "sum": "the sum of money is not given",
        "years": "the number of years is not given",
        "down": "the first payment is not given",
        "n": "the number of payments is not given",
    }
    told = tell(rng, templates, values, missing)
    return Draft(told.question, tuple(steps), answer, "number", key, told.bogus, told.refusal)


PERCENT = Family("percent", "finance", 3, draw_percent)
INTEREST = Family("interest", "finance", 3, draw_interest)
CREDIT = Family("credit", "finance", 3, draw_credit)
