"""Text written by models and people, made safe: Markdown, highlighted code, LaTeX as MathML.

Call `markdown("**So** $x^2$")`, `code("print(1)", "python")` or `pre("as it is")`. Raw HTML is
shown, not interpreted; images become links, since a page makes no requests. Writes nothing.
"""

import re
from functools import cache
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.lexers.special import TextLexer
from pygments.util import ClassNotFound

from phiforge.core.page.markup import Html, element, escape

MAX_FORMULA_CHARACTERS = 2000


def _names(text: str) -> set[str]:
    return set(text.split())


_PROSE = _names(
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code span div strong em del sub sup a "
    "table thead tbody tr th td"
)
_MATH = _names(
    "math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover "
    "munderover mmultiscripts mprescripts none mtable mtr mtd mpadded mphantom mstyle menclose "
    "semantics"
)
_MATH_ATTRIBUTES = _names(
    "display mathvariant stretchy fence separator form lspace rspace minsize maxsize linethickness "
    "columnalign rowspacing columnspacing columnlines rowlines accent accentunder displaystyle "
    "scriptlevel width height depth notation movablelimits symmetric largeop"
)
_ATTRIBUTES = {
    "a": {"href"},
    "ol": {"start"},
    "span": {"class"},
    "code": {"class"},
    "div": {"class"},
    **dict.fromkeys(_MATH, _MATH_ATTRIBUTES),
}


def markdown(text: str) -> Html:
    """Markdown with tables, fenced code and LaTeX as sanitised HTML."""
    return element("div", _sanitise(_parser().render(text)), class_="prose")


def code(text: str, language: str = "") -> Html:
    """A block of code, highlighted when the language is known."""
    return element("pre", element("code", _highlighted(text, language)))


def pre(text: str) -> Html:
    """Text exactly as it is, wrapped at the page's width."""
    return element("pre", text, class_="wrap")


def _sanitise(markup: str) -> Html:
    return Html(
        nh3.clean(
            markup,
            tags=_PROSE | _MATH,
            attributes=_ATTRIBUTES,
            url_schemes={"http", "https", "mailto"},
            link_rel="noopener noreferrer nofollow",
        )
    )


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _fence})
    parser.enable(["table", "strikethrough"]).disable("image")
    parser.inline.ruler.before("escape", "formula", _inline_formula)
    parser.block.ruler.before("fence", "formula_block", _block_formula)
    parser.add_render_rule("formula", _render_formula)
    parser.add_render_rule("formula_block", _render_formula)
    return parser


def _fence(text: str, language: str, attributes: str) -> str:
    return _highlighted(text, language)


def _highlighted(text: str, language: str) -> Html:
    try:
        lexer = get_lexer_by_name(language) if language else TextLexer()
    except ClassNotFound:
        lexer = TextLexer()
    lexer.stripnl = False
    return Html(highlight(text, lexer, HtmlFormatter(nowrap=True)).rstrip("\n"))


# ------------------------------------------------------------------------------------- formulas

# Pandoc's rule keeps prices as they are: no space inside the dollars, no digit after them.
_INLINE = (
    re.compile(r"\$\$(.+?)\$\$", re.DOTALL),
    re.compile(r"\$(?![\s$])((?:\\.|[^$\\])*?(?:\\.|[^\s$\\]))\$(?!\d)", re.DOTALL),
    re.compile(r"\\\((.+?)\\\)", re.DOTALL),
    re.compile(r"\\\[(.+?)\\\]", re.DOTALL),
)
_BLOCK = {"$$": "$$", r"\[": r"\]"}


def _inline_formula(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    for pattern in _INLINE:
        match = pattern.match(state.src, state.pos)
        if match and len(match[1]) <= MAX_FORMULA_CHARACTERS:
            if not silent:
                token = state.push("formula", "", 0)
                token.content = match[1].strip()
                token.markup = match[0][:2] if match[0][:2] in _BLOCK else "$"
            state.pos = match.end()
            return True
    return False


def _block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]].strip()
    opening = first[:2]
    if opening not in _BLOCK:
        return False
    closing, lines, line = _BLOCK[opening], [first[2:]], start
    while not lines[-1].rstrip().endswith(closing):
        line += 1
        if line >= end or line - start > 60:
            return False
        lines.append(state.src[state.bMarks[line] : state.eMarks[line]])
    content = "\n".join(lines).rstrip()[: -len(closing)].strip()
    if not content or len(content) > MAX_FORMULA_CHARACTERS or closing in content:
        return False
    if not silent:
        token = state.push("formula_block", "", 0)
        token.content, token.markup, token.block = content, opening, True
        state.line = line + 1
    return True


def _render_formula(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    return _formula(token.content, block=token.markup in _BLOCK)


def _formula(latex: str, block: bool) -> str:
    """MathML for a formula; a formula that the converter refuses is shown as its source."""
    try:
        return convert(latex, display="block" if block else "inline")
    except Exception:
        # The converter raises many kinds of errors on what models write; the source is the answer.
        return str(element("code", escape(latex)))
