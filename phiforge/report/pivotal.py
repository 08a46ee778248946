"""The section on pivotal tokens: answers coloured by how each token moved p(success), and pairs.

`section(data, num_paths)`: RunData in, a Section (or None) out.
"""

import re
from collections.abc import Iterator
from itertools import chain, zip_longest

from phiforge.core.page import (
    Column,
    Html,
    Section,
    Token,
    details,
    element,
    join,
    number,
    quantity,
    table,
    token_legend,
    tokens,
)
from phiforge.report.run_data import Row, RunData

_QUESTION = re.compile(r"<\|im_start\|>user<\|im_sep\|>(.*?)<\|im_end\|>", re.DOTALL)
_CONTEXT_CHARACTERS = 40
# A look at more lines than are shown, so that every family finds an example.
_SCANNED_LINES = 2000


def section(data: RunData, num_paths: int) -> Section | None:
    """What the search found and cost, answers with their pivotal tokens, and the pairs made."""
    metrics = data.metrics("pivotal")
    rows = data.rows("pivotal", "paths.jsonl", _SCANNED_LINES)
    if not metrics and not rows:
        return None
    pairs: dict[str, list[Row]] = {}
    for pair in data.rows("pivotal", "pairs.jsonl"):
        pairs.setdefault(pair["metadata"].get("problem_id", ""), []).append(pair)
    chosen = choose_paths(rows, num_paths)
    parts = [_summary(metrics)] if metrics else []
    if chosen:
        parts.append(token_legend())
        parts += [_path(row, pairs.get(row["problem_id"], [])) for row in chosen]
    return Section(
        "Pivotal tokens",
        join(parts),
        note="Answers of the SFT model. p is the share of sampled continuations that end in a "
        "right answer; hover over a token to read it before and after.",
    )


def choose_paths(rows: list[Row], count: int) -> list[Row]:
    """`count` paths with a pivotal token, one per problem, the families taking turns."""
    families: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["pivotal"]:
            families.setdefault(row.get("family") or "", {}).setdefault(row["problem_id"], row)
    turns = zip_longest(*(list(found.values()) for found in families.values()))
    return [row for row in chain.from_iterable(turns) if row is not None][:count]


def along(row: Row) -> Iterator[Token]:
    """A path's tokens, each with p at the nearest known prefixes before and after it."""
    known = [i for i, p in enumerate(row["p"]) if p is not None]
    pivotal = set(row["pivotal"])
    for i, text in enumerate(row["texts"]):
        before = max((k for k in known if k <= i), default=None)
        after = min((k for k in known if k > i), default=None)
        if before is None or after is None:
            yield Token(text)
            continue
        note = f"over {after - before} tokens" if after - before > 1 else ""
        yield Token(text, row["p"][before], row["p"][after], pivotal=i in pivotal, note=note)


def _summary(metrics: Row) -> Html:
    def value(name: str) -> int:
        return metrics.get(name) or 0

    spent = value("filter_tokens") + value("search_tokens")
    return element(
        "p",
        f"{value('questions_screened')} questions screened: {value('questions_in_band')} with "
        f"p(success) in the band, {value('questions_below_band')} below, "
        f"{value('questions_above_band')} above. {value('paths')} answers searched with ",
        quantity(value("rollouts")),
        " rollouts (",
        quantity(spent),
        f" tokens): {value('pivotal_tokens')} pivotal tokens, "
        f"{value('pivotal_tokens_rising')} of which raise p; {value('pairs')} preference pairs.",
    )


def _path(row: Row, pairs: list[Row]) -> Html:
    verdict = "right" if row["success"] else "wrong"
    start = row["p"][0] if row["p"] and row["p"][0] is not None else None
    facts = [row.get("family") or row["problem_id"], f"this answer is {verdict}"]
    if start is not None:
        facts.append(f"p(success) of the question {start:.2f}")
    if row.get("answer") is not None:
        facts.append(f"expected {row['answer']}")
    parts = [
        element("h3", " · ".join(facts)),
        tokens(along(row), prompt=question_text(row["prompt"])),
    ]
    if pairs:
        noun = "pair" if len(pairs) == 1 else "pairs"
        parts.append(details(f"{len(pairs)} preference {noun} from this question", _pairs(pairs)))
    return join(parts)


def _pairs(pairs: list[Row]) -> Html:
    columns = [
        Column("After"),
        Column("p", "number"),
        Column("Chosen"),
        Column("p", "number"),
        Column("n", "number"),
        Column("Rejected"),
        Column("p", "number"),
        Column("n", "number"),
        Column("Δ", "number"),
    ]
    body = []
    for pair in pairs:
        facts = pair["metadata"]
        body.append(
            [
                _code("…" + plain(str(pair["prompt"]))[-_CONTEXT_CHARACTERS:]),
                number(facts.get("p_before")),
                _code(str(pair["chosen"])),
                number(facts.get("p_chosen")),
                facts.get("n_chosen"),
                _code(str(pair["rejected"])),
                number(facts.get("p_rejected")),
                facts.get("n_rejected"),
                number(facts.get("delta")),
            ]
        )
    return table(columns, body)


def question_text(prompt: str) -> str:
    """The user's words of a rendered chat; the prompt as it is when it is none."""
    found = _QUESTION.findall(prompt)
    return found[-1] if found else prompt


def plain(prompt: str) -> str:
    """A rendered chat without its markers."""
    text = re.sub(r"<\|im_start\|>\w+<\|im_sep\|>", "\n", prompt)
    return re.sub(r"<\|[^|<>]*\|>", "", text)


def _code(text: str) -> Html:
    return element("code", text.replace("\n", "↵"), class_="wrap")
