r"""Multiple choice: which option a response settles on, and whether it is the right one.

`is_choice(final_choice(response), "C", options)`. The traps it avoids: "Answer: Because" is not B,
"Answer: All of the above" is not A, "**Answer:** \boxed{(C)}" is C. Writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from phiforge.verify.mathematics import canonical, final_answer

_NEXT_LINE = re.compile(r"\banswer(?:\s+is)?[ \t*_]*[:=]?[ \t*_]*\n+[ \t*_$(]*([A-Za-z])\b", re.I)
_SAID = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is|\s+would\s+be)?:?\s*[*_$(\[]*([A-Z])(?=[\s*_$)\].,:;]|$)"
)
_ALONE = re.compile(r"^[\s*_$(\[]*([A-Z])[\s*_$)\].,:;]*$", re.MULTILINE)
_LETTER = re.compile(r"([A-Za-z])(?:[).:,\]]|\s*$|\s+[-–—])")


def final_choice(response: str, *, anchored: bool = False) -> str | None:
    """What a response settles on: a box, "Answer: ...", also on the next line; else, unless
    `anchored`, the last "answer is C" or the last line that is a letter alone.
    """
    answer = final_answer(response, anchored=True)
    if answer:
        return answer
    for pattern in (_NEXT_LINE,) if anchored else (_NEXT_LINE, _SAID, _ALONE):
        letters = pattern.findall(response)
        if letters:
            return letters[-1]
    return None


def is_choice(given: str, reference: str, options: Sequence[str] = ()) -> bool:
    """Whether a choice is the reference's: the same letter, or the same words.

    A reference that is a letter also accepts the words of its option, and the other way round.
    """
    wanted = {_folded(reference)}
    letter = _letter(reference) if len(canonical(reference).strip("()")) == 1 else None
    place = ord(letter) - ord("a") if letter else -1
    if 0 <= place < len(options):
        wanted.add(_folded(options[place]))
    elif letter is None:
        letter = next(
            (chr(97 + i) for i, text in enumerate(options) if _folded(text) in wanted), None
        )
    return _folded(given) in wanted or (letter is not None and _letter(given) == letter)


def _letter(text: str) -> str | None:
    """The letter of "C", "(C)", "C. Paris", in lower case; None for words."""
    found = _LETTER.match(_plain(text).lstrip("(["))
    return found[1].casefold() if found else None


def _folded(text: str) -> str:
    return re.sub(r"\W+", " ", _plain(text).casefold()).strip()


def _plain(text: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}", r"\1", text).strip(
        " *_$"
    )
