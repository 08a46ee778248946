"""Which kinds of tokens are pivotal (digits, words, operators ...), where they stand, their texts.

Call `kind("+")`, or `kinds_section(findings)` for the tables of a report. Writes nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from phiforge.core.page import (
    Column,
    Html,
    bar,
    element,
    hexadecimal,
    join,
    number,
    percent,
    table,
    visible,
)
from phiforge.core.stats import wilson
from phiforge.posttrain.pivotal.findings import Findings, Row, distinct

NUMBER, OPERATOR, COMMAND = "number", "operator or sign", "LaTeX command"
CAPITALISED, WORD, PART = "word, capitalised", "word", "rest of a word"
PUNCTUATION, SPACE, BREAK = "punctuation", "space", "line break"
SPECIAL, BYTES, MIXED = "special token", "part of a character", "letters with digits or signs"
EXAMPLES = {
    NUMBER: "12 3.5", OPERATOR: "+ = < /", COMMAND: "\\frac", CAPITALISED: "The", WORD: "so",
    PART: "ing", PUNCTUATION: ". , ( \"", SPACE: "", BREAK: "", SPECIAL: "<|im_end|>", BYTES: "",
    MIXED: "3x",
}  # fmt: skip
PLACES = ("first token", "first third, after it", "middle third", "last third")
_SPECIAL = re.compile(r"<\|[^<>]*\|>|</?(?:s|bos|eos|pad|unk|think|answer)>|\[/?INST\]")
_NUMBER = re.compile(r"[-+−]?\d[\d.,]*|[.,]\d+")
_NUM_TEXTS = 12
_EMPTY = Html("&nbsp;")


def kind(text: str, before: str = "") -> str:
    """The class of a token by its text; `before` is the text that it continues."""
    core = text.strip(" ")
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return BYTES
    if _SPECIAL.fullmatch(text):
        return SPECIAL
    if not text.strip():
        return BREAK if "\n" in text or "\r" in text else SPACE
    core = text.strip()
    if _NUMBER.fullmatch(core):
        return NUMBER
    if re.fullmatch(r"\\[A-Za-z]+", core):
        return COMMAND
    letters = [c for c in core if c.isalpha()]
    if letters and not any(c.isdigit() for c in core) and _is_word(core):
        if not text[0].isspace() and before[-1:].isalpha() and _has_case(core[0]):
            return PART
        return CAPITALISED if letters[0].isupper() else WORD
    if letters or any(c.isdigit() for c in core):
        return MIXED
    return OPERATOR if any(_is_operator(c) for c in core) else PUNCTUATION


def _is_word(core: str) -> bool:
    """Letters with the marks that words hold: don't, well-known, and a comma or dot at the end."""
    body = core.strip(".,:;!?\"'()")
    return bool(body) and all(c.isalpha() or c in "'’-" or _is_accent(c) for c in body)


def _is_accent(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _has_case(character: str) -> bool:
    return character.lower() != character.upper()


def _is_operator(character: str) -> bool:
    return character in "+-*/=<>^%&|~\\" or unicodedata.category(character) == "Sm"


@dataclass
class Group:
    """Tokens of one class: how many were searched, and what the pivotal ones of them do."""

    searched: int = 0
    deltas: list[float] = field(default_factory=list)
    texts: Counter[str] = field(default_factory=Counter)


def grouped(paths: Sequence[Row], name: Callable[[Row, int], str]) -> dict[str, Group]:
    """Every token searched, once, by its class."""
    groups: dict[str, Group] = {}
    for path, i, effect in distinct(paths):
        group = groups.setdefault(name(path, i), Group())
        group.searched += 1
        if effect is not None:
            group.deltas.append(effect["delta"])
            group.texts[path["texts"][i]] += 1
    return groups


def kind_at(path: Row, position: int) -> str:
    """The class of an answer's token."""
    texts = path["texts"]
    return kind(texts[position], texts[position - 1] if position else "")


def place_at(path: Row, position: int) -> str:
    """Where in the answer a token stands, as one of PLACES."""
    return PLACES[0] if position == 0 else PLACES[1 + 3 * position // len(path["texts"])]


def kinds_section(findings: Findings) -> Html:
    """Tables by kind and by place, and the texts that are pivotal most often."""
    by_kind = grouped(findings.paths, kind_at)
    by_place = grouped(findings.paths, place_at)
    ranked = sorted(by_kind, key=lambda k: (-len(by_kind[k].deltas), -by_kind[k].searched))
    caption = (
        "A beginning that two answers share counts once. Share pivotal: of the tokens of a kind, "
        "with its 95% interval. Lift: that share over the share among all tokens; 1 is no more "
        "than chance."
    )
    return join(
        [
            _table("Kind of token", ranked, by_kind, caption, examples=True),
            element("h3", "By place in the answer"),
            _table("Place", [p for p in PLACES if p in by_place], by_place),
            element("h3", "Most frequent pivotal tokens"),
            _texts(findings.paths),
        ]
    )


def _table(
    heading: str, names: Sequence[str], groups: dict[str, Group], caption: str = "",
    *, examples: bool = False,
) -> Html:  # fmt: skip
    columns = [
        Column(heading),
        Column("Pivotal", "number"),
        Column("Searched", "number"),
        Column("Share pivotal, %", "number"),
        Column("Lift", "number"),
        *([Column("")] if examples else []),
        Column("Raise p", "number"),
        Column("Mean |Δ|", "number"),
        *([Column("Pivotal most often", "wide")] if examples else []),
    ]
    total = Group(
        sum(g.searched for g in groups.values()), [d for g in groups.values() for d in g.deltas]
    )
    most = max((_lift(group, total) or 0.0 for group in groups.values()), default=0.0)
    rows = [list(_cells(name, groups[name], total, most, examples)) for name in names]
    if examples:
        rows.append(list(_cells("all tokens", total, total, 0.0, examples)))
    return table(columns, rows, caption=caption, total=examples)


def _cells(name: str, group: Group, total: Group, most: float, examples: bool) -> Iterator[object]:
    example = EXAMPLES.get(name)
    yield join([name, element("span", f" {example}", class_="quiet")]) if example else name
    yield len(group.deltas)
    yield group.searched
    found = len(group.deltas)
    yield percent(found / group.searched, wilson(found, group.searched), group.searched)
    lift = _lift(group, total)
    yield number(lift, 1)
    if examples:
        yield bar((lift or 0.0) / most, "quiet") if most else _EMPTY
    yield sum(delta > 0 for delta in group.deltas) if found else None
    yield number(sum(map(abs, group.deltas)) / found) if found else None
    if examples:
        yield join((token_text(text) for text, _ in group.texts.most_common(6)), " ") or _EMPTY


def _lift(group: Group, total: Group) -> float | None:
    share = len(total.deltas) / total.searched if total.searched else 0.0
    return len(group.deltas) / group.searched / share if share else None


def _texts(paths: Sequence[Row]) -> Html:
    groups = grouped(paths, lambda path, i: path["texts"][i])
    found = sorted(
        (name for name in groups if groups[name].deltas),
        key=lambda name: (-len(groups[name].deltas), name),
    )
    columns = [
        Column("Token"),
        Column("Pivotal", "number"),
        Column("Of", "number"),
        Column("Raise p", "number"),
        Column("Mean Δ", "number"),
    ]
    rows = [
        [
            token_text(name),
            len(groups[name].deltas),
            groups[name].searched,
            sum(delta > 0 for delta in groups[name].deltas),
            f"{sum(groups[name].deltas) / len(groups[name].deltas):+.2f}".replace("-", "−"),
        ]
        for name in found[:_NUM_TEXTS]
    ]
    return table(columns, rows)


def token_text(text: str, digits: str = "") -> Html:
    """A token's text in a table's cell; `digits`: its bytes where they are no text."""
    shown = hexadecimal(digits) if digits else visible(text, limit=24, breaks=False)
    return element("code", shown or "∅", class_="token")
