"""HTML to plain text that keeps structure: headings, lists, tables, code and its indentation.

Call `html_to_text(html)`; it returns Markdown-like text. Writes nothing.
"""

import re
from collections.abc import Callable
from typing import Any

_DROPPED = {"script", "style", "noscript", "template", "head", "svg", "iframe", "button", "select"}
_DROPPED |= {"object", "canvas", "audio", "video", "textarea"}
_BLOCKS = {"address", "article", "aside", "body", "center", "details", "div", "fieldset"}
_BLOCKS |= {"figcaption", "figure", "footer", "form", "header", "html", "main", "nav"}
_BLOCKS |= {"section", "summary", "tbody", "thead", "tfoot", "tr", "td", "th", "caption"}
_STRUCTURED = _BLOCKS | {"p", "pre", "ul", "ol", "dl", "table", "blockquote", "hr"}
_STRUCTURED |= {f"h{level}" for level in range(1, 7)}
_BREAK = "\x1e"  # a <br> inside running text, until white space has been collapsed
_LANGUAGE = re.compile(r"(?:language|lang|highlight|brush:)[-\s]?([A-Za-z0-9+#]+)")

Lines = list[str]


def html_to_text(html: str | bytes) -> str:
    """The visible text of a page, or "" when there is none.

    Headings become `#` lines, lists `-` and `1.` lines, data tables `|` rows, `pre` fenced code;
    no-break spaces become spaces that are never collapsed. Raises ValueError for what is no HTML.
    """
    from lxml import etree
    from lxml import html as parser

    # A string that declares an encoding is refused by lxml, and its own is always right.
    data = html.encode() if isinstance(html, str) else html
    if not data.strip():
        return ""
    encoding = "utf-8" if isinstance(html, str) or _is_utf8(data) else None
    try:
        root = parser.document_fromstring(data, parser=parser.HTMLParser(encoding=encoding))
    except (etree.ParserError, etree.XMLSyntaxError) as error:
        raise ValueError(f"not HTML ({error})") from error
    return _join(_children(root))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _join(lines: Lines) -> str:
    """Lines as text: no trailing spaces, at most one empty line in a row outside code."""
    kept: Lines = []
    fenced = False
    for line in (line.replace("\xa0", " ").rstrip() for line in lines):
        fenced ^= line.lstrip().startswith("```")
        if line or fenced or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")


def _children(element: Any) -> Lines:
    """The lines of what an element holds: runs of inline text, and blocks between them."""
    lines: Lines = []
    inline = [element.text or ""]
    for child in element:
        if _is_block(child):
            lines += _flush(inline) + _block(child)
            inline = []
        else:
            inline.append(_inline(child))
        inline.append(child.tail or "")
    return lines + _flush(inline)


def _flush(inline: list[str]) -> Lines:
    """Inline text as lines: ASCII white space collapsed, broken where the page breaks it."""
    text = re.sub(r"[ \t\r\n\f]+", " ", "".join(inline))
    lines = [line.strip(" ") for line in text.split(_BREAK)]
    return lines if any(lines) else []


def _tag(element: Any) -> str:
    # Comments and processing instructions have a function for a tag.
    return element.tag if isinstance(element.tag, str) else "#comment"


def _is_block(element: Any) -> bool:
    """Whether an element starts lines of its own; so does inline mark-up around a block."""
    tag = _tag(element)
    if tag in _STRUCTURED:
        return True
    if tag in _DROPPED or tag in ("#comment", "math"):
        return False
    return any(_tag(below) in _STRUCTURED for below in element.iterdescendants())


def _inline(element: Any) -> str:
    tag = _tag(element)
    if tag in _DROPPED or tag == "#comment":
        return ""
    if tag == "br":
        return _BREAK
    if tag == "img":
        return element.get("alt") or ""
    if tag == "math":
        return _formula(element)
    parts = [element.text or ""]
    for child in element:
        parts += [_inline(child), child.tail or ""]
    text = "".join(parts)
    if tag in ("code", "tt", "kbd", "samp") and text.strip() and "`" not in text:
        return f"`{text.strip()}`"
    return text


def _formula(element: Any) -> str:
    """The TeX that a MathML formula carries, else its text."""
    for note in element.iter("annotation"):
        if "tex" in (note.get("encoding") or "").lower():
            return f"${(note.text or '').strip()}$"
    return element.get("alttext") or " ".join(element.itertext())


def _block(element: Any) -> Lines:
    tag = _tag(element)
    if tag in _RENDER:
        return _RENDER[tag](element)
    if re.fullmatch(r"h[1-6]", tag):
        title = " ".join(line for line in _children(element) if line)
        return ["", f"{'#' * int(tag[1])} {title}", ""] if title else []
    return _children(element)


def _paragraph(element: Any) -> Lines:
    return ["", *_children(element), ""]


def _code(element: Any) -> Lines:
    for line_break in list(element.iter("br")):
        line_break.tail = "\n" + (line_break.tail or "")
    lines = "".join(element.itertext()).replace("\r\n", "\n").split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    while lines and not lines[-1].strip():
        lines.pop()
    marked = " ".join(filter(None, (node.get("class") for node in element.iter())))
    found = _LANGUAGE.search(marked)
    return ["", f"```{found[1] if found else ''}", *lines, "```", ""] if lines else []


def _list(element: Any) -> Lines:
    ordered = _tag(element) == "ol"
    lines: Lines = []
    number = 0
    for child in element:
        if _tag(child) in ("#comment", *_DROPPED):
            continue
        content = _trim(_children(child))
        if not content:
            continue
        number += 1
        mark = f"{number}. " if ordered else "- "
        if _tag(child) in ("ul", "ol"):  # a list straight inside a list continues the item above
            mark, content = "  ", _list(child)
        lines += [mark + content[0], *_indent(content[1:], len(mark))]
    nested = (
        _tag(element.getparent()) in ("li", "ul", "ol") if element.getparent() is not None else 0
    )
    return lines if nested else ["", *lines, ""]


def _definitions(element: Any) -> Lines:
    lines: Lines = []
    for child in element:
        tag = _tag(child)
        if tag in ("#comment", *_DROPPED):
            continue
        content = _trim(_block(child) if tag == "div" else _children(child))
        lines += _indent(content, 4) if tag == "dd" else ["", *content]
    return [*lines, ""]


def _table(element: Any) -> Lines:
    """Rows of a data table; a table that lays out a page is a sequence of blocks."""
    rows = [row for row in element.iter("tr") if _nearest_table(row) is element]
    cells = [[cell for cell in row if _tag(cell) in ("td", "th")] for row in rows]
    inner = _STRUCTURED - {"p", "div"}
    layout = any(
        _tag(below) in inner for row in cells for cell in row for below in cell.iterdescendants()
    )
    if layout or max(map(len, cells), default=0) < 2:
        return ["", *_children(element), ""]
    lines = [""]
    for number, row in enumerate(cells):
        texts = [" ".join(line for line in _children(cell) if line) for cell in row]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
        if number == 0:
            lines.append("|" + " --- |" * len(row))
    return [*lines, ""]


def _nearest_table(element: Any) -> Any:
    return next(element.iterancestors("table"), None)


def _quote(element: Any) -> Lines:
    text = _join(_children(element))
    return ["", *(f"> {line}".rstrip() for line in text.split("\n")), ""] if text else []


def _trim(lines: Lines) -> Lines:
    start, end = 0, len(lines)
    while start < end and not lines[start].strip():
        start += 1
    while end > start and not lines[end - 1].strip():
        end -= 1
    return lines[start:end]


def _indent(lines: Lines, width: int) -> Lines:
    return [" " * width + line if line else line for line in lines]


_RENDER: dict[str, Callable[[Any], Lines]] = {
    "p": _paragraph,
    "pre": _code,
    "ul": _list,
    "ol": _list,
    "dl": _definitions,
    "table": _table,
    "blockquote": _quote,
    "hr": lambda element: [""],
}
