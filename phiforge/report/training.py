"""Sections on training: loss curves of each stage, and the mixture as planned and as drawn.

`curves(data)`, `mixture(data)`: RunData in, a Section (or None) out.
"""

from phiforge.core.page import (
    Column,
    Html,
    Section,
    Series,
    figure,
    figures,
    join,
    line_plot,
    number,
    percent,
    quantity,
    table,
)
from phiforge.report.run_data import TRAINING, Row, RunData


def curves(data: RunData) -> Section | None:
    """A loss curve per training stage, with validation where it was measured."""
    plots = [plot for stage in TRAINING if (plot := _curve(data, stage)) is not None]
    return Section("Training", figures(plots)) if plots else None


def mixture(data: RunData) -> Section | None:
    """What each training stage planned to draw from each source, and drew."""
    blocks = []
    for stage in TRAINING:
        rows = data.metrics(stage).get("mixture")
        if rows:
            blocks.append(_mixture_table(stage, rows))
    return Section("Data mixture", join(blocks)) if blocks else None


def _curve(data: RunData, stage: str) -> Html | None:
    log = [row for row in data.log(stage) if "step" in row]
    steps = [row for row in log if row.get("loss") is not None]
    if not steps:
        return None
    xs = [row["step"] for row in steps]
    series = [Series("loss", xs, [row["loss"] for row in steps])]
    for key in _validation_keys(log):
        found = [row for row in log if row.get(key) is not None]
        name = key.replace("_loss", "").replace("_", " ", 1)
        series.append(Series(name, [r["step"] for r in found], [r[key] for r in found]))
    plot = line_plot(series, x="step", y="loss (nats)", title=stage)
    return figure(plot, _curve_caption(steps, data.metrics(stage)))


def _curve_caption(steps: list[Row], metrics: Row) -> str:
    tail = [row["loss"] for row in steps[-20:]]
    peak = max((row["lr"] for row in steps if "lr" in row), default=None)
    parts = [f"{steps[-1]['step']} steps", f"last {len(tail)} steps {sum(tail) / len(tail):.3f}"]
    if peak is not None:
        parts.append(f"peak learning rate {peak:.2g}")
    rate = metrics.get("tokens_per_second")
    if rate:
        parts.append(f"{quantity(rate)} tokens/s")
    if metrics.get("skipped_steps"):
        parts.append(f"{metrics['skipped_steps']} steps skipped")
    return ", ".join(parts)


def _validation_keys(log: list[Row]) -> list[str]:
    """The losses on held-out text: by source, or the one over all where there is one source."""
    keys = {key for row in log for key in row if key.startswith("validation_loss")}
    sources = sorted(keys - {"validation_loss"})
    return sources if len(sources) > 1 else sorted(keys)[:1]


def _mixture_table(stage: str, rows: list[Row]) -> Html:
    columns = [
        Column(f"{stage}: source"),
        Column("Share, %", "number"),
        Column("Unique tokens", "number"),
        Column("Planned", "number"),
        Column("Drawn", "number"),
        Column("Drawn, %", "number"),
        Column("Epochs", "number"),
    ]
    drawn = sum(row["drawn_tokens"] for row in rows)
    body = [
        [
            row["source"],
            percent(row["share"]),
            quantity(row["unique_tokens"]),
            quantity(row["planned_tokens"]),
            quantity(row["drawn_tokens"]),
            percent(row["drawn_tokens"] / drawn if drawn else None),
            number(row["epochs"], 2),
        ]
        for row in rows
    ]
    planned = sum(row["planned_tokens"] for row in rows)
    body.append(["total", None, None, quantity(planned), quantity(drawn), None, None])
    return table(columns, body, total=True)
