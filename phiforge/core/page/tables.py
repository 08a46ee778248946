"""Tables whose numbers align and carry their n and interval.

Call `table([Column("stage"), Column("accuracy", "number")], rows)`; `percent`, `difference`,
`p_value`, `quantity`, `number` and `bar` make cells. Writes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phiforge.core.page.markup import Html, element, join
from phiforge.core.stats import Interval

ABSENT = Html('<span class="absent">–</span>')


@dataclass(frozen=True)
class Column:
    """A column: its heading and its cells: "number" aligns right, "wide" keeps room for words."""

    name: str | Html
    kind: Literal["text", "number", "wide"] = "text"


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Any]],
    *,
    caption: str | Html = "",
    total: bool = False,
) -> Html:
    """A table; the first cell of a row is its heading, None shows as a dash.

    A row of one cell is a heading over the rows that follow; `total` sets the last row apart.
    Raises ValueError for a row of another length.
    """
    rows = [list(row) for row in rows]
    head = element("tr", *(element("th", c.name, scope="col", **_align(c)) for c in columns))
    body = []
    for index, row in enumerate(rows):
        last = total and index == len(rows) - 1
        body.append(_row(columns, row, "total" if last else None))
    content = [
        element("caption", caption) if caption else None,
        element("thead", head),
        element("tbody", *body),
    ]
    return element("div", element("table", *content), class_="table")


def number(value: float | None, digits: int = 2) -> Html:
    """A number with `digits` decimals and thin group spaces; None is a dash."""
    if value is None:
        return ABSENT
    return element("span", _grouped(value, digits))


def quantity(value: float | None) -> Html:
    """A large quantity in three digits with a suffix (12.3k, 4.56M, 1.20T); None is a dash."""
    if value is None:
        return ABSENT
    for limit, suffix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e4, "k"),
    ):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            return Html(f"{scaled:.{digits}f}{suffix}")
    whole = abs(value) >= 100 or float(value).is_integer()
    return Html(_grouped(value, 0 if whole else 2))


def percent(
    value: float | None, interval: Interval | None = None, n: int | None = None, digits: int = 1
) -> Html:
    """A share as a percentage with its interval: `87.2 [84.0, 90.1]`; n goes into the title."""
    if value is None:
        return ABSENT
    parts = [_plain(100 * value, digits)]
    if interval is not None:
        limits = f"[{_plain(100 * interval.low, digits)}, {_plain(100 * interval.high, digits)}]"
        parts.append(element("span", limits, class_="interval limits"))
    return element("span", *parts, title=None if n is None else f"n = {n}")


def share(k: int, n: int, interval: Interval, digits: int = 1) -> Html:
    """k of n as a percentage with its interval."""
    return percent(k / n if n else None, interval, n, digits)


def difference(value: float | None, interval: Interval | None = None, digits: int = 1) -> Html:
    """A signed difference of shares in percentage points, with its interval."""
    if value is None:
        return ABSENT
    parts: list[Any] = [_signed(100 * value, digits)]
    if interval is not None:
        limits = f"[{_signed(100 * interval.low, digits)}, {_signed(100 * interval.high, digits)}]"
        parts.append(element("span", limits, class_="interval limits signed"))
    return join(parts)


def bar(length: float, style: str = "") -> Html:
    """A horizontal bar of `length` (0 to 1) of the room it has; the number stands beside it.

    `style` "rise", "fall" or "quiet" names its colour.
    """
    width = f"--w:{min(1.0, max(0.0, length)):.3f}"
    names = f"bar {style}".strip()
    return element("span", class_=names, style=width, aria_hidden="true")


def p_value(value: float | None, threshold: float = 0.05) -> Html:
    """A p-value in two digits; set in bold below `threshold`."""
    if value is None:
        return ABSENT
    text = f"{value:.2f}" if value >= 0.095 else f"{value:.3f}" if value >= 0.001 else "< 0.001"
    if 0 < value < 1e-3:
        exponent = f"{value:.0e}".split("e")
        text = f"{exponent[0]}·10"
        power = element("sup", str(int(exponent[1])).replace("-", "−"))
        return element("span", text, power, class_="clear" if value < threshold else None)
    return element("span", text, class_="clear" if value < threshold else None)


def _row(columns: Sequence[Column], row: list[Any], style: str | None) -> Html:
    if len(row) == 1:
        heading = element("th", row[0], scope="rowgroup", colspan=len(columns))
        return element("tr", heading, class_="group")
    if len(row) != len(columns):
        raise ValueError(f"table: a row has {len(row)} cells for {len(columns)} columns: {row!r}")
    cells = [element("th", _cell(row[0]), scope="row", **_align(columns[0]))]
    for column, value in zip(columns[1:], row[1:], strict=True):
        cells.append(element("td", _cell(value), **_align(column)))
    return element("tr", *cells, class_=style)


def _cell(value: Any) -> Any:
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _grouped(value, 0)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return value


def _align(column: Column) -> dict[str, str | None]:
    return {"class_": column.kind if column.kind != "text" else None}


def _grouped(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "−")


def _plain(value: float, digits: int) -> str:
    # Rounding must not print −0.0 and a proportion's limits stay short at the ends.
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _signed(value: float, digits: int) -> str:
    text = _plain(value, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"
