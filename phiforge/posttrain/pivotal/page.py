"""The page of a pivotal search: what it found and cost, which tokens decide, and whole solutions.

Call `write_report("runs/nano-s0/pivotal", "pivotal.html")`; reads tokens.jsonl, pairs.jsonl,
paths.jsonl and, where they are, search.json and rollouts.jsonl.gz. Writes one self-contained file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from phiforge.core.page import (
    Column,
    Html,
    Section,
    bar,
    details,
    element,
    figure,
    figures,
    histogram,
    join,
    number,
    page,
    quantity,
    table,
    token_legend,
    visible,
)
from phiforge.core.progress import clock
from phiforge.posttrain.pivotal.findings import Findings, Row, by_question, counted, read
from phiforge.posttrain.pivotal.kinds import kinds_section
from phiforge.posttrain.pivotal.solutions import choose, question_block, question_text

NUM_SOLUTIONS = 24
# What answers may take; a page of more is slow to open and says nothing new.
MAX_SHOWN_BYTES, MAX_FOLDED_BYTES = 900_000, 1_900_000
_SUMMARY_CHARACTERS = 90
_EMPTY = Html("&nbsp;")
PURPOSES = {
    "filter": "p of each question, to keep those in the band",
    "search": "find suspects along the answers",
    "confirm": "measure each suspect on fresh rollouts",
    "pair": "measure the token set against it",
}


def write_report(folder: str | Path, path: str | Path) -> Path:
    """Write the page of the search in `folder` to `path`. Raises ValueError as `findings.read`."""
    path = Path(path)
    text = render(read(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render(findings: Findings) -> str:
    """The page's text: a function of the search's files alone."""
    chosen = choose(findings.paths, NUM_SOLUTIONS)
    blocks = fitting(_block, findings, chosen, MAX_SHOWN_BYTES)
    chosen = chosen[: len(blocks)]  # what does not fit is folded with the others
    sections = [
        Section("Yield and cost", yield_and_cost(findings)),
        *_distributions(findings),
        *([Section("Which tokens are pivotal", kinds_section(findings))] if findings.paths else []),
        Section("Solutions", shown(blocks), note=_solutions_note(findings)),
        *_rest(findings, chosen),
        *_settings(findings),
    ]
    return page(
        "Pivotal tokens",
        sections,
        subtitle=_subtitle(findings.settings),
        lead=headline(findings),
        footer="p is the share of sampled continuations that end in a right answer. Intervals are "
        "95%: Newcombe's for Δ, Wilson's for shares.",
    )


# ------------------------------------------------------------------------------------- the head


def _subtitle(settings: Row) -> Html:
    parts = [str(settings[name]) for name in ("model", "name") if settings.get(name)][:1]
    for name, words in (("method", "method"), ("gap", "gap"), ("temperature", "temperature")):
        if settings.get(name) is not None:
            parts.append(f"{words} {settings[name]}")
    return visible(" · ".join(parts), spaces=False)


def headline(findings: Findings) -> Html:
    """The few numbers one asks for first."""
    facts, found = findings.numbers, findings.numbers["pivotal_tokens"]
    rising = facts["pivotal_tokens_rising"]
    items: list[tuple[str, Any, Any]] = [
        ("Pivotal tokens", found, f"{rising} raise p, {found - rising} lower it"),
        ("Preference pairs", facts["pairs"], _per(facts["pairs"], found, "per pivotal token")),
        *_yield_items(facts, found),
        *_cost_items(facts, found),
    ]
    cells = [
        element("div", element("dt", name), element("dd", value, element("small", note)))
        for name, value, note in items
    ]
    return element("dl", *cells, class_="headline")


def _yield_items(facts: Row, found: int) -> list[tuple[str, Any, Any]]:
    questions, paths = facts["questions_in_band"], facts["paths"]
    if not questions or not paths:
        return []
    note = f"{found / paths:.2f} per answer; {questions} questions, {paths} answers"
    return [("Per question searched", f"{found / questions:.2f}", note)]


def _cost_items(facts: Row, found: int) -> list[tuple[str, Any, Any]]:
    spent = tokens_spent(facts)
    items: list[tuple[str, Any, Any]] = []
    if spent and found:
        note = join([quantity(spent), " generated in all"])
        items.append(("Tokens per pivotal token", quantity(round(spent / found)), note))
    if facts.get("seconds"):
        rate = join([quantity(round(spent / facts["seconds"])), " tokens per second"])
        items.append(("Time", clock(facts["seconds"]), rate if spent else ""))
    return items


def _per(count: int, of: int, words: str) -> str:
    return f"{count / of:.2f} {words}" if of else ""


def tokens_spent(facts: Row) -> int:
    """Generated tokens of all purposes."""
    return sum(facts.get(f"{name}_tokens") or 0 for name in PURPOSES)


# ------------------------------------------------------------------------------- yield and cost


def yield_and_cost(findings: Findings) -> Html:
    """Tables: what became of the questions, what the tokens were spent on, and each family."""
    facts = findings.numbers
    blocks = [_questions(facts), _costs(facts)]
    return join(
        [figures([block for block in blocks if block is not None]), _families(findings) or ""]
    )


def _questions(facts: Row) -> Html | None:
    screened = facts.get("questions_screened")
    if not screened:
        return None
    rows = [
        ("in the band, searched", facts["questions_in_band"], ""),
        ("below the band", facts.get("questions_below_band"), "quiet"),
        ("above the band", facts.get("questions_above_band"), "quiet"),
        ("unscored", facts.get("questions_unscored"), "quiet"),
    ]
    body = [[name, n, bar(n / screened, style)] for name, n, style in rows if n is not None]
    columns = [Column("Questions"), Column("", "number"), Column("", "wide")]
    return table(columns, [*body, ["screened", screened, _EMPTY]], total=True)


def _costs(facts: Row) -> Html | None:
    spent = tokens_spent(facts)
    if not spent:
        return None
    rows = []
    for name, words in PURPOSES.items():
        tokens = facts.get(f"{name}_tokens") or 0
        label = element("span", name, title=words)
        rows.append([label, quantity(tokens), f"{100 * tokens / spent:.0f}%", bar(tokens / spent)])
    found = facts["pivotal_tokens"]
    columns = [
        Column("Generated tokens"), Column("", "number"), Column("", "number"), Column("", "wide"),
    ]  # fmt: skip
    rollouts = facts.get("rollouts")
    notes = [
        f"{rollouts:,} rollouts".replace(",", "\N{NARROW NO-BREAK SPACE}") if rollouts else "",
        f"{spent / found:,.0f} tokens per pivotal token".replace(",", "\N{NARROW NO-BREAK SPACE}")
        if found
        else "",
    ]
    total = ["all", quantity(spent), _EMPTY, _EMPTY]
    caption = "; ".join(filter(None, notes))
    return table(columns, [*rows, total], total=True, caption=caption)


def _families(findings: Findings) -> Html | None:
    answers = counted(findings.paths, "family")
    if len(answers) < 2:
        return None
    found = counted(findings.tokens, "family")
    rows = []
    for name in sorted(answers):
        deltas = [abs(t["delta"]) for t in findings.tokens if (t.get("family") or "") == name]
        right = sum(p["success"] for p in findings.paths if (p.get("family") or "") == name)
        rows.append(
            [
                visible(name, spaces=False) or "(none)",
                answers[name],
                right,
                found[name],
                number(found[name] / answers[name]),
                number(median(deltas)) if deltas else None,
            ]
        )
    columns = [
        Column("Family"),
        Column("Answers", "number"),
        Column("Right", "number"),
        Column("Pivotal tokens", "number"),
        Column("Per answer", "number"),
        Column("Median |Δ|", "number"),
    ]
    return table(columns, rows)


def _distributions(findings: Findings) -> list[Section]:
    items = []
    deltas = [token["delta"] for token in findings.tokens]
    if deltas:
        groups = {"falls": [d for d in deltas if d < 0], "rises": [d for d in deltas if d >= 0]}
        edges = [round(-1 + 0.1 * i, 1) for i in range(21)]
        groups = {name: groups[name] for name in ("rises", "falls")}
        drawing = histogram(groups, edges, x="Δ of p(success)", y="pivotal tokens")
        caption = f"Change of p by a pivotal token. Median |Δ| {median(map(abs, deltas)):.2f}."
        items.append(figure(drawing, caption))
    firsts = {name: paths[0]["p"][0] for name, paths in by_question(findings.paths).items()}
    ps = findings.question_ps or [p for p in firsts.values() if p is not None]
    if ps:
        whose = "screened" if findings.question_ps else "searched"
        edges = [i / 20 for i in range(21)]
        drawing = histogram(_banded(findings, ps), edges, x="p(success)", y="questions")
        items.append(figure(drawing, f"p of the {len(ps)} questions {whose}."))
    return [Section("Distributions", figures(items))] if items else []


def _banded(findings: Findings, ps: Sequence[float]) -> dict[str, list[float]]:
    low, high = findings.settings.get("band") or (0.0, 1.0)
    groups = {
        f"in the band {low:g} to {high:g}": [p for p in ps if low <= p <= high],
        "outside": [p for p in ps if not low <= p <= high],
    }
    return {name: values for name, values in groups.items() if values}


# ------------------------------------------------------------------------------------ solutions


def solutions(findings: Findings, chosen: Sequence[Sequence[Row]]) -> Html:
    """The legend and the chosen questions with their answers, as many as fit, one at least."""
    return shown(fitting(_block, findings, chosen, MAX_SHOWN_BYTES))


def shown(blocks: Sequence[Html]) -> Html:
    """The legend and the questions' blocks, or a line that there are none."""
    if not blocks:
        return element("p", "No answer with a pivotal token was found.")
    return join([token_legend(), *blocks])


def fitting(
    build: Callable[[Findings, Sequence[Row]], Html],
    findings: Findings,
    questions: Sequence[Sequence[Row]],
    num_bytes: int,
) -> list[Html]:
    """The questions' blocks up to `num_bytes` in all; the first one in any case."""
    blocks: list[Html] = []
    size = 0
    for paths in questions:
        block = build(findings, paths)
        size += len(block.encode())
        if blocks and size > num_bytes:
            break
        blocks.append(block)
    return blocks


def _block(findings: Findings, paths: Sequence[Row]) -> Html:
    return question_block(findings, paths)


def _solutions_note(findings: Findings) -> str:
    note = "Largest effects first, the families taking turns. "
    if findings.settings.get("method") == "paper":
        return note + "Effects are measured on the rollouts that found them, and run high."
    return note + (
        "Colours follow p from all rollouts of the question; Δ above a box is measured on fresh "
        "rollouts alone."
    )


def _rest(findings: Findings, chosen: Sequence[Sequence[Row]]) -> list[Section]:
    """All other answers, folded, as many as fit."""
    above = {id(path) for paths in chosen for path in paths}
    questions = [
        rest
        for paths in by_question(findings.paths).values()
        if (rest := [path for path in paths if id(path) not in above])
    ]
    if not questions:
        return []
    blocks = fitting(_folded, findings, questions, MAX_FOLDED_BYTES)
    left_out = len(questions) - len(blocks)
    note = f"{left_out} more questions are in paths.jsonl alone." if left_out else ""
    return [Section("All other answers", join(blocks), note=note)]


def _folded(findings: Findings, paths: Sequence[Row]) -> Html:
    found = sum(len(path["pivotal"]) for path in paths)
    text = " ".join(question_text(paths[0]["prompt"]).split())
    facts = f"{len(paths)} answer{'s'[: len(paths) != 1]}, {found} pivotal"
    cut = text[:_SUMMARY_CHARACTERS].rsplit(" ", 1)[0] + " …"
    summary = join(
        [
            visible(cut if len(text) > _SUMMARY_CHARACTERS else text, spaces=False),
            element("span", facts, class_="quiet"),
        ]
    )
    return details(summary, question_block(findings, paths, heading=False))


def _settings(findings: Findings) -> list[Section]:
    settings = [(k, v) for k, v in findings.settings.items() if v is not None]
    if not settings:
        return []
    rows = [
        [visible(name), element("span", visible(str(value), spaces=False), class_="wrap")]
        for name, value in settings
    ]
    columns = [Column("Setting"), Column("Value", "wide")]
    return [Section("Settings", details("What the search was told", table(columns, rows)))]
