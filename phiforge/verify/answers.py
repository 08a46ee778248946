"""Decides whether a response answers a problem: number, unit, choice, text or refusal.

Call `is_correct(problem, response)`; `problem.kind` names the comparison. Exact arithmetic, no
tolerance. Nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from phiforge.core.records import Problem

KINDS = ("number", "unit", "choice", "text", "refusal")

_ANSWER = re.compile(r"\banswer(?:\s+is)?[ \t*_]*[:=][ \t*_]*([^\n]*)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_REFUSAL = re.compile(
    r"\b(?:i\s+(?:cannot|can't|can\s+not|am\s+unable\s+to|am\s+not\s+able\s+to)\s+(?:answer|say|tell|know)"
    r"|i\s+(?:do\s+not|don't)\s+know"
    r"|(?:this|it|the\s+question)\s+(?:cannot|can't)\s+be\s+(?:answered|determined)"
    r"|not\s+enough\s+information)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"""(?P<sign>[+-])?\s*(?:
        (?P<whole>[0-9]{1,60})[ ](?P<top>[0-9]{1,60})/(?P<bottom>[0-9]{1,60})   # 1 1/2
      | (?P<up>[0-9]{1,60})\s?/\s?(?P<down>[0-9]{1,60})                         # 3/8
      | (?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,60})(?:\.[0-9]{0,60})?|\.[0-9]{1,60})
    )""",
    re.VERBOSE,
)
_WORDS = re.compile(r"[A-Za-z%°€£ \t./^-]*")

# unit -> (dimension, size in the dimension's base unit); exact, so that 1.5 km equals 1500 m.
_UNITS: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, **sizes: int | str) -> None:
    for names, size in sizes.items():
        for name in names.split("__"):
            _UNITS[name] = (dimension, Fraction(size))


_define(
    "length",
    m__meter__meters__metre__metres=1,
    km__kilometer__kilometers__kilometre__kilometres=1000,
)
_define("length", cm__centimeter__centimeters="1/100", mm__millimeter__millimeters="1/1000")
_define("time", s__second__seconds=1, min__minute__minutes=60, h__hour__hours=3600)
_define("time", day__days=86400, week__weeks=604800)
_define("mass", g__gram__grams=1, kg__kilogram__kilograms=1000, t__ton__tons__tonne__tonnes=10**6)
_define("volume", l__liter__liters__litre__litres=1, ml__milliliter__milliliters="1/1000")
_define(
    "voltage", V__volt__volts=1, mV__millivolt__millivolts="1/1000", kV__kilovolt__kilovolts=1000
)
_define("current", A__ampere__amperes__amp__amps=1, mA__milliampere__milliamperes="1/1000")
_define("resistance", ohm__ohms__Ω=1, kΩ__kiloohm__kiloohms__kohm=1000)
_define("power", W__watt__watts=1, kW__kilowatt__kilowatts=1000)
_define("energy", J__joule__joules=1, kJ__kilojoule__kilojoules=1000, kWh=3_600_000, Wh=3600)
_UNITS["m/s"] = ("speed", Fraction(1))
_UNITS["km/h"] = ("speed", Fraction(1000, 3600))


class OracleError(Exception):
    """The oracle could not tell; the response stays unscored and never counts as wrong."""


def is_correct(problem: Problem, response: str) -> bool:
    """Whether `response` answers `problem`, compared as `problem.kind` says.

    "number": equal values (3.50 = 3.5 = 7/2), words after the number are ignored; "unit": equal
    quantities in any unit of the same dimension; "choice": the same letter or word; "text": the
    same text but for case, spaces and closing punctuation; "refusal": the response refuses.

    Raises OracleError when the problem itself cannot be checked.
    """
    if problem.kind not in KINDS:
        raise OracleError(
            f"problem {problem.id}: kind is {problem.kind!r}; allowed is one of {', '.join(KINDS)}"
        )
    if problem.kind == "refusal":
        return is_refusal(response)
    if problem.answer is None:
        raise OracleError(f"problem {problem.id}: no reference answer for kind {problem.kind!r}")
    given = extract_answer(response)
    try:
        return given is not None and _EQUAL[problem.kind](given, problem.answer)
    except ValueError as error:
        raise OracleError(f"problem {problem.id}: {error}") from None


def extract_answer(text: str) -> str | None:
    """What follows the last "Answer:" of a text, up to the line's end; None when there is none.

    Markdown emphasis, dollar signs of LaTeX and \\boxed{} are taken off.
    """
    found = _ANSWER.findall(text)
    if not found:
        return None
    answer = found[-1].strip()
    boxed = _BOXED.search(answer)
    answer = (boxed.group(1) if boxed else answer).strip().strip("*_`").strip()
    if len(answer) > 1 and answer.startswith("$") and answer.endswith("$"):
        answer = answer[1:-1].strip()
    return answer or None


def is_refusal(text: str) -> bool:
    """Whether a response refuses to answer; one that refuses and then answers does not refuse."""
    return bool(_REFUSAL.search(text.replace("’", "'"))) and extract_answer(text) is None


def parse_number(text: str) -> tuple[Fraction, str] | None:
    """The value of a text that starts with a number, and the rest after it; None otherwise.

    Understands signs, thousands commas, decimals, fractions and mixed fractions; a leading "$".
    """
    text = text.strip().replace("−", "-")
    text = re.sub(r"^([+-]?)\s*[$€£]\s*", r"\1", text)
    match = _NUMBER.match(text)
    if match is None:
        return None
    part = match.groupdict()
    if part["whole"] is not None:
        top, bottom, whole = int(part["top"]), int(part["bottom"]), int(part["whole"])
    else:
        top, bottom, whole = int(part["up"] or 0), int(part["down"] or 1), 0
    if bottom == 0:
        return None
    decimal = part["decimal"]
    value = (
        Fraction(decimal.replace(",", "").rstrip(".")) if decimal else whole + Fraction(top, bottom)
    )
    return (-value if part["sign"] == "-" else value), text[match.end() :].strip()


def _equal_number(given: str, reference: str) -> bool:
    wanted = parse_number(reference)
    if wanted is None or not _WORDS.fullmatch(wanted[1]):
        raise ValueError(f"the reference answer {reference!r} is not a number")
    found = parse_number(given)
    # Words after the number are a unit; another number there ("12 or 13") is no answer.
    return found is not None and bool(_WORDS.fullmatch(found[1])) and found[0] == wanted[0]


def parse_quantity(text: str) -> tuple[Fraction, str] | None:
    """A number with a known unit as (value in base units, dimension)."""
    parsed = parse_number(text)
    if parsed is None:
        return None
    name = parsed[1].rstrip(".").strip()
    unit = _UNITS.get(name) or _UNITS.get(name.lower() if len(name) > 2 else name)
    return (parsed[0] * unit[1], unit[0]) if unit else None


def _equal_quantity(given: str, reference: str) -> bool:
    wanted = parse_quantity(reference)
    if wanted is None:
        raise ValueError(
            f"the reference answer {reference!r} is not a number with one of the units "
            f"{', '.join(_UNITS)}"
        )
    return parse_quantity(given) == wanted


def _normal(text: str) -> str:
    text = " ".join(text.casefold().split())
    return text.strip("\"'`*_“”‘’ ").rstrip(".!;,").strip("\"'`*_“”‘’ ")


def _equal_choice(given: str, reference: str) -> bool:
    letter = re.match(r"\(?([A-Za-z])(?:\)|\.|:)", given.strip())
    if letter and len(reference.strip()) == 1:
        return letter.group(1).casefold() == reference.strip().casefold()
    return _normal(given).strip("()") == _normal(reference).strip("()")


def _equal_text(given: str, reference: str) -> bool:
    return _normal(given) == _normal(reference)


_EQUAL: dict[str, Callable[[str, str], bool]] = {
    "number": _equal_number,
    "unit": _equal_quantity,
    "choice": _equal_choice,
    "text": _equal_text,
}
