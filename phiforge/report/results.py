"""Sections on results: accuracy, paired tests, long context, refusals, bits per byte.

Each takes RunData and gives a Section, or None when the evaluation has no such rows.
"""

from typing import Any

from phiforge.core.page import (
    Column,
    Html,
    Section,
    Series,
    details,
    difference,
    element,
    figure,
    figures,
    interval_plot,
    join,
    p_value,
    percent,
    table,
)
from phiforge.core.page.tables import ABSENT
from phiforge.core.stats import Interval
from phiforge.report.run_data import Row, RunData

STYLES = {"base": "few-shot", "chat": "chat", "probe": ""}


def accuracy(data: RunData) -> Section | None:
    """One table per temperature: families down, checkpoints across."""
    rows = data.scores.get("accuracy", [])
    if not rows:
        return None
    temperatures = sorted({row["temperature"] for row in rows})
    tables = [
        _grid(data, [r for r in rows if r["temperature"] == t], _sampling(t)) for t in temperatures
    ]
    plot = _accuracy_plot(data, rows, temperatures)
    return Section(
        "Accuracy",
        join([*tables, plot]),
        note="Share of unseen test problems answered correctly, in percent, with 95% intervals.",
    )


def paired_tests(data: RunData) -> Section | None:
    """Each checkpoint against the one before it on the same questions."""
    rows = data.scores.get("comparisons", [])
    if not rows:
        return None
    overall = [row for row in rows if row["family"] == "all"]
    by_family = [row for row in rows if row["family"] != "all"]
    parts = [_test_table(overall)]
    if by_family:
        parts.append(details("By family", _test_table(by_family)))
    return Section(
        "Paired tests between stages",
        join(parts),
        note="Differences in percentage points on the same questions. p is adjusted over the rows "
        "of its table (Holm); below 0.05 it is bold.",
    )


def long_context(data: RunData) -> Section | None:
    """Key-value recall and copying at multiples of the pretraining context."""
    rows = data.scores.get("recall", [])
    if not rows:
        return None
    lengths = sorted({row["length"] for row in rows})
    plots = []
    for task in dict.fromkeys(row["task"] for row in rows):
        series = [
            _length_series(name, [r for r in rows if (r["task"], r["checkpoint"]) == (task, name)])
            for name in _present(data, [r for r in rows if r["task"] == task])
        ]
        plot = interval_plot(
            series,
            x="prompt length, multiples of the pretraining context",
            y="right (%)",
            ticks=[f"{length:g}×" for length in lengths],
            title={
                "needle": "Recall of one pair",
                "recall": "Recall among many pairs",
                "copy": "Copying",
            }.get(task, str(task)),
            y_range=(0, 1.02),
            percent=True,
        )
        plots.append(figure(plot))
    return Section("Long context", join([figures(plots), _context_table(data, rows, lengths)]))


def refusals(data: RunData) -> Section | None:
    """Refusal rates on questions that have no answer and on those that have one."""
    rows = data.scores.get("refusals", [])
    if not rows:
        return None
    tables = [
        _grid(data, found, f"{asked} questions")
        for asked in ("bogus", "answerable")
        if (found := [row for row in rows if row["asked"] == asked])
    ]
    return Section(
        "Refusals",
        join(tables),
        note="Share of questions refused, in percent, greedy. Bogus questions lack what an answer "
        "needs and should be refused; answerable ones should not.",
    )


def bits_per_byte(data: RunData) -> Section | None:
    """Bits per byte on held-out text, by source and checkpoint."""
    rows = data.scores.get("bits_per_byte", [])
    if not rows:
        return None
    names = _present(data, rows)
    columns = [Column("Source"), *(Column(name, "number") for name in names)]
    columns += [Column("Documents", "number"), Column("Bytes", "number")]
    body = []
    for source in dict.fromkeys(row["source"] for row in rows):
        found = {row["checkpoint"]: row for row in rows if row["source"] == source}
        one = next(iter(found.values()))
        cells: list[Any] = [_bits(found.get(name)) for name in names]
        body.append([source, *cells, one["num_documents"], one["num_bytes"]])
    note = "Lower is better. Held-out documents, read in windows of the pretraining context."
    return Section("Bits per byte", table(columns, body), note=note)


def _grid(data: RunData, rows: list[Row], heading: str) -> Html:
    """Families down, checkpoints across, the row over all families last."""
    names = _present(data, rows)
    cells = {(row["family"], row["checkpoint"]): row for row in rows}
    families = [f for f in dict.fromkeys(row["family"] for row in rows) if f != "all"]
    styles = {c["name"]: STYLES.get(c.get("style", ""), "") for c in _checkpoints(data)}
    columns = [Column("Family"), Column("n", "number")]
    for name in names:
        style = element("span", styles.get(name), class_="interval") if styles.get(name) else None
        columns.append(Column(join([name, style]), "number"))
    body = []
    for family in (*families, "all"):
        found = [cells.get((family, name)) for name in names]
        sizes = {row["n"] for row in found if row}
        size = sizes.pop() if len(sizes) == 1 else None
        body.append([family, size, *(_share(row) for row in found)])
    title = element("h3", heading[0].upper() + heading[1:])
    return join([title, table(columns, body, total=True)])


def _accuracy_plot(data: RunData, rows: list[Row], temperatures: list[float]) -> Html:
    names = _present(data, rows)
    plots = []
    for family in ("all", *sorted({row["family"] for row in rows} - {"all"})):
        series = []
        for t in temperatures:
            found = {
                r["checkpoint"]: r for r in rows if (r["family"], r["temperature"]) == (family, t)
            }
            kept = [(i, found[name]) for i, name in enumerate(names) if name in found]
            series.append(_series(_sampling(t), kept))
        title = "All families" if family == "all" else family
        plot = interval_plot(
            series, x="", y="right (%)", ticks=names, title=title, y_range=(0, 1.02), percent=True
        )
        plots.append(figure(plot))
    if len(plots) == 1:
        return plots[0]
    return join([figures(plots[:1]), details("Figures by family", figures(plots[1:]))])


def _length_series(name: str, rows: list[Row]) -> Series:
    lengths = sorted(row["length"] for row in rows)
    return _series(name, [(lengths.index(row["length"]), row) for row in rows])


def _series(name: str, rows: list[tuple[int, Row]]) -> Series:
    return Series(
        name,
        [x for x, _ in rows],
        [row["share"] for _, row in rows],
        [row["low"] for _, row in rows],
        [row["high"] for _, row in rows],
    )


def _context_table(data: RunData, rows: list[Row], lengths: list[float]) -> Html:
    columns = [Column("Task"), Column("Checkpoint"), Column("n", "number")]
    for length in lengths:
        tokens = [r["prompt_tokens"] for r in rows if r["length"] == length]
        size = element("span", f"{sum(tokens) / len(tokens):.0f} tokens", class_="interval")
        columns.append(Column(join([f"{length:g}×", size]), "number"))
    body = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for name in _present(data, [r for r in rows if r["task"] == task]):
            found = {r["length"]: r for r in rows if (r["task"], r["checkpoint"]) == (task, name)}
            sizes = {row["n"] for row in found.values()}
            size = sizes.pop() if len(sizes) == 1 else None
            body.append([task, name, size, *(_share(found.get(length)) for length in lengths)])
    return table(columns, body)


def _test_table(rows: list[Row]) -> Html:
    columns = [
        Column("Measure"),
        Column("Stages"),
        Column("n", "number"),
        Column("Difference", "number"),
        Column("Gained", "number"),
        Column("Lost", "number"),
        Column("p", "number"),
        Column("p adjusted", "number"),
    ]
    body = [
        [
            _measure(row),
            f"{row['first']} → {row['second']}",
            row["n"],
            difference(row["difference"], Interval(row["low"], row["high"])),
            row["gained"],
            row["lost"],
            p_value(row["p_value"], threshold=0.0),
            p_value(row["p_holm"]),
        ]
        for row in rows
    ]
    return table(columns, body)


def _measure(row: Row) -> str:
    if row["measure"] == "accuracy":
        text = f"accuracy, {_sampling(row['temperature'])}"
    elif row["measure"] == "refusals":
        text = f"refusals, {row['asked']}"
    else:
        text = f"{row['task']} at {row['length']:g}×"
    return text if row["family"] == "all" else f"{row['family']}: {text}"


def _share(row: Row | None) -> Html:
    if row is None:
        return ABSENT
    return percent(row["share"], Interval(row["low"], row["high"]), row["n"])


def _bits(row: Row | None) -> Html:
    if row is None:
        return ABSENT
    value = f"{row['bits_per_byte']:.3f}"
    if row["low"] is None:
        return join([value])
    limits = f"[{row['low']:.3f}, {row['high']:.3f}]"
    return join([value, element("span", limits, class_="interval limits")])


def _checkpoints(data: RunData) -> list[Row]:
    return data.scores.get("checkpoints", [])


def _present(data: RunData, rows: list[Row]) -> list[str]:
    """The checkpoints that have rows, in the order they were trained."""
    found = {row["checkpoint"] for row in rows}
    return [c["name"] for c in _checkpoints(data) if c["name"] in found]


def _sampling(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"sampled at T = {temperature:g}"
