"""One self-contained HTML page: inline style and script, light and dark, narrow screens and paper.

Call `page("Run nano", [Section("Results", table(...))])`. Returns the text of the page; it makes
no request of any kind, which its content security policy also enforces.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from phiforge.core.page.markup import Html, element, escape, join


@dataclass(frozen=True)
class Section:
    """A titled part of a page; `note` is one quiet line under the title."""

    title: str
    body: Html
    note: str | Html = ""

    @property
    def anchor(self) -> str:
        """The fragment that links to this section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str | Html = "",
    lead: Html | None = None,
    footer: str | Html = "",
) -> str:
    """A whole HTML document. `lead` stands above the sections, without a title of its own."""
    script = _asset("page.js")
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'),
        element("title", title),
        Html(f"<style>\n{_asset('page.css')}</style>"),
    ]
    toggle = element("button", "Theme", id="theme", type="button", hidden=True)
    header = element(
        "header",
        element("div", element("h1", title), toggle, class_="title"),
        element("p", subtitle, class_="subtitle") if subtitle else None,
    )
    body = [
        header,
        lead,
        _contents(sections) if len(sections) > 3 else None,
        element("main", *map(_section, sections)),
        element("footer", footer) if footer else None,
        Html(f"<script>{script}</script>"),
    ]
    document = element("html", element("head", *head), "\n", element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def details(summary: str | Html, body: Any, *, is_open: bool = False) -> Html:
    """A block that opens on click (and prints open)."""
    return element("details", element("summary", summary), body, open=is_open)


def _section(section: Section) -> Html:
    note = element("p", section.note, class_="note") if section.note else None
    return element("section", element("h2", section.title), note, section.body, id=section.anchor)


def _contents(sections: Sequence[Section]) -> Html:
    links = [element("a", s.title, href=f"#{s.anchor}") for s in sections]
    return element("nav", join(links, " "), aria_label="Contents")


def _policy(script: str) -> Html:
    """Nothing may be fetched, and only our own script may run, whatever a transcript holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return escape(
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )


@cache
def _asset(name: str) -> str:
    return resources.files("phiforge.core.page").joinpath(name).read_text(encoding="utf-8")
