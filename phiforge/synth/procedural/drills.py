"""Arithmetic drills: lines of single facts, "12+7=19", the cheapest way to learn small numbers.

`drill_document(rng, below, num_lines)` makes one text. Nothing is written. A worked solution then
has to be taught only which fact comes next, not the facts themselves.
"""

from __future__ import annotations

import random


def fact(rng: random.Random, below: int) -> str:
    """One sum, difference, product or quotient of whole numbers; every number is below `below`."""
    sign = rng.choice("++--**/")
    if sign == "+":
        total = rng.randint(2, below - 1)
        a = rng.randint(1, total - 1)
        return f"{a}+{total - a}={total}"
    if sign == "-":
        a = rng.randint(2, below - 1)
        b = rng.randint(1, a - 1)
        return f"{a}-{b}={a - b}"
    a = rng.randint(2, min(9, (below - 1) // 2))
    b = rng.randint(2, (below - 1) // a)
    return f"{a}*{b}={a * b}" if sign == "*" else f"{a * b}/{a}={b}"


def drill_document(rng: random.Random, below: int, num_lines: int) -> str:
    """`num_lines` facts, one a line. Raises ValueError for `below` under 6: no products fit."""
    if below < 6:
        raise ValueError(f"below is {below}; drills need at least 6")
    return "".join(f"{fact(rng, below)}\n" for _ in range(num_lines))
