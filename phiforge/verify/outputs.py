"""What a program printed or returned, against what was expected: the rules of contest judges.

`same_output(printed, expected)` for texts, `same_value(value, expected)` for JSON values. Writes
nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """Whether a program printed what was expected.

    Line by line, where spaces at the ends of lines and empty lines at the end do not count. With
    `tolerance` word by word, and numbers may differ by that much, absolutely or relatively.
    """
    if tolerance is None:
        return _lines(printed) == _lines(expected)
    got, wanted = printed.split(), expected.split()
    return len(got) == len(wanted) and all(
        a == b or _close(_number(a), _number(b), tolerance)
        for a, b in zip(got, wanted, strict=True)
    )


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _number(word: str) -> float | None:
    return float(word) if _NUMBER.fullmatch(word) else None


def _close(a: float | None, b: float | None, tolerance: float) -> bool:
    """Whether two numbers, of which `b` is the expected one, are finite and near each other."""
    if a is None or b is None:
        return False
    try:
        finite = math.isfinite(a) and math.isfinite(b)
        return finite and abs(a - b) <= tolerance * max(1.0, abs(b))
    except OverflowError:  # an int beyond all floats
        return False


def first_difference(printed: str, expected: str) -> str:
    """The first line that differs, for people."""
    got, wanted = _lines(printed), _lines(expected)
    for i in range(max(len(got), len(wanted))):
        a = got[i] if i < len(got) else None
        b = wanted[i] if i < len(wanted) else None
        if a != b:
            shown = ("nothing" if x is None else repr(cut(x, 80)) for x in (b, a))
            return f"line {i + 1}: expected {{}}, printed {{}}".format(*shown)
    return "the words are the same but their numbers differ"


def same_value(value: Any, expected: Any, tolerance: float | None = None) -> bool:
    """Whether two JSON values are equal, numbers anywhere in them to within `tolerance`."""
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(
            same_value(a, b, tolerance) for a, b in zip(value, expected, strict=True)
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            same_value(value[key], expected[key], tolerance) for key in expected
        )
    if value == expected or tolerance is None:
        return value == expected
    numbers = [None if isinstance(x, bool) else x for x in (value, expected)]
    a, b = (x if isinstance(x, (int, float)) else None for x in numbers)
    return _close(a, b, tolerance)


def cut(text: str, length: int) -> str:
    """The beginning of a text, and how much is left out."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text) - length} more)"
