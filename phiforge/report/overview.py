"""Sections on the run as a whole: its stages, what they cost, and how to repeat it.

`stages(data)`, `costs(data)`, `reproduce(data)`: RunData in, a Section out.
"""

from phiforge.core.page import (
    Column,
    Html,
    Section,
    code,
    details,
    element,
    join,
    number,
    quantity,
    table,
)
from phiforge.core.progress import clock
from phiforge.report.run_data import TRAINING, RunData
from phiforge.stages import BY_NAME


def stages(data: RunData) -> Section:
    """Every stage with its state, clock, tokens, FLOPs and inputs."""
    rows = []
    for name in data.folders:
        manifest = data.manifests.get(name)
        metrics = data.metrics(name)
        rows.append(
            [
                name,
                "done" if manifest else "unfinished",
                clock(manifest["seconds"]) if manifest else None,
                quantity(metrics.get("tokens")),
                quantity(metrics.get("flops")),
                ", ".join(manifest.get("inputs", {})) if manifest else None,
                BY_NAME[name].writes,
            ]
        )
    columns = [
        Column("Stage"),
        Column("State"),
        Column("Time", "number"),
        Column("Tokens", "number"),
        Column("FLOPs", "number"),
        Column("Reads", "wide"),
        Column("Makes", "wide"),
    ]
    return Section("Stages", table(columns, rows))


def costs(data: RunData) -> Section | None:
    """Seconds, tokens read and written, and operations per stage."""
    total = sum(m.get("seconds", 0) for m in data.manifests.values())
    if not total:
        return None
    rows, sums = [], [0.0, 0.0, 0.0, 0.0]
    for name, manifest in data.manifests.items():
        metrics = data.metrics(name)
        values = [
            manifest.get("seconds", 0),
            (metrics.get("tokens") or 0) if name in TRAINING else 0,
            generated_tokens(metrics),
            metrics.get("flops") or 0,
        ]
        sums = [a + b for a, b in zip(sums, values, strict=True)]
        rows.append(_cost_row(name, values, total, metrics.get("tokens_per_second")))
    rows.append(_cost_row("total", sums, total, None))
    columns = [
        Column("Stage"),
        Column("Seconds", "number"),
        Column("Share", "number"),
        Column("Tokens trained on", "number"),
        Column("per second", "number"),
        Column("Tokens generated", "number"),
        Column("FLOPs", "number"),
    ]
    formulas = {f for n in data.manifests if (f := data.metrics(n).get("flops_formula"))}
    caption = f"FLOPs of training: {'; '.join(sorted(formulas))}." if formulas else ""
    return Section("Costs", table(columns, rows, caption=caption, total=True))


def generated_tokens(metrics: dict) -> int:
    """Tokens a stage sampled, under whichever names it counts them."""
    if "generated_tokens" in metrics:
        return metrics["generated_tokens"] or 0
    names = ("filter_tokens", "search_tokens", "confirm_tokens", "pair_tokens", "discarded_tokens")
    return sum(metrics.get(name) or 0 for name in names)


def _cost_row(name: str, values: list[float], total: float, rate: float | None) -> list:
    seconds, tokens, generated, flops = values
    return [
        name,
        number(seconds, 1),
        f"{100 * seconds / total:.0f}%",
        quantity(tokens or None),
        quantity(rate),
        quantity(generated or None),
        quantity(flops or None),
    ]


def reproduce(data: RunData) -> Section:
    """The command, the resolved recipe, versions, machine, and each stage's hashes."""
    parts: list[Html] = []
    if data.recipe_text:
        parts += [
            element("p", "Save the recipe below as ", element("code", "recipe.yaml"), " and run:"),
            code("phiforge run recipe.yaml", "sh"),
        ]
    parts.append(_environment_table(data))
    if data.recipe_text:
        parts.append(details("Recipe as it was resolved", code(data.recipe_text, "yaml")))
    if data.manifests:
        parts.append(details("Fingerprints and outputs", _hash_table(data)))
    return Section("How to reproduce", join(parts))


def _environment_table(data: RunData) -> Html:
    facts: dict[str, set[str]] = {}
    for manifest in data.manifests.values():
        for block in ("code", "environment", "exec"):
            for key, value in manifest.get(block, {}).items():
                name = f"exec.{key}" if block == "exec" else key
                facts.setdefault(name, set()).add(str(value))
    rows = [[name, " / ".join(sorted(values))] for name, values in facts.items()]
    return table([Column(""), Column("Recorded by the stages", "wide")], rows) if rows else Html("")


def _hash_table(data: RunData) -> Html:
    rows = []
    for name, manifest in data.manifests.items():
        size = sum(row["bytes"] for row in manifest["outputs"])
        mono = [element("code", manifest[k][:16]) for k in ("fingerprint", "output_hash")]
        rows.append([name, manifest["version"], *mono, len(manifest["outputs"]), quantity(size)])
    columns = [
        Column("Stage"),
        Column("Version", "number"),
        Column("Fingerprint"),
        Column("Output hash"),
        Column("Files", "number"),
        Column("Bytes", "number"),
    ]
    return table(columns, rows)
