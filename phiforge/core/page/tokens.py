"""Tokens coloured in their text: by p(success) or by its change, pivotal ones boxed.

Call `tokens([Token("12", 0.4, 0.9, pivotal=True)], by="change")` and `token_legend("change")`.
Writes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from phiforge.core.page.markup import Html, element

Colour = Literal["change", "level"]
_STRONGEST = 0.75  # opacity at the end of the scale; text stays readable over it


@dataclass(frozen=True)
class Token:
    """A token's text with p(success) before and after it (None where it was not estimated)."""

    text: str
    p_before: float | None = None
    p_after: float | None = None
    pivotal: bool = False
    note: str = ""

    @property
    def change(self) -> float | None:
        """p after minus p before."""
        if self.p_before is None or self.p_after is None:
            return None
        return self.p_after - self.p_before


def tokens(sequence: Iterable[Token], *, by: Colour = "change", prompt: str = "") -> Html:
    """Text with a background per token; hovering shows p before and after it.

    by="change": blue where p rises, orange where it falls. by="level": deeper blue = higher p.
    """
    lead = element("span", prompt, "\n", class_="prompt") if prompt else None
    return element("div", lead, *(_token(token, by) for token in sequence), class_="tokens")


def token_legend(by: Colour = "change") -> Html:
    """The scale of `tokens`, to stand above it."""
    if by == "level":
        steps = [element("i", class_="level", style=_alpha(s / 6)) for s in range(7)]
        return _legend("p(success) 0", steps, "1", None)
    falls = [element("i", class_="fall", style=_alpha(s / 3)) for s in (3, 2, 1)]
    rises = [element("i", class_="rise", style=_alpha(s / 3)) for s in (1, 2, 3)]
    steps = [*falls, element("i"), *rises]
    return _legend("change of p(success) −1", steps, "+1", "pivotal tokens are boxed, with Δ")


def _legend(left: str, steps: list[Html], right: str, note: str | None) -> Html:
    scale = element("span", left, element("span", *steps, class_="scale"), right)
    return element("div", scale, element("span", note) if note else None, class_="legend")


def _token(token: Token, by: Colour) -> Html:
    style, alpha = _colour(token, by)
    names = [style] if style else []
    if token.pivotal:
        names.append("pivotal")
    span = element(
        "span",
        _visible(token.text),
        class_=" ".join(names) or None,
        style=_alpha(alpha) if style else None,
        title=_title(token),
    )
    if not token.pivotal or token.change is None:
        return span
    mark = f"{token.change:+.2f}".replace("-", "−")
    return Html(span + element("sup", mark, class_="fall" if token.change < 0 else "rise"))


def _colour(token: Token, by: Colour) -> tuple[str | None, float]:
    if by == "level":
        return (None, 0.0) if token.p_after is None else ("level", token.p_after)
    if not token.change:
        return None, 0.0
    return ("rise" if token.change > 0 else "fall"), abs(token.change)


def _alpha(strength: float) -> str:
    return f"--a:{_STRONGEST * min(1.0, max(0.0, strength)):.3f}"


def _title(token: Token) -> str | None:
    parts = []
    if token.change is not None:
        parts.append(f"p {token.p_before:.2f} → {token.p_after:.2f}")
    elif token.p_after is not None:
        parts.append(f"p {token.p_after:.2f}")
    if token.note:
        parts.append(token.note)
    return " · ".join(parts) or None


def _visible(text: str) -> Html:
    """Line breaks inside a token are shown, so that a coloured one can be seen."""
    pieces = text.split("\n")
    mark = Html('<span class="newline">↵</span>\n')
    return Html(mark.join(element("span", piece)[6:-7] for piece in pieces))
