"""The JSONL files of codelion/pts read: pivotal tokens, events and DPO pairs, put on token ids.

`tokens, pairs, report = import_codelion("pivotal_tokens.jsonl", tokenizer)` takes the rows of
v0.1.0 and of the later event schema. Writes nothing (`exchange.py` writes that tool's shapes).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from phiforge.core.records import Pair, read_rows
from phiforge.model.tokenizer import Tokenizer

SOURCE = "codelion/pts"
_REPLACEMENT = "\ufffd"
# Stored and recomputed differences may disagree by rounding, not by more.
_DELTA_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class ImportedToken:
    """A pivotal token of another tool, placed: `token_id` follows `prefix_token_ids`.

    No interval: the files say how large p is, not how many rollouts stand behind it.
    """

    problem_id: str
    query: str
    prefix_token_ids: list[int]
    token_id: int
    token: str
    p_before: float
    p_after: float
    delta: float
    model_id: str | None
    dataset_id: str | None
    where: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A row, or the pair of a row, that was not taken, and why."""

    where: str
    reason: str


@dataclass
class ImportReport:
    """What an import took and left.

    `other` counts rows that are no tokens and no pairs, by kind (sentences, latent events).
    `model_ids`, `dataset_ids`: rows of each. Tokens hold for the model they were found in only.
    """

    num_rows: int = 0
    num_tokens: int = 0
    num_pairs: int = 0
    num_duplicates: int = 0
    refused: list[Refused] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    model_ids: Counter[str] = field(default_factory=Counter)
    dataset_ids: Counter[str] = field(default_factory=Counter)


class _Misfit(ValueError):
    """Why a row cannot be placed."""


def import_codelion(
    path: str | Path, tokenizer: Tokenizer
) -> tuple[list[ImportedToken], list[Pair], ImportReport]:
    """Read pivotal tokens, events and DPO pairs of codelion/pts, in any mixture.

    That tool stores contexts as text and measures p on the text encoded again, so a context is
    encoded likewise (special tokens' names count as such) and a row is taken only when context and
    token come back as the same token ids and the stored id and position agree; other rows are in
    `report.refused`. Rows written twice (v0.1.0 does) are taken once. Raises ValueError (FILE:LINE)
    for a file that is not JSONL.
    """
    report = ImportReport()
    placer = _Placer(tokenizer)
    tokens: dict[Any, ImportedToken] = {}
    pairs: dict[Any, Pair] = {}
    for where, row in read_rows(path):
        report.num_rows += 1
        try:
            kind = _kind(row)
            if kind == "token":
                _take_token(_normalised(row), where, placer, tokens, pairs, report)
            elif kind == "pair":
                _add_pair(_dpo_pair(row, where, placer), pairs, report)
            else:
                report.other[kind] += 1
        except _Misfit as misfit:
            report.refused.append(Refused(where, str(misfit)))
    report.num_tokens, report.num_pairs = len(tokens), len(pairs)
    return list(tokens.values()), list(pairs.values()), report


def _kind(row: Any) -> str:
    if not isinstance(row, dict):
        raise _Misfit(f"the row is no JSON object but {type(row).__name__}")
    if {"prompt", "chosen", "rejected"} <= row.keys():
        return "pair"
    if "event_type" in row:
        return "token" if row["event_type"] == "pivotal_token" else str(row["event_type"])
    if "pivot_token" in row:
        return "token"
    if "sentence" in row and "sentence_id" in row:
        return "thought_anchor"
    if "steering_vector" in row:
        return "steering_vector"
    raise _Misfit(f"no known row of {SOURCE}; its fields are {', '.join(sorted(row)[:8])}")


def _normalised(row: Mapping[str, Any]) -> dict[str, Any]:
    """A v0.1.0 token or a later event under the events' names, its pair's partner made plain.

    v0.1.0 writes the partner of a harmful token as `rejected_token` too, though it is the better
    of the two; the events have `chosen_token` there.
    """
    extra = _extra(row)
    partner = {k: row.get(k, extra.get(k)) for k in ("rejected_token", "rejected_token_id")}
    better = extra.get("chosen_token")
    return {
        **row,
        "context": row.get("context", row.get("pivot_context")),
        "label": row.get("label", row.get("pivot_token")),
        "token_id": row.get("token_id", row.get("pivot_token_id")),
        "partner": better if better is not None else partner["rejected_token"],
        "partner_id": None if better is not None else partner["rejected_token_id"],
        "partner_p": _probability(
            extra.get("chosen_prob" if better is not None else "rejected_prob")
        ),
        "metadata": extra,
    }


def _take_token(
    row: Mapping[str, Any],
    where: str,
    placer: _Placer,
    tokens: dict[Any, ImportedToken],
    pairs: dict[Any, Pair],
    report: ImportReport,
) -> None:
    """Add the row's token, and the pair that its partner makes with it."""
    before, after, delta = _probabilities(row)
    prefix, token = placer.place(row["context"], row["label"], row["token_id"], row.get("position"))
    key = (tuple(prefix), token, before, after, row.get("model_id"))
    if key not in tokens:
        tokens[key] = _token(row, prefix, token, before, after, delta, where)
        report.model_ids[str(row.get("model_id"))] += 1
        report.dataset_ids[str(row.get("dataset_id"))] += 1
    else:
        report.num_duplicates += 1
    if row["partner"] is not None:
        pair = _partner_pair(row, where, placer, prefix, token, delta, after)
        pairs.setdefault(pair.id, pair)


def _token(
    row: Mapping[str, Any],
    prefix: list[int],
    token_id: int,
    before: float,
    after: float,
    delta: float,
    where: str,
) -> ImportedToken:
    names = ("task_type", "category", "event_id", "timestamp")
    return ImportedToken(
        problem_id=_problem_id(row),
        query=str(row.get("query") or ""),
        prefix_token_ids=prefix,
        token_id=token_id,
        token=row["label"],
        p_before=before,
        p_after=after,
        delta=delta,
        model_id=row.get("model_id"),
        dataset_id=row.get("dataset_id"),
        where=where,
        metadata={name: row[name] for name in names if row.get(name) is not None},
    )


def _probabilities(row: Mapping[str, Any]) -> tuple[float, float, float]:
    values = []
    for name in ("prob_before", "prob_after"):
        p = _probability(row.get(name))
        if p is None:
            raise _Misfit(f"{name} is {row.get(name)!r}; it must be a number from 0 to 1")
        values.append(p)
    delta = values[1] - values[0]
    stored = row.get("prob_delta")
    if isinstance(stored, int | float) and not abs(stored - delta) <= _DELTA_TOLERANCE:
        raise _Misfit(f"prob_delta is {stored}, but prob_after - prob_before is {delta:.4f}")
    return values[0], values[1], delta


def _probability(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= 1 else None


def _extra(row: Mapping[str, Any]) -> dict[str, Any]:
    found = row.get("metadata")
    return found if isinstance(found, dict) else {}


def _problem_id(row: Mapping[str, Any]) -> str:
    """The data set's own id of the item, else a hash of the question."""
    item = row.get("dataset_item_id")
    return str(item) if item is not None else f"query-{_hash(str(row.get('query') or ''))}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _partner_pair(
    row: Mapping[str, Any],
    where: str,
    placer: _Placer,
    prefix: list[int],
    token: int,
    delta: float,
    after: float,
) -> Pair:
    try:
        _, partner = placer.place(row["context"], row["partner"], row["partner_id"], None)
    except _Misfit as misfit:
        raise _Misfit(f"the token is taken, its pair not: partner: {misfit}") from None
    sides = ((row["label"], token, after), (row["partner"], partner, row["partner_p"]))
    chosen, rejected = sides if delta > 0 else sides[::-1]
    return _pair(row, row["context"], prefix, chosen, rejected, where)


def _dpo_pair(row: Mapping[str, Any], where: str, placer: _Placer) -> Pair:
    extra = _extra(row)
    prompt: list[int] = []
    sides = []
    for name in ("chosen", "rejected"):
        try:
            prompt, token = placer.place(row["prompt"], row[name], None, None)
        except _Misfit as misfit:
            raise _Misfit(f"{name}: {misfit}") from None
        sides.append((row[name], token, _probability(extra.get(f"prob_{name}"))))
    origin = {"query": extra.get("original_query"), **extra}
    return _pair(origin, row["prompt"], prompt, sides[0], sides[1], where)


_Side = tuple[str, int, float | None]


def _pair(
    row: Mapping[str, Any],
    context: str,
    prefix: list[int],
    chosen: _Side,
    rejected: _Side,
    where: str,
) -> Pair:
    """A record with the names of our own pairs; `verified`: both sides' p were measured."""
    if chosen[1] == rejected[1]:
        raise _Misfit(f"chosen and rejected are the same token {chosen[1]}")
    p_chosen, p_rejected = chosen[2], rejected[2]
    delta = None if p_chosen is None or p_rejected is None else p_chosen - p_rejected
    metadata = {
        "source": SOURCE,
        "problem_id": _problem_id(row),
        "query": row.get("query"),
        "p_chosen": p_chosen,
        "p_rejected": p_rejected,
        "delta": delta,
        "verified": delta is not None,
        "where": where,
        **{name: row.get(name) for name in ("task_type", "category", "model_id", "dataset_id")},
    }
    return Pair(
        id=f"{SOURCE}/{_hash([prefix, chosen[1], rejected[1]])}",
        prompt=context,
        chosen=chosen[0],
        rejected=rejected[0],
        prompt_token_ids=prefix,
        chosen_token_ids=[chosen[1]],
        rejected_token_ids=[rejected[1]],
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


def _add_pair(pair: Pair, pairs: dict[Any, Pair], report: ImportReport) -> None:
    report.num_duplicates += pair.id in pairs
    pairs.setdefault(pair.id, pair)


class _Placer:
    """Puts stored texts back on token ids, or raises _Misfit."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.backend.encode("").ids

    def encode(self, text: str) -> list[int]:
        """As that tool encodes, but never with a second start token before a written one."""
        ids = self.tokenizer.encode(text, allow_special=True)
        written = ids[: len(self.start)] == self.start
        return ids if written else self.tokenizer.backend.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def place(self, context: Any, text: Any, token_id: Any, position: Any) -> tuple[list[int], int]:
        """(token ids of the context, the token's id); `position` is the context's length."""
        for name, value in (("context", context), ("token", text)):
            if not isinstance(value, str) or not value:
                raise _Misfit(f"the {name} is {value!r}; it must be text")
            if _REPLACEMENT in value:
                raise _Misfit(f"the {name} holds U+FFFD: bytes were lost when it was made text")
        ids = self.encode(context)
        if position is not None and position != len(ids):
            raise _Misfit(f"position is {position}, but the context encodes to {len(ids)} tokens")
        token = self._token(text, token_id)
        if self.encode(self.decode([*ids, token])) != [*ids, token]:
            raise _Misfit(f"context and token {text!r} together encode to other tokens")
        if context not in (self.decode(ids), self.decode(ids[len(self.start) :])):
            raise _Misfit("the context does not come back from its token ids")
        return ids, token

    def _token(self, text: str, stored: Any) -> int:
        if stored is None:
            found = self._spelled.get(text, ())
            if len(found) != 1:
                count = "none" if not found else f"{len(found)} tokens"
                raise _Misfit(f"{text!r} must be exactly one token; {count} of this tokenizer is")
            return found[0]
        if not isinstance(stored, int) or not 0 <= stored < self.tokenizer.vocab_size:
            raise _Misfit(f"token id {stored!r} is not among {self.tokenizer.vocab_size} tokens")
        here = self.decode([stored])
        if here != text:
            raise _Misfit(f"token id {stored} is {here!r} in this tokenizer, {text!r} in the row")
        return stored

    @cached_property
    def _spelled(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index in range(self.tokenizer.vocab_size):
            found.setdefault(self.decode([index]), []).append(index)
        return found
