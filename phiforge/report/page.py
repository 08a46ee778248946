"""Puts the report's sections in order and writes its head: what the run is and its main numbers.

Call `render(load_run("runs/nano"))`; returns the page's text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from phiforge.core.page import Html, Section, element, join, p_value, page, quantity
from phiforge.core.progress import clock
from phiforge.report import examples, pivotal, results, training
from phiforge.report.overview import costs, reproduce, stages
from phiforge.report.run_data import TRAINING, Row, RunData

Builder = Callable[[], Section | None]


def render(
    data: RunData, *, transcripts: int = 6, pivotal_paths: int = 8, problems: int = 2
) -> str:
    """The whole page; a section that has nothing to show is left out."""
    builders: list[Builder] = [
        lambda: stages(data),
        lambda: training.curves(data),
        lambda: training.mixture(data),
        lambda: results.accuracy(data),
        lambda: results.paired_tests(data),
        lambda: results.long_context(data),
        lambda: results.refusals(data),
        lambda: results.bits_per_byte(data),
        lambda: pivotal.section(data, pivotal_paths),
        lambda: examples.transcripts(data, transcripts),
        lambda: examples.problems(data, problems),
        lambda: costs(data),
        lambda: reproduce(data),
    ]
    sections = [section for build in builders if (section := build()) is not None]
    return page(
        f"phiforge run {data.name}",
        sections,
        subtitle=_subtitle(data),
        lead=headline(data),
        footer="Intervals are 95% confidence intervals: Wilson's for shares, Newcombe's paired "
        "score interval for differences. Paired tests are exact McNemar tests on the same "
        "questions; adjusted p-values are Holm's.",
    )


def headline(data: RunData) -> Html | None:
    """The few numbers one asks for first."""
    items = [
        *_accuracy_items(data),
        *_recall_items(data),
        *_refusal_items(data),
        *_cost_items(data),
    ]
    if not items:
        return None
    cells = [
        element("div", element("dt", name), element("dd", value, element("small", note)))
        for name, value, note in items
    ]
    return element("dl", *cells, class_="headline")


Item = tuple[str, Any, Any]


def _accuracy_items(data: RunData) -> list[Item]:
    order = [c["name"] for c in data.scores.get("checkpoints", [])]
    rows = [r for r in data.scores.get("accuracy", []) if r["family"] == "all"]
    if not rows:
        return []
    greedy = min(r["temperature"] for r in rows)
    found = {r["checkpoint"]: r for r in rows if r["temperature"] == greedy}
    last = found[max(found, key=order.index)]
    limits = f"{last['checkpoint']}, {_greedy(greedy)}, [{100 * last['low']:.1f}, "
    items: list[Item] = [
        ("Problems solved", _percent(last), limits + f"{100 * last['high']:.1f}], n = {last['n']}")
    ]
    for test in data.scores.get("comparisons", []):
        steps = (test["measure"], test["family"], test["second"], test.get("temperature"))
        if steps == ("accuracy", "all", "dpo-pivotal", greedy):
            note = join([f"points over {test['first']}, p = ", p_value(test["p_holm"])])
            points = round(100 * test["difference"], 1)
            items.append(("Pivotal-token DPO", f"{points:+.1f}" if points else "0.0", note))
    return items


def _recall_items(data: RunData) -> list[Item]:
    scores = data.scores.get("recall", [])
    # One pair among other text is what a small model can learn; many pairs only where it is all.
    task = "needle" if any(r["task"] == "needle" for r in scores) else "recall"
    rows = [r for r in scores if r["task"] == task]
    if not rows:
        return []
    longest = max(r["length"] for r in rows)
    found = {r["checkpoint"]: r for r in rows if r["length"] == longest}
    if "midtrain" not in found:
        return []
    before = f", before {_percent(found['pretrain'])}" if "pretrain" in found else ""
    note = f"after midtraining{before}, n = {found['midtrain']['n']}"
    what = "Recall of one pair" if task == "needle" else "Recall"
    return [(f"{what} at {longest:g}× context", _percent(found["midtrain"]), note)]


def _refusal_items(data: RunData) -> list[Item]:
    rows = [r for r in data.scores.get("refusals", []) if r["family"] == "all"]
    last = rows[-1]["checkpoint"] if rows else None
    found = {r["asked"]: r for r in rows if r["checkpoint"] == last}
    if "bogus" not in found:
        return []
    wrongly = f"; {_percent(found['answerable'])} of answerable" if "answerable" in found else ""
    return [("Bogus questions refused", _percent(found["bogus"]), f"{last}{wrongly}")]


def _cost_items(data: RunData) -> list[Item]:
    seconds = sum(m.get("seconds", 0) for m in data.manifests.values())
    tokens = sum(data.metrics(s).get("tokens") or 0 for s in TRAINING)
    if not seconds:
        return []
    cores = _environment(data).get("cores")
    where = f", {cores} cores" if cores else ""
    note = join(["training on ", quantity(tokens), " tokens", where])
    return [("Whole run", clock(seconds), note)]


def _subtitle(data: RunData) -> str:
    parts = []
    parameters = next((p for s in TRAINING if (p := data.metrics(s).get("parameters"))), None)
    if parameters:
        parts.append(f"{quantity(parameters)} parameters")
    seeds = {m["config"].get("seed") for m in data.manifests.values() if "config" in m}
    if len(seeds) == 1:
        parts.append(f"seed {seeds.pop()}")
    environment = _environment(data)
    if environment:
        parts.append(f"{environment.get('processor', 'unknown processor')}")
    finished = max((m.get("finished", "") for m in data.manifests.values()), default="")
    if finished:
        parts.append(finished[:10])
    unfinished = [name for name in data.folders if name not in data.manifests]
    if unfinished:
        parts.append(f"not finished: {', '.join(unfinished)}")
    return " · ".join(parts)


def _environment(data: RunData) -> Row:
    manifests: Sequence[Row] = list(data.manifests.values())
    return manifests[-1].get("environment", {}) if manifests else {}


def _percent(row: Row) -> str:
    return f"{100 * row['share']:.1f}%"


def _greedy(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T = {temperature:g}"
