"""Tokens in their text, coloured by p(success) from before to after each; pivotal ones boxed.

Call `tokens([Token("12", 0.4, 0.9, pivotal=True, label="+0.50")])` and `token_legend()`.
Writes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from phiforge.core.page.markup import Html, element, join
from phiforge.core.page.visible import hexadecimal, visible

_LABEL_CHARACTERS = 11  # what a label with its interval takes of the text below it


@dataclass(frozen=True)
class Token:
    """A token's text with p(success) before and after it (None where it is not known).

    `label` stands above a pivotal token (its change, if empty); `hex` takes the place of a text
    that is only part of a character.
    """

    text: str
    p_before: float | None = None
    p_after: float | None = None
    pivotal: bool = False
    label: str | Html = ""
    note: str = ""
    hex: str = ""

    @property
    def change(self) -> float | None:
        """p after minus p before."""
        if self.p_before is None or self.p_after is None:
            return None
        return self.p_after - self.p_before


def tokens(sequence: Iterable[Token], *, description: str = "") -> Html:
    """A text, orange where p(success) is low, blue where it is high; hovering tells p.

    Neighbours that share p to two decimals share one element, so that a page of long answers stays
    small. `description` is what a screen reader says first.
    """
    listed = list(sequence)
    parts: list[Html] = []
    start = 0
    for (pivotal, *_), run in groupby(listed, key=_run):
        end = start + len(list(run))
        if pivotal:
            parts += [_boxed(listed[i], _has_room(listed, i)) for i in range(start, end)]
        else:
            parts.append(_plain(listed[start:end]))
        start = end
    return element(
        "div", join(parts), class_="tokens", role="group", aria_label=description or None
    )


def token_legend() -> Html:
    """The scale of `tokens`, to stand above it."""
    steps = [element("i", class_="p", style=_span(p / 10, (p + 1) / 10)) for p in range(10)]
    scale = element(
        "span", "p(success) 0", element("span", *steps, class_="scale"), "1", class_="keep"
    )
    rise = element("i", "a", class_="box rise")
    fall = element("i", "b", class_="box fall")
    return element(
        "div",
        scale,
        element("span", rise, " raises p", class_="keep"),
        element("span", fall, " lowers p", class_="keep"),
        element("span", "above a box: Δ and its 95% interval", class_="keep"),
        class_="legend",
    )


def _run(token: Token) -> tuple[object, ...]:
    return token.pivotal, _rounded(token.p_before), _rounded(token.p_after), token.note


def _plain(run: list[Token]) -> Html:
    text = join(_text(token) for token in run)
    if run[0].change is None:
        return element("span", text)
    style = _span(run[0].p_before, run[-1].p_after)
    return element("span", text, class_="p", style=style, title=_title(run[0]))


def _has_room(sequence: Sequence[Token], index: int) -> bool:
    """Whether a label may stand over the text after its box: no other box is near it."""
    room = 0
    for token in sequence[index : index + _LABEL_CHARACTERS]:
        if token.pivotal and token is not sequence[index]:
            return False
        room += len(token.text)
        if room >= _LABEL_CHARACTERS or "\n" in token.text:
            return True
    return True


def _boxed(token: Token, over: bool) -> Html:
    change = token.change or 0.0
    mark = token.label or f"{change:+.2f}".replace("-", "−")
    box = element(
        "b",
        _text(token, breaks=False),
        class_=f"p box {'fall' if change < 0 else 'rise'}",
        style=_span(token.p_before, token.p_after),
        title=_title(token),
    )
    # In this order, for the last line of an inline block is what stands on the text's line.
    pin = element(
        "span", element("span", mark, class_="above"), box, class_="pin over" if over else "pin"
    )
    # The break itself stands after the box, which a line break would tear in two.
    return Html(pin + "\n") if "\n" in token.text else pin


def _text(token: Token, breaks: bool = True) -> Html:
    if token.hex:
        return hexadecimal(token.hex)
    # An empty text is a part of a character that a later token completes.
    return visible(token.text, breaks=breaks) or element("i", "no text", class_="hex")


def _span(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"--p:{_short(before)};--q:{_short(after)}"


def _short(p: float) -> str:
    return f"{min(1.0, max(0.0, p)):.2f}".rstrip("0").rstrip(".")


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 2)


def _title(token: Token) -> str | None:
    if token.change is None:
        return token.note or None
    before, after = f"{token.p_before:.2f}", f"{token.p_after:.2f}"
    text = f"p {before}" if before == after else f"p {before} → {after}"
    return f"{text} {token.note}".strip()
