"""Whole answers coloured by p, their pivotal tokens boxed, and what else could have stood there.

Call `question_block(findings, paths)` for the answers of one question; `choose(paths, 24)` picks
instructive questions. Writes nothing.
"""

import re
from collections.abc import Iterator, Sequence

from phiforge.core.page import (
    Column,
    Html,
    Token,
    bar,
    element,
    join,
    number,
    p_value,
    sparkline,
    table,
    tokens,
    visible,
)
from phiforge.posttrain.pivotal.findings import (
    Findings,
    Row,
    by_question,
    effects,
    in_turns,
    largest,
)
from phiforge.posttrain.pivotal.kinds import token_text

MAX_QUESTION_CHARACTERS = 1500
_NUM_ALTERNATIVES = 5
# What the common chat templates put around the user's words.
_USER = (
    re.compile(r"<\|im_start\|>user(?:<\|im_sep\|>|\n)(.*?)<\|im_end\|>", re.DOTALL),
    re.compile(r"<\|user\|>\n?(.*?)(?:<\|end\|>|<\|assistant\|>|</s>)", re.DOTALL),
    re.compile(r"<\|start_header_id\|>user<\|end_header_id\|>\s*(.*?)<\|eot_id\|>", re.DOTALL),
    re.compile(r"<start_of_turn>user\n(.*?)<end_of_turn>", re.DOTALL),
    re.compile(r"\[INST\](.*?)\[/INST\]", re.DOTALL),
)


def choose(paths: Sequence[Row], count: int, per_question: int = 2) -> list[list[Row]]:
    """At least `count` answers with pivotal tokens, where there are so many, by question.

    Questions come by their largest |delta|, the families taking turns; of one question the answers
    with the largest |delta|, at most `per_question`.
    """
    families: dict[str, list[list[Row]]] = {}
    for answers in by_question(paths).values():
        best = sorted((a for a in answers if a["pivotal"]), key=largest, reverse=True)
        if best:
            families.setdefault(best[0].get("family") or "", []).append(best[:per_question])
    for questions in families.values():
        questions.sort(key=lambda answers: -largest(answers[0]))
    chosen: list[list[Row]] = []
    for answers in in_turns(families[name] for name in sorted(families)):
        if sum(map(len, chosen)) >= count:
            break
        chosen.append(answers)
    return chosen


def question_text(prompt: str) -> str:
    """The user's last words in a rendered chat; the prompt as it is when it is none."""
    for pattern in _USER:
        if found := pattern.findall(prompt):
            return found[-1].strip()
    return prompt


def question_block(findings: Findings, paths: Sequence[Row], *, heading: bool = True) -> Html:
    """The question, what was expected, and each answer coloured by p with a table of its tokens."""
    first = paths[0]
    facts = [str(first["family"])] if first.get("family") else []
    if first.get("answer") is not None:
        facts.append(f"expected {first['answer']}")
    line = visible(" · ".join(facts), spaces=False)
    title = element("h3", visible(first["problem_id"]), element("small", line))
    text = question_text(first["prompt"])
    explained: set[int] = set()
    return element(
        "article",
        title if heading else element("p", line, class_="note"),
        element("p", visible(text, limit=MAX_QUESTION_CHARACTERS, spaces=False), class_="asked"),
        *(_answer(findings, path, explained) for path in paths),
        class_="solution",
    )


def _answer(findings: Findings, path: Row, explained: set[int]) -> Html:
    found = effects(path)
    word = "right" if path["success"] else "wrong"
    known = [p for p in path["p"] if p is not None]
    course = f"p from {known[0]:.2f} to {known[-1]:.2f}" if known else "p unknown"
    noun = "token" if len(found) == 1 else "tokens"
    facts = f"{course} over {len(path['texts'])} tokens, {len(found)} pivotal {noun}"
    mark = element("span", f"{'✓' if path['success'] else '✗'} {word}", class_=f"verdict {word}")
    line = sparkline(path["p"], marks=[i + 1 for i in found], label=f"Course of p: {facts}")
    return join(
        [
            element("div", element("span", mark, f" answer · {facts}"), line, class_="course"),
            tokens(along(path), description=f"A {word} answer. {facts}."),
            _token_table(findings, path, found, explained),
        ]
    )


def along(path: Row) -> Iterator[Token]:
    """An answer's tokens, each with p at the nearest known prefixes before and after it."""
    p, found = path["p"], effects(path)
    raw = path.get("hex") or {}
    before = p[0] if p else None
    start = 0
    following = _following(p)
    for i, text in enumerate(path["texts"]):
        if i < len(p) and p[i] is not None:
            before, start = p[i], i
        end = following[i]
        after = None if end is None else p[end]
        note = "" if end is None or end - start <= 1 else f"over {end - start} tokens"
        yield Token(
            text,
            before if after is not None else None,
            after if before is not None else None,
            pivotal=i in found,
            label=_label(found[i]) if i in found else "",
            note=note,
            hex=raw.get(str(i), ""),
        )


def _following(p: Sequence[float | None]) -> list[int | None]:
    """For each position the nearest index after it where p is known."""
    nearest: list[int | None] = []
    index = None
    for i in range(len(p) - 1, 0, -1):
        index = i if p[i] is not None else index
        nearest.append(index)
    return nearest[::-1]


def signed(value: float) -> str:
    """Two decimals with a sign."""
    return f"{value:+.2f}".replace("-", "−")


def _label(effect: Row) -> Html:
    return join([signed(effect["delta"]), _limits(effect)])


def _limits(effect: Row) -> Html | None:
    if effect.get("low") is None:
        return None
    return element("small", f"[{signed(effect['low'])}, {signed(effect['high'])}]")


# ------------------------------------------------------------------------------- under an answer


def _token_table(
    findings: Findings, path: Row, found: dict[int, Row], explained: set[int]
) -> Html | None:
    """A row for each pivotal token that no answer of the question had before."""
    ids = path.get("token_ids") or []
    details = {
        i: row
        for i in sorted(found)
        if (row := findings.token_at.get((path["problem_id"], *ids[: i + 1])))
        and id(row) not in explained
    }
    explained.update(map(id, details.values()))
    if not details:
        return element("p", "Boxed tokens as above.", class_="note") if explained else None
    tested = any(row.get("p_value") is not None for row in details.values())
    measured = "q_value" if any("q_value" in row for row in details.values()) else "p_value"
    columns = [
        Column("Token"),
        Column("p before", "number"),
        Column("p after", "number"),
        Column("Δ [95%]", "number"),
        Column("n after, other", "number"),
        *([Column(measured.replace("_", "-"), "number")] if tested else []),
        Column("What stood there, all rollouts"),
    ]
    rows = []
    for i, row in details.items():
        test = [p_value(row.get(measured))] if tested else []
        rows.append([_place(row, i), *_measures(row, found[i]), *test, _others(findings, row)])
    return element("div", table(columns, rows), class_="under")


def _place(row: Row, position: int) -> Html:
    place = element("span", f"{position + 1}", class_="quiet", title="place in the answer")
    return join([place, " ", token_text(row["token"], row.get("hex") or "")])


def _measures(row: Row, effect: Row) -> list[object]:
    other = row.get("n_off") if row.get("n_off") is not None else row.get("n_before")
    low, high = row["interval"]
    limits = element("span", f"[{signed(low)}, {signed(high)}]", class_="interval")
    return [
        number(row["p_before"]),
        number(row["p_after"]),
        join([element("b", signed(row["delta"])), limits]),
        f"{row['n_after']}, {'–' if other is None else other}",
    ]


def _others(findings: Findings, row: Row) -> Html:
    """The tokens that rollouts took in this place, with p and n; this token is set in bold."""
    pairs = findings.pairs_at.get((row["problem_id"], *row["prefix_token_ids"]), [])
    sides = {
        pair[f"{side}_token_ids"][0]: side for pair in pairs for side in ("rejected", "chosen")
    }
    items = []
    others = row["alternatives"]
    if all(other["token_id"] != row["token_id"] for other in others):
        own = {"n": row["n_after"], "successes": row["successes_after"]}
        others = [
            own | {name: row[name] for name in ("token_id", "token", "hex") if name in row},
            *others,
        ]
    shown = others[:_NUM_ALTERNATIVES]
    for other in shown:
        p = other["successes"] / other["n"] if other["n"] else None
        tag = "b" if other["token_id"] == row["token_id"] else "span"
        items += [
            element(tag, token_text(other["token"], other.get("hex") or "")),
            bar(p or 0.0, "" if (p or 0.0) >= row["p_before"] else "fall"),
            element("span", number(p), f" of {other['n']}"),
            element("span", sides.get(other["token_id"], ""), class_="quiet"),
        ]
    parts = [element("div", *items, class_="others")]
    if rest := len(others) - len(shown):
        parts.append(element("div", f"and {rest} more", class_="quiet"))
    return join([*parts, *(_pair(pair) for pair in pairs[:1])])


def _pair(pair: Row) -> Html:
    facts = pair["metadata"]
    interval = facts.get("interval")
    limits = f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else ""
    text = (
        f"pair: {facts['p_chosen']:.2f} of {facts['n_chosen']} over {facts['p_rejected']:.2f} of "
        f"{facts['n_rejected']}, {signed(facts['delta'])}{limits}"
    )
    return element("div", text, class_="quiet")
