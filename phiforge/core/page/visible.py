"""Text of which nothing is hidden: spaces, line breaks, control and zero-width characters shown.

Call `visible(" 12\\n")`; the text still copies and wraps as itself. Writes nothing.
"""

import re
import unicodedata
from functools import lru_cache

from phiforge.core.page.markup import Html, element, escape, join

MAX_CHARACTERS = 160
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# Control, format (zero-width, direction), surrogate, private, unassigned; spaces but the common one
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
_MAX_ACCENTS = 2  # on one letter, as any language needs; a pile of them hides its neighbours
_PIECES = re.compile(r"[!-~]+|.", re.DOTALL)


@lru_cache(maxsize=20_000)
def visible(
    text: str, *, limit: int | None = MAX_CHARACTERS, spaces: bool = True, breaks: bool = True
) -> Html:
    """`text` with a mark for whatever one would not see; more than `limit` characters are cut.

    spaces=False leaves single spaces as they are; breaks=False shows a line break by its mark
    alone, without breaking the line.
    """
    kept = text if limit is None else text[:limit]
    parts, accents = [], 0
    for piece in _PIECES.findall(kept):
        accents = accents + 1 if unicodedata.category(piece[0])[0] == "M" else 0
        parts.append(_piece(piece, spaces, breaks, accents > _MAX_ACCENTS))
    if len(kept) < len(text):
        parts.append(_code(f"+ {len(text) - len(kept)} characters"))
    return join(parts)


def hexadecimal(digits: str) -> Html:
    """Bytes that are no text, two digits each: `hexadecimal("e282")`."""
    return _code(" ".join(re.findall("..?", digits)).upper())


def _piece(piece: str, spaces: bool, breaks: bool, hidden: bool) -> Html:
    if piece == " ":
        return element("i", " ", class_="w") if spaces else Html(" ")
    if piece in _MARKS:
        after = piece if breaks and piece != "\r" else ""
        return join([element("i", _MARKS[piece], class_="mark"), Html(after)])
    if hidden or (len(piece) == 1 and unicodedata.category(piece) in _HIDDEN):
        return _code(f"U+{ord(piece):04X}")
    return escape(piece)


def _code(text: str) -> Html:
    return element("i", text, class_="hex")
