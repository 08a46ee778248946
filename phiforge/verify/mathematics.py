r"""Mathematical answers: the final answer of a worked solution, and whether two answers are equal.

`with Mathematics() as math: math.is_equal(r"\frac12", "0.5")`; `final_answer(response)` finds what
to compare; `is_close(given, reference, tolerance)` compares numbers with units. Writes nothing.
"""

from __future__ import annotations

import json
import queue
import re
import sys
import threading
from fractions import Fraction

from phiforge.verify.answers import OracleError, extract_answer, parse_number, parse_quantity
from phiforge.verify.equivalence import MAX_CHARACTERS
from phiforge.verify.line_process import LineProcess, ProgramFailed

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>\d+|[A-Za-z]))")
_HASHES = re.compile(r"^####[ \t]*(\S[^\n]*)", re.MULTILINE)  # GSM8K's own form
_ANCHOR = re.compile(r"\banswer(?:\s+is)?[ \t*_]*[:=]", re.IGNORECASE)
_MATHS = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|(?<!\\)\$(?P<b>[^$\n]+)(?<!\\)\$"
    r"|\\\((?P<c>[^\n]+?)\\\)|\\\[(?P<d>.+?)\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"(?<![\w.])[-−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?(?!\w)"
)
_BOX_CHARACTERS = 4000
_SEARCHED_CHARACTERS = 4000  # of a response's end, for its last expression
_WRAPPED = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_BASE = re.compile(r"(-?[0-9A-Fa-f.]+)_\{?(\d+)\}?")
# What people type for LaTeX; longer first where one begins another.
_TYPED = (
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(pi|infty|sin|cos|tan|log|ln)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![\\A-Za-z])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"√\s*\(([^()]*)\)|√\s*(\d+)"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<!\d)(\d+) +(\d+)/(\d+)(?!\d)"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\s(?:and|or)\s"), ", "),
    (re.compile(r",(?:\s*,)+"), ","),
)
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "°": r"^\circ ", "∪": r"\cup ", "½": r"\frac12 ",
    "∅": r"\emptyset ", "\n": " ",
})  # fmt: skip
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\\(?:left|right)(?![A-Za-z])|(?<!\\)\$|\\[()\[\]]")


def after_thinking(response: str, opened: bool = False) -> str:
    """What a response says after "</think>"; nothing when its thinking never ends.

    `opened`: the prompt itself ends with <think>, so that a response without "</think>" is all
    thinking.
    """
    _, ended, rest = response.rpartition("</think>")
    if ended:
        return "" if "<think>" in rest else rest
    return "" if opened or "<think>" in response else response


def final_answer(response: str, *, anchored: bool = False) -> str | None:
    r"""The final answer of a worked solution; None when there is none.

    The last \boxed{...}; else the last of GSM8K's "#### ..." and "Answer: ..."; else, unless
    `anchored`, the last LaTeX expression, else the last number. A box that is cut short holds none.
    """
    boxed = _last_box(response)
    if boxed is not None:
        return boxed or None
    answer = _last_line(response)
    if answer or anchored:
        return answer
    return _last_expression(response[-_SEARCHED_CHARACTERS:])


def _last_expression(text: str) -> str | None:
    """The last LaTeX expression, or a number after it; "$5 and then $" is none."""
    last, end = None, 0
    for found in _MATHS.finditer(text):
        inside = next(filter(None, found.groups())).strip()
        if inside and not _WORD.search(_COMMAND.sub(" ", _WRAPPED.sub(" ", inside))):
            last, end = inside, found.end()
    numbers = _NUMBER.findall(text, end)
    return numbers[-1] if numbers else last


def _last_box(text: str) -> str | None:
    """What the last box that is not empty holds: "" if it is never closed; None without a box."""
    for box in reversed(list(_BOX.finditer(text))):
        inside = box["bare"] or _braced(text, box.end())
        if inside is None:
            return ""
        if inside.strip():
            return inside.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    """The text from `start`, just inside a brace, to the brace that closes it."""
    depth = 1
    for place in range(start, min(len(text), start + _BOX_CHARACTERS)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start:place]
    return None


def _last_line(text: str) -> str | None:
    """What follows the last "####" or "Answer:"."""
    hashes = list(_HASHES.finditer(text))
    answers = list(_ANCHOR.finditer(text))
    if hashes and (not answers or hashes[-1].start() > answers[-1].start()):
        return hashes[-1][1].strip()
    return extract_answer(text)


def canonical(text: str) -> str:
    r"""A LaTeX answer without what changes only its looks: spacing, \left, \text{}, dollars."""
    text = _SPACING.sub("", text.strip().replace(r"\$", ""))
    for _ in range(3):
        text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace(r"\%", "%")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\{?\\circ\}?", "", text)
    return re.sub(r"\s+", "", text).rstrip(".")


def is_words(text: str) -> bool:
    r"""Whether an answer is words ("\text{Friday}", "no solution") in place of mathematics.

    To a reader of LaTeX, words are products of letters: Navin would equal Nivan.
    """
    plain = _COMMAND.sub(" ", _wrapped_words(text)).strip()
    if _WORD.match(plain):  # "June 20"
        return True
    return bool(_WORD.search(plain)) and not re.search(r"[\d=+<>^&]", plain)


def _wrapped_words(text: str) -> str:
    return _WRAPPED.sub(r" \1 ", text)


def is_close(given: str, reference: str, tolerance: float = 0.0) -> bool:
    """Whether two numbers, or two quantities of one dimension, differ by at most `tolerance` of
    the reference's size (0: equal exactly). Words after a number that are no known unit are
    ignored; a reference without a unit takes any.

    Raises ValueError when the reference is not a number.
    """
    given, reference = _typed(given), _typed(reference)
    wanted = parse_number(reference)
    if wanted is None:
        raise ValueError(f"the reference answer {reference!r} is not a number")
    found = parse_number(given)
    if found is None or re.search(r"\d", found[1]):  # "12 or 13" is no answer
        return False
    quantities = parse_quantity(given), parse_quantity(reference)
    one, other = found[0], wanted[0]
    if quantities[0] is not None and quantities[1] is not None:
        if quantities[0][1] != quantities[1][1]:
            return False
        one, other = quantities[0][0], quantities[1][0]
    return abs(one - other) <= Fraction(tolerance) * abs(other)


def _typed(answer: str) -> str:
    r"""A number written in LaTeX as one would type it: 10{,}000, \frac{1}{2}, 5\text{ cm}."""
    text = re.sub(r"\\[!,;: ]|\{(,)\}|\\q?quad|\\?\$", r"\1", answer.strip())
    text = re.split(r"=|\\approx", text)[-1]  # x = 5
    text = re.sub(r"(\d?)\s*\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?", r"\1 \2/\3", text)
    return _WRAPPED.sub(r" \1", text).replace(r"\%", "%").replace("{,}", ",").strip()


class Mathematics:
    """Compares answers; math-verify runs in processes of its own, with a limit on its work.

    Its own limits are signals, which only a main thread can have, and count seconds.
    May be used from many threads. Verdicts on equal pairs are computed once.
    """

    def __init__(self, processes: int = 1, seconds: float = 120.0) -> None:
        """`seconds` is the last resort, for what a count of calls cannot see."""
        if processes < 1:
            raise ValueError(f"processes is {processes}; it must be at least 1")
        # A fixed hash seed: sympy walks sets, and their order decides what it tries first.
        command = [sys.executable, "-m", "phiforge.verify.equivalence"]
        self._all = [
            LineProcess(command, seconds=seconds, environment={"PYTHONHASHSEED": "0"})
            for _ in range(processes)
        ]
        self._idle: queue.SimpleQueue[LineProcess] = queue.SimpleQueue()
        for process in self._all:
            self._idle.put(process)
        self._known: dict[tuple[str, str | None], bool | None] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Mathematics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._all:
            process.close()

    def is_equal(self, gold: str, given: str) -> bool:
        """Whether `given` answers a question whose answer is `gold`.

        Equal as text, as words (but for case), as numbers, or as mathematics. Answers longer than
        MAX_CHARACTERS, or too large to evaluate, equal only the same text. Raises OracleError when
        the comparison takes too much work.
        """
        one, other = canonical(gold), canonical(given)
        if one and one == other:
            return True
        if not one or not other or len(given) > MAX_CHARACTERS:
            return False
        if is_words(gold) or not self._is_mathematical(gold):
            return _words(gold) == _words(given)
        if _is_prose(given):
            return False
        if (base := _BASE.fullmatch(one)) is not None:
            return other == base[1] or _same_base(base, other)
        simple = _simple_verdict(gold, given)
        if simple is not None:
            return simple
        verdict = self._ask(_latex(gold), _latex(given))
        if verdict is None:
            raise OracleError(f"comparing {given[:60]!r} with {gold[:60]!r} takes too much work")
        return verdict

    def _is_mathematical(self, gold: str) -> bool:
        if parse_number(gold) is not None:
            return True
        return self._ask(_latex(gold), None) is not False

    def _ask(self, gold: str, given: str | None) -> bool | None:
        key = (gold, given)
        with self._lock:
            if key in self._known:
                return self._known[key]
        process = self._idle.get()
        try:
            answer = json.loads(process.ask(json.dumps({"gold": gold, "given": given})))
        except ProgramFailed as error:
            raise OracleError(f"comparing {given!r} with {gold!r}: {error}") from None
        finally:
            self._idle.put(process)
        with self._lock:
            self._known[key] = answer["equal"]
        return answer["equal"]


def _is_prose(answer: str) -> bool:
    """Whether words outside of \\text{} come before any number: "five apples"."""
    plain = _COMMAND.sub(" ", _WRAPPED.sub(" ", _latex(answer)))
    return bool(_WORD.search(plain)) and parse_number(plain) is None


def _same_base(base: re.Match[str], other: str) -> bool:
    found = _BASE.fullmatch(other)
    return found is not None and found.groups() == base.groups()


def _simple_verdict(gold: str, given: str) -> bool | None:
    """The verdict on two plain numbers, with their units; None when one is something else."""
    one, other = _typed(gold), _typed(given)
    wanted, found = parse_number(one), parse_number(other)
    if wanted is None or found is None:
        return None
    quantities = parse_quantity(one), parse_quantity(other)
    if quantities[0] is not None and quantities[1] is not None:
        return quantities[0] == quantities[1]
    if not (_is_unit(wanted[1]) and _is_unit(found[1])):
        return None
    if wanted[0] == found[0]:
        return True
    return None if "." in one + other or "%" in one + other else False


def _is_unit(rest: str) -> bool:
    """Whether what follows a number is nothing or words, and not mathematics such as 5x or 5 pi."""
    if rest in ("", "."):
        return True
    words = re.fullmatch(r"[A-Za-z][A-Za-z ./]*(?:\^\{?[23]\}?)?\.?", rest)
    if words is None or re.search(r"\b(?:and|or|pi|sqrt|infinity)\b", rest):
        return False
    return bool(_WORD.search(rest)) or (len(rest) > 1 and parse_quantity(f"1 {rest}") is not None)


def _latex(answer: str) -> str:
    """An answer as a person typed it, as LaTeX."""
    text = answer.translate(_SIGNS).replace(r"\$", "")
    text = re.sub(r"(?<!\\)\$|\\[()\[\]!]|\\,", "", text).strip()
    text = re.sub(r"\{(,)\}", r"\1", text)
    text = _WRAPPED.sub(lambda wrapped: _unwrapped(wrapped[1]), text)
    text = re.sub(r"(\|units\|)(?:\s*\^\s*\{?\s*[23]\s*\}?)?", "", text)
    for pattern, replacement in _TYPED:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".")


def _unwrapped(words: str) -> str:
    """What takes the place of \\text{words}: "and" is a comma, other words are units."""
    if re.fullmatch(r"\s*,?\s*(?:and|or)\s*", words):
        return ", "
    return "|units|" if re.fullmatch(r"\s*[A-Za-z][A-Za-z ./]+", words) else f" {words} "


def _words(text: str) -> str:
    text = _wrapped_words(_SPACING.sub(" ", text))
    return re.sub(r"[^\w]+", " ", text.casefold()).strip()
