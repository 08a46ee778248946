"""Pivotal pairs for other tools: as token ids, as text, as TRL columns, as codelion/pts JSONL.

`export("runs/x/pivotal/pairs.jsonl", "trl", "pairs.trl.jsonl", tokenizer)` writes the file whole or
not at all and returns counts; `import_codelion(path, tokenizer)` reads what that tool wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from phiforge.core.records import Pair, from_dict, read_rows, write_records
from phiforge.model.tokenizer import Tokenizer
from phiforge.posttrain.pivotal.codelion import import_codelion

__all__ = [
    "Ids",
    "Inexact",
    "Report",
    "export",
    "export_tokens",
    "import_codelion",
    "located_pairs",
    "token_ids",
]

Format = Literal["token-ids", "text", "trl", "codelion"]
_TEXT_FORMATS = ("text", "codelion")


@dataclass(frozen=True)
class Ids:
    """The token ids of a pair: what follows `prompt_ids` is trained, exactly as it stands."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class TokenIdRow:
    """A row of "token-ids". The "trl" columns are the same without the metadata, whose fields
    differ from row to row and would give a data set of columns no fixed type."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrlRow:
    """A row of "trl": the columns that `PivotalDPOTrainer` takes."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class TextRow:
    """A row of "text"."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CodelionPair:
    """A DPO row as codelion/pts exports it."""

    prompt: str
    chosen: str
    rejected: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class CodelionToken:
    """A pivotal token as codelion/pts v0.1.0 stores it; its later versions read this too."""

    model_id: str
    query: str
    pivot_context: str
    pivot_token: str
    pivot_token_id: int
    prob_before: float
    prob_after: float
    prob_delta: float
    is_positive: bool
    task_type: str
    dataset_id: str | None
    dataset_item_id: str
    timestamp: str


@dataclass(frozen=True)
class Inexact:
    """A pair whose text does not re-tokenise to its own token ids: where, which, and why."""

    where: str
    id: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What an export wrote: `num_pairs` read, `num_written`, and the inexact ones.

    Inexact pairs were left out, or written all the same with `keep_inexact`.
    """

    format: str
    path: Path
    num_pairs: int
    num_written: int
    inexact: tuple[Inexact, ...] = ()

    @property
    def num_dropped(self) -> int:
        return self.num_pairs - self.num_written


def export(
    pairs: Iterable[Pair] | str | Path,
    format: Format,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    keep_inexact: bool = False,
    queries: Mapping[str, str] | None = None,
) -> Report:
    """Write pairs (records, or the pairs.jsonl of a pivotal stage) for another tool.

    "token-ids": prompt_ids, chosen_ids, rejected_ids and metadata; "trl": the same without
    metadata; "text": prompt, chosen, rejected and metadata; "codelion": codelion/pts' DPO rows,
    with `queries` (problem id → question) as `original_query`. A path ends in .jsonl, .jsonl.gz or
    .parquet (codelion: not Parquet). The text formats need the tokenizer, and leave out pairs that
    do not come back as the same token ids, unless `keep_inexact`; elsewhere it checks the ids'
    range. Raises ValueError that names FILE:LINE (or the pair's id) for a pair without usable ids.
    """
    path = Path(path)
    _check_arguments(format, path, tokenizer, keep_inexact, queries)
    inexact: list[Inexact] = []
    counts = {"read": 0, "written": 0}

    def rows() -> Iterator[Any]:
        for where, pair in located_pairs(pairs):
            counts["read"] += 1
            ids = token_ids(pair, where, tokenizer.vocab_size if tokenizer else None)
            if format == "token-ids":
                row: Any = TokenIdRow(pair.id, **vars(ids), metadata=pair.metadata)
            elif format == "trl":
                row = TrlRow(pair.id, **vars(ids))
            else:
                assert tokenizer is not None
                texts, reason = spell(ids, tokenizer)
                if reason:
                    inexact.append(Inexact(where, pair.id, reason))
                    if not keep_inexact:
                        continue
                row = _text_row(format, pair, ids, texts, tokenizer, queries or {})
            counts["written"] += 1
            yield row
        if path.suffix == ".parquet" and not counts["written"]:
            raise ValueError(f"{path}: no pair to write; a Parquet file needs one, .jsonl does not")

    write_records(path, rows())
    return Report(format, path, counts["read"], counts["written"], tuple(inexact))


def _check_arguments(
    format: str,
    path: Path,
    tokenizer: Tokenizer | None,
    keep_inexact: bool,
    queries: Mapping[str, str] | None,
) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(get_args(Format))}")
    if format in _TEXT_FORMATS and tokenizer is None:
        raise ValueError(f"format {format!r} writes text, so it needs the model's tokenizer")
    if format not in _TEXT_FORMATS and keep_inexact:
        raise ValueError(f"keep_inexact has no effect on {format!r}: token ids are always exact")
    if format != "codelion" and queries is not None:
        raise ValueError(f"queries are read by format 'codelion' only, not by {format!r}")
    if format == "codelion" and path.suffix == ".parquet":
        raise ValueError(f"{path}: codelion/pts reads JSONL only; name a .jsonl file")


def located_pairs(pairs: Iterable[Pair] | str | Path) -> Iterator[tuple[str, Pair]]:
    """Each pair with what errors call it: FILE:LINE, or its id when it comes from no file."""
    if isinstance(pairs, str | Path):
        for where, row in read_rows(pairs):
            yield where, from_dict(Pair, row, where)
    else:
        for pair in pairs:
            yield f"pair {pair.id}", pair


def token_ids(pair: Pair, where: str, vocab_size: int | None = None) -> Ids:
    """The pair's token ids. Raises ValueError when they are missing, empty, equal or no ids."""
    sides = []
    for name in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        ids = getattr(pair, name)
        if not isinstance(ids, list | tuple) or not ids:
            raise ValueError(
                f"{where}: {name} is {ids!r}; every pair must hold token ids, as the pivotal "
                "stage writes them"
            )
        for index in ids:
            low = isinstance(index, int) and not isinstance(index, bool) and index >= 0
            if not low or (vocab_size is not None and index >= vocab_size):
                limit = "an integer from 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
                raise ValueError(
                    f"{where}: {name} holds {index!r}; a token id must be {limit}. Is this the "
                    "model's own tokenizer?"
                )
        sides.append(list(ids))
    if sides[1] == sides[2]:
        raise ValueError(f"{where}: chosen and rejected are the same tokens {sides[1]}")
    return Ids(*sides)


def spell(ids: Ids, tokenizer: Tokenizer) -> tuple[tuple[str, str, str], str | None]:
    """(prompt, chosen, rejected) as text, and why they do not re-tokenise exactly (None: they do).

    Read again as the tools that take text do: special tokens' names count as special tokens, and
    the tokenizer adds what it adds to every text (a start token), which the prompt's text then
    leaves out.
    """
    added = tokenizer.backend.encode("").ids
    has_start = bool(added) and ids.prompt_ids[: len(added)] == added
    rest = ids.prompt_ids[len(added) :] if has_start else ids.prompt_ids
    prompt = tokenizer.decode(rest, skip_special=False)
    reason = _difference("the prompt", prompt, ids.prompt_ids, tokenizer)
    sides = []
    for name, side in (("chosen", ids.chosen_ids), ("rejected", ids.rejected_ids)):
        # What the token adds to the text: decoded alone, some tokenizers drop its leading space.
        whole = tokenizer.decode([*rest, *side], skip_special=False)
        joined = whole.startswith(prompt)
        text = whole[len(prompt) :] if joined else tokenizer.decode(side, skip_special=False)
        expected = [*ids.prompt_ids, *side]
        reason = reason or _difference(
            f"the prompt with {name}", prompt + text, expected, tokenizer
        )
        sides.append(text)
    return (prompt, sides[0], sides[1]), reason


def _difference(name: str, text: str, expected: list[int], tokenizer: Tokenizer) -> str | None:
    found = tokenizer.backend.encode(text).ids
    if found == expected:
        return None
    pairs = zip(found, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    was = tokenizer.decode(expected[at : at + 1], skip_special=False)
    return f"{name} re-tokenises otherwise from token {at} ({was!r}) on"


def _text_row(
    format: str,
    pair: Pair,
    ids: Ids,
    texts: tuple[str, str, str],
    tokenizer: Tokenizer,
    queries: Mapping[str, str],
) -> TextRow | CodelionPair:
    if format == "text":
        return TextRow(pair.id, *texts, metadata=pair.metadata)
    query = queries.get(str(pair.metadata.get("problem_id")))
    if query is None:
        # Without the question's own text: its tokens, chat format and all.
        question = ids.prompt_ids[: pair.metadata.get("num_prompt_tokens") or len(ids.prompt_ids)]
        query = tokenizer.decode(question, skip_special=False)
    return dpo_row(pair, texts, query)


def dpo_row(pair: Pair, texts: tuple[str, str, str], query: str) -> CodelionPair:
    """The row of a pair. `prob_delta` is, as there, what the pivotal one of both tokens changes,
    by size; the difference of both tokens is `prob_chosen` - `prob_rejected`."""
    known = pair.metadata
    chosen, rejected, before = (known.get(f"p_{name}") for name in ("chosen", "rejected", "before"))
    changes = [abs(p - before) for p in (chosen, rejected) if p is not None and before is not None]
    metadata = {
        "original_query": query,
        "prob_chosen": chosen,
        "prob_rejected": rejected,
        "prob_delta": max(changes, default=None),
        "task_type": known.get("family") or "generic",
        "event_id": pair.id,
        "category": None,
        "counterpart_verified": chosen is not None and rejected is not None,
    }
    return CodelionPair(*texts, metadata=metadata)


def export_tokens(
    rows: Iterable[Mapping[str, Any]] | str | Path,
    path: str | Path,
    tokenizer: Tokenizer,
    model_id: str,
    *,
    dataset_id: str | None = None,
    queries: Mapping[str, str] | None = None,
) -> Report:
    """Write a pivotal stage's tokens.jsonl (or its rows) as codelion/pts v0.1.0's tokens.

    Tokens whose context and text do not come back as the same token ids are left out and listed.
    `queries`: problem id → question; without it the prompt's own text.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: codelion/pts reads JSONL only; name a .jsonl file")
    if isinstance(rows, str | Path):
        located = read_rows(rows)
    else:
        located = ((f"token {number}", row) for number, row in enumerate(rows, 1))
    inexact: list[Inexact] = []
    counts = {"read": 0}

    def written() -> Iterator[CodelionToken]:
        for where, row in located:
            counts["read"] += 1
            prefix, token = list(row["prefix_token_ids"]), row["token_id"]
            # The token stands for both sides: it is what must come back.
            (context, text, _), reason = spell(Ids(prefix, [token], [token]), tokenizer)
            if reason:
                inexact.append(Inexact(where, row["problem_id"], reason))
                continue
            query = (queries or {}).get(row["problem_id"])
            if query is None:
                query = tokenizer.decode(row["prompt_token_ids"], skip_special=False)
            yield _codelion_token(row, context, text, query, model_id, dataset_id)

    num_written = write_records(path, written())
    return Report("codelion-tokens", path, counts["read"], num_written, tuple(inexact))


def _codelion_token(
    row: Mapping[str, Any],
    context: str,
    text: str,
    query: str,
    model_id: str,
    dataset_id: str | None,
) -> CodelionToken:
    return CodelionToken(
        model_id=model_id,
        query=query,
        pivot_context=context,
        pivot_token=text,
        pivot_token_id=row["token_id"],
        prob_before=row["p_before"],
        prob_after=row["p_after"],
        prob_delta=row["delta"],
        is_positive=row["delta"] > 0,
        task_type=row.get("family") or "generic",
        dataset_id=dataset_id,
        dataset_item_id=row["problem_id"],
        # No clock in an output: the same tokens give the same bytes.
        timestamp="1970-01-01T00:00:00",
    )
