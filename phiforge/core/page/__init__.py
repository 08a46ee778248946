"""HTML pages that stand alone: layout, tables, plots, coloured tokens, transcripts, rendered text.

Call `page("Title", [Section("Results", table(columns, rows))])`; every part returns `Html`, and
whatever is not `Html` is escaped. Returns text; the caller writes the file.
"""

from phiforge.core.page.layout import Section, details, page
from phiforge.core.page.markup import Html, element, escape, join
from phiforge.core.page.plots import Series, figure, figures, histogram, interval_plot, line_plot
from phiforge.core.page.sparkline import sparkline
from phiforge.core.page.tables import (
    Column,
    bar,
    difference,
    number,
    p_value,
    percent,
    quantity,
    share,
    table,
)
from phiforge.core.page.text import code, markdown, pre
from phiforge.core.page.tokens import Token, token_legend, tokens
from phiforge.core.page.transcripts import transcript
from phiforge.core.page.visible import hexadecimal, visible

__all__ = [
    "Column",
    "Html",
    "Section",
    "Series",
    "Token",
    "bar",
    "code",
    "details",
    "difference",
    "element",
    "escape",
    "figure",
    "figures",
    "hexadecimal",
    "histogram",
    "interval_plot",
    "join",
    "line_plot",
    "markdown",
    "number",
    "p_value",
    "page",
    "percent",
    "pre",
    "quantity",
    "share",
    "sparkline",
    "table",
    "token_legend",
    "tokens",
    "transcript",
    "visible",
]
