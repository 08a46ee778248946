"""What a server sent back: choices and token counts of a reply; answers in and out of the cache.

`parse(body, path)` raises Garbage, naming the first bytes, for what is not the API's shape;
`dump(answer)` and `load(text)` are the cache's form.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from phiforge.inference.endpoint.calls import Answer
from phiforge.inference.endpoint.wire import CHAT

_FINISHED = ("stop", "length", "content_filter")


class Garbage(Exception):
    """A reply with status 200 that is not what the API promises."""


@dataclass(frozen=True)
class Choice:
    """One choice of a reply. `tokens` counts its own tokens where the reply shows them."""

    text: str
    finish_reason: str
    reasoning: str | None
    token_ids: tuple[int, ...] | None
    logprobs: tuple[float | None, ...] | None
    refusal: str | None


@dataclass(frozen=True)
class Parsed:
    """A reply: its choices in order, and the token counts it names (None: it names none)."""

    choices: list[Choice]
    prompt_tokens: int | None
    completion_tokens: int | None


def parse(body: bytes, path: str) -> Parsed:
    """Read a reply of status 200. Raises Garbage naming what is wrong and its first bytes."""
    try:
        reply = json.loads(body)
        rows = sorted(reply["choices"], key=lambda row: row.get("index") or 0)
        found = [_choice(row, path) for row in rows]
        if not found:
            raise ValueError("no choices")
        usage = reply.get("usage") or {}
        counts = [_count(usage.get(n)) for n in ("prompt_tokens", "completion_tokens")]
    except RecursionError:
        raise Garbage(f"JSON nested too deeply; it begins {first_bytes(body)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = "no JSON" if isinstance(error, json.JSONDecodeError) else _name(error)
        raise Garbage(f"{problem}; it begins {first_bytes(body)}") from None
    return Parsed(found, *counts)


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if whole else None


def _choice(row: Any, path: str) -> Choice:
    finish = row.get("finish_reason") or "stop"
    if finish in ("error", "abort"):  # the server's own trouble in the middle of an answer
        raise ValueError(f"finish_reason {finish!r}")
    finish = finish if finish in _FINISHED else "stop"  # "eos", "stop_sequence" …
    part = row["message"] if path == CHAT else row
    text = part.get("content" if path == CHAT else "text")
    refusal = part.get("refusal") if path == CHAT else None
    if text is None and (refusal or finish != "stop"):
        text = ""
    if not isinstance(text, str):
        raise ValueError("a choice without text")
    reasoning = part.get("reasoning_content") or part.get("reasoning")
    names, logprobs = _logprobs(row.get("logprobs"), path)
    ids = row.get("token_ids")
    if ids is None and names and all(name.startswith("token_id:") for name in names):
        ids = [int(name.removeprefix("token_id:")) for name in names]
    return Choice(
        text=text,
        finish_reason=finish,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        token_ids=None if ids is None else tuple(int(index) for index in ids),
        logprobs=logprobs,
        refusal=refusal or None,
    )


def _logprobs(block: Any, path: str) -> tuple[list[str], tuple[float | None, ...] | None]:
    if not block:
        return [], None
    if path == CHAT:
        rows = block.get("content") or []
        return [str(row["token"]) for row in rows], tuple(float(row["logprob"]) for row in rows)
    values = block.get("token_logprobs")
    if values is None:
        return [], None
    names = [str(name) for name in block.get("tokens") or []]
    return names, tuple(None if value is None else float(value) for value in values)


def first_bytes(body: bytes) -> str:
    """A body's beginning, as a Python bytes literal."""
    return repr(body[:120]) + (" …" if len(body) > 120 else "")


def _name(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"JSON without {error}"
    return f"JSON of another shape ({error})"


# --------------------------------------------------------------------------- kept in the cache

_FIELDS = tuple(f.name for f in fields(Answer) if f.name not in ("cached", "value"))


def dump(answer: Answer) -> str:
    """An answer as the cache keeps it."""
    row = {name: value for name in _FIELDS if (value := getattr(answer, name)) is not None}
    return json.dumps(row, separators=(",", ":"))


def load(text: str) -> Answer:
    """The other way round; the answer says that it comes from the cache."""
    row = json.loads(text)
    for name in ("token_ids", "logprobs"):
        if name in row:
            row[name] = tuple(row[name])
    return Answer(**row, cached=True)
