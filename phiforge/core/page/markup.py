"""Text that is known to be HTML, and the one way to make it: `element` escapes everything else.

Call `element("p", "1 < 2", class_="note")`. Writes nothing.
"""

import html
import re
from collections.abc import Iterable
from typing import Any

_VOID = {"br", "hr", "meta", "col"}
_ATTRIBUTE = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*\Z")


class Html(str):
    """Markup that is safe to put on a page. Plain `str` is always escaped."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """`value` as markup: unchanged when it is `Html`, escaped otherwise (None is empty)."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    # Characters that a page cannot hold (most C0 controls) would vanish without a trace.
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))
    return Html(html.escape(text, quote=True))


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """One HTML element with escaped children and attributes.

    Attribute names lose a trailing "_" and turn other "_" into "-" (`class_`, `data_p`); None and
    False leave an attribute out, True writes it alone.
    """
    parts = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        assert _ATTRIBUTE.match(name), name
        assert not name.lower().startswith("on"), f"{name}: the page runs no handlers"
        if value is None or value is False:
            continue
        parts.append(name if value is True else f'{name}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if tag in _VOID else f"{opening}{join(children)}</{tag}>")


def join(parts: Iterable[Any], separator: str = "") -> Html:
    """Parts one after the other, each escaped unless it is `Html`."""
    return Html(escape(separator).join(escape(part) for part in parts))
