"""Answers as JSON that fits a schema: tolerant reading, checking, one repair call per answer.

`shape_of(schema)` takes a pydantic model or a JSON Schema; `answer_json(endpoint, calls, shape)`
is `Endpoint.generate_json`. What fits gets a `value`; the rest is a Failure of kind "schema".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phiforge.inference.endpoint.calls import Answer, Call, EndpointError, Failure, Outcome
from phiforge.inference.endpoint.schema import check_schema, problems
from phiforge.inference.interface import Progress, Prompt

if TYPE_CHECKING:
    from phiforge.inference.endpoint.client import Endpoint

_FENCED = re.compile(r"```(?:json|JSON)?\s*\n(.*?)```", re.S)
_STARTS = re.compile(r"[{\[]")
# Beginnings tried in one text; an answer full of brackets is not read forever.
_MOST_STARTS = 200


class Unfit(ValueError):
    """A text that holds no JSON, or JSON that does not fit; the message says what is wrong."""


@dataclass(frozen=True)
class Shape:
    """A schema, and how a parsed value is checked (it returns the value to keep)."""

    schema: Mapping[str, Any]
    check: Callable[[Any], Any]


def shape_of(schema: Any) -> Shape:
    """A pydantic model or a JSON Schema. Raises ValueError for anything else."""
    from pydantic import BaseModel, ValidationError

    if isinstance(schema, type) and issubclass(schema, BaseModel):
        model = schema

        def check_model(value: Any) -> Any:
            try:
                return model.model_validate(value)
            except ValidationError as error:
                rows = [(".".join(map(str, e["loc"])) or "$", e["msg"]) for e in error.errors()]
                raise Unfit("; ".join(f"{path}: {text}" for path, text in rows[:5])) from None

        return Shape(model.model_json_schema(), check_model)
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema is {schema!r}; give a pydantic model or a JSON Schema (a dict)")
    check_schema(schema)

    def check_value(value: Any) -> Any:
        if found := problems(value, schema):
            raise Unfit("; ".join(found[:5]))
        return value

    return Shape(schema, check_value)


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as chat messages. Raises ValueError for token ids."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    items: list[Any] = list(prompt)
    if not items or not all(isinstance(item, Mapping) for item in items):
        raise ValueError("JSON by schema needs prompts of text or chat messages, not token ids")
    return [dict(item) for item in items]


def read_value(text: str, shape: Shape) -> Any:
    """The first JSON value in the text that fits. Raises Unfit naming what is wrong.

    The whole text, fenced blocks, then every place where an object or array begins are tried;
    what a reasoning model wrote before "</think>" is left out.
    """
    text = text.rpartition("</think>")[2]
    complaint = None
    for value in _candidates(text):
        try:
            return shape.check(value)
        except Unfit as error:
            complaint = complaint or error
    if complaint is not None:
        raise complaint
    raise Unfit(f"no JSON in {text[:80]!r}")


def _candidates(text: str) -> Iterator[Any]:
    for piece in (text, *_FENCED.findall(text)):
        try:
            yield json.loads(piece, strict=False)
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder(strict=False)
    end = 0
    for number, start in enumerate(_STARTS.finditer(text)):
        if number >= _MOST_STARTS:
            return
        if start.start() < end:
            continue  # inside a value that was tried
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        yield value


def answer_json(
    endpoint: Endpoint, calls: Sequence[Call], shape: Shape, progress: Progress | None
) -> list[list[Outcome]]:
    """All calls; then one repair call for each answer that does not fit; then Failures.

    Answers that stay unfit leave the cache, so the next run asks for them again.
    """
    try:
        results, repairs = _checked(endpoint.answer(calls, progress=progress), calls, shape)
    except EndpointError as error:
        error.results, _ = _checked(error.results, calls, shape)
        raise
    if not repairs:
        return results  # type: ignore[return-value]
    try:
        found = endpoint.answer([repair for *_, repair in repairs])
    except EndpointError as error:
        error.results = results
        raise
    unfit: list[Call] = []
    for (position, offset, repair), (outcome,) in zip(repairs, found, strict=True):
        first = results[position][offset]
        results[position][offset] = fixed = _after_repair(first, outcome, shape)
        if isinstance(fixed, Failure):
            call = calls[position]
            unfit += [replace(call, n=1, first_index=call.first_index + offset), repair]
    endpoint.forget(unfit)
    return results  # type: ignore[return-value]


def _checked(
    results: Sequence[Sequence[Outcome | None]], calls: Sequence[Call], shape: Shape
) -> tuple[list[list[Outcome | None]], list[tuple[int, int, Call]]]:
    """Answers with their values, Failures for those that do not fit; and the repairs to ask for,
    with their places."""
    checked, repairs = [list(row) for row in results], []
    for position, row in enumerate(checked):
        for offset, outcome in enumerate(row):
            if not isinstance(outcome, Answer):
                continue
            try:
                row[offset] = replace(outcome, value=read_value(outcome.text, shape))
            except Unfit as error:
                repair = _repair(calls[position], offset, outcome, str(error))
                repairs.append((position, offset, repair))
                row[offset] = _failure(str(error), attempts=1)
    return checked, repairs


def _after_repair(first: Outcome | None, repaired: Outcome, shape: Shape) -> Outcome:
    assert isinstance(first, Failure)
    if isinstance(repaired, Failure):
        return _failure(f"{first.message}; the repair call failed ({repaired.message})", 2)
    try:
        return replace(repaired, value=read_value(repaired.text, shape))
    except Unfit as error:
        return _failure(f"{first.message}; after the repair: {error}", 2)


def _repair(call: Call, offset: int, answer: Answer, complaint: str) -> Call:
    messages = [
        *as_messages(call.prompt),
        {"role": "assistant", "content": answer.text},
        {
            "role": "user",
            "content": f"That answer is not valid: {complaint}. Answer again with only the "
            "corrected JSON.",
        },
    ]
    return replace(call, prompt=messages, n=1, first_index=call.first_index + offset)


def _failure(message: str, attempts: int) -> Failure:
    return Failure(kind="schema", message=message, status=200, attempts=attempts)
