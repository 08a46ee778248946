"""Sections that show the texts themselves: transcripts of each checkpoint, and example problems.

`transcripts(data, count)`, `problems(data, count)`: RunData in, a Section (or None) out.
"""

import re

from phiforge.core.page import Html, Section, details, element, join, transcript
from phiforge.report.run_data import Row, RunData

_SUITES = {
    "problems": "problems",
    "bogus": "bogus questions",
    "needle": "recall of one pair",
    "recall": "recall among many pairs",
    "copy": "copying",
}
_LONGEST_PROMPT = 1600
_MOST_LINES = 24


def transcripts(data: RunData, count: int) -> Section | None:
    """Some right and some wrong answers of each checkpoint, folded."""
    blocks = []
    for file in data.transcript_files():
        rows = data.rows("evaluate", file)
        blocks += [_checkpoint(suite, rows, count) for suite in _SUITES if _of(rows, suite)]
    if not blocks or not count:
        return None
    note = "Greedy answers, the first few right and wrong ones. Every transcript is kept in "
    path = element("code", "evaluate/transcripts/")
    return Section("Transcripts", join(blocks), note=join([note, path, "."]))


def problems(data: RunData, count: int) -> Section | None:
    """The first test problems of each family, with the expected answers."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in data.rows("synthesize", "problems_test.jsonl"):
        facts = row.get("metadata", {})
        key = (facts.get("family", ""), facts.get("variant", "answerable"))
        group = found.setdefault(key, [])
        if len(group) < count:
            group.append(row)
    if not found or not count:
        return None
    blocks = []
    for family in dict.fromkeys(family for family, _ in found):
        items = []
        for variant in ("answerable", "bogus"):
            for row in found.get((family, variant), []):
                expected = "a refusal" if variant == "bogus" else row.get("answer") or ""
                items.append(_problem(row, expected))
        field = next(iter(found[(family, v)] for f, v in found if f == family))[0]
        name = field.get("metadata", {}).get("field", "")
        title = join([family or "problems", element("span", name, class_="quiet")])
        blocks.append(details(title, join(items)))
    return Section("Test problems", join(blocks))


def _checkpoint(suite: str, rows: list[Row], count: int) -> Html:
    chosen = choose(_of(rows, suite), count, suite)
    name = rows[0]["checkpoint"]
    right = sum(_good(row, suite) for row in _of(rows, suite))
    total = len(_of(rows, suite))
    facts = element("span", f"{right} of {total} right", class_="quiet")
    title = join([f"{name}: {_SUITES[suite]}", facts])
    return details(title, join(_transcript(row, suite) for row in chosen))


def choose(rows: list[Row], count: int, suite: str) -> list[Row]:
    """Half right, half wrong, in file order; the other half fills up when one runs short."""
    right = [row for row in rows if _good(row, suite)]
    wrong = [row for row in rows if not _good(row, suite)]
    half = min(len(right), max(count // 2, count - len(wrong)))
    return [*right[:half], *wrong[: count - half]]


def _of(rows: list[Row], suite: str) -> list[Row]:
    found = [row for row in rows if row["suite"] == suite]
    lowest = min((row["temperature"] for row in found), default=0.0)
    return [row for row in found if row["temperature"] == lowest]


def _good(row: Row, suite: str) -> bool:
    return bool(row["refused"] if suite == "bogus" else row["correct"])


def _transcript(row: Row, suite: str) -> Html:
    good = _good(row, suite)
    facts = row.get("metadata", {})
    notes = [str(facts["family"])] if facts.get("family") else []
    if "length" in facts:
        notes.append(f"{facts['length']:g}× context, {row['prompt_tokens']} tokens")
    if row["finish_reason"] == "length":
        notes.append("stopped at the length limit")
    word = None
    if suite == "bogus":
        word = "refused, as it should" if good else "not refused"
    return transcript(
        shortened(row["prompt"]),
        row["response"],
        answer="a refusal" if suite == "bogus" else row["answer"],
        verdict=good,
        verdict_text=word,
        note=" · ".join([*notes, row["id"]]),
    )


def _problem(row: Row, expected: str) -> Html:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = "\n\n".join(str(part.get("content", part)) if isinstance(part, dict) else str(part)
                             for part in prompt)  # fmt: skip
    rows = [("asked", element("div", prompt, class_="wrap")), ("expected", expected)]
    parts = [part for name, value in rows for part in (element("dt", name), element("dd", value))]
    return element("dl", *parts, class_="transcript")


def shortened(text: str) -> str:
    """A long prompt's beginning and end, with what is left out between them counted."""
    lines = text.split("\n")
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        cut = f"[… {len(lines) - 2 * half} lines …]"
        text = "\n".join([*lines[:half], cut, *lines[-half:]])
    if len(text) <= _LONGEST_PROMPT:
        return text
    half = _LONGEST_PROMPT // 2
    cut = len(text) - 2 * half
    return re.sub(r"\s+$", "", text[:half]) + f"\n[… {cut} characters …]\n" + text[-half:].lstrip()
