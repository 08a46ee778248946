"""One exchange with a model: what it was asked, what it said, what was expected, the verdict.

Call `transcript(prompt, response, answer="31", verdict=True)`. Writes nothing.
"""

from typing import Any

from phiforge.core.page.markup import Html, element
from phiforge.core.page.text import markdown

_VERDICTS = {True: ("right", "right"), False: ("wrong", "wrong")}


def transcript(
    prompt: str,
    response: str,
    *,
    answer: str | None = None,
    verdict: bool | None = None,
    verdict_text: str | None = None,
    note: str = "",
    render: bool = False,
) -> Html:
    """An exchange as a definition list; texts are verbatim unless `render` (Markdown, LaTeX)."""
    items: list[Any] = []
    rows = [("asked", _text(prompt, render)), ("answered", _text(response, render))]
    if answer is not None:
        rows.append(("expected", element("span", answer, class_="answer")))
    if verdict is not None:
        style, word = _VERDICTS[verdict]
        mark = element("span", verdict_text or word, class_=f"verdict {style}")
        rows.append(("verdict", element("span", mark, f" · {note}" if note else None)))
    for name, value in rows:
        items += [element("dt", name), element("dd", value)]
    return element("dl", *items, class_="transcript")


def _text(text: str, render: bool) -> Html:
    return markdown(text) if render else element("div", text, class_="wrap answer")
