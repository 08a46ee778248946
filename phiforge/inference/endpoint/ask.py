"""Answers a JSONL of prompts through an endpoint: `phiforge ask`.

`ask(file, out, config, ...)` writes one row per sample to `out` in the file's order; stopped, it
goes on from the replay cache (`OUT.cache` unless the config names one). A dry run only prices it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phiforge.core.files import atomic_path
from phiforge.core.progress import progress
from phiforge.core.usage import UsageError
from phiforge.inference.endpoint.budget import Usage
from phiforge.inference.endpoint.calls import Answer, Call, EndpointError, Failure, Outcome
from phiforge.inference.endpoint.client import Endpoint
from phiforge.inference.endpoint.config import EndpointConfig
from phiforge.inference.endpoint.plan import Estimate
from phiforge.inference.interface import Sampling


@dataclass(frozen=True)
class Question:
    """A row of the file: `prompt` (text, token ids, messages) or `messages`, and an `id`."""

    id: str
    prompt: Any


def read_questions(path: Path) -> list[Question]:
    """The file's rows. Raises UsageError for a missing file and, with FILE:LINE, for bad rows."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: not valid JSON ({error.msg})") from None
        prompt = (row.get("prompt") or row.get("messages")) if isinstance(row, dict) else None
        if not isinstance(prompt, str | list):
            raise UsageError(f"{path}:{number}: needs 'prompt' (text or list) or 'messages'")
        found.append(Question(str(row.get("id", number)), prompt))
    if not found:
        raise UsageError(f"{path}: no prompt in it")
    return found


def read_schema(path: Path | None) -> dict[str, Any] | None:
    """A JSON Schema from a file. Raises UsageError when it holds something else."""
    if path is None:
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a JSON Schema ({error})") from None


def ask(
    file: Path,
    out: Path,
    config: EndpointConfig,
    *,
    n: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    schema: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> Estimate | dict[str, Any]:
    """The estimate of a dry run; else a summary, after `out` is written.

    Raises ValueError, after writing what was answered, when a budget or too many failures stop it.
    """
    questions = read_questions(file)
    sampling = sampling or Sampling()
    cache = config.cache or out.with_name(out.name + ".cache")
    if dry_run and not cache.exists():
        cache = None  # pricing makes no file
    config = config.model_copy(update={"cache": cache})
    calls = [Call(prompt=q.prompt, sampling=sampling, n=n, seed=seed) for q in questions]
    with config.open() as endpoint:
        if dry_run:
            return endpoint.dry_run([replace(call, schema=schema) for call in calls])
        stopped = None
        with progress(len(calls) * n, "answers", "ask") as bar:

            def show(count: int) -> None:
                spent = endpoint.usage.get(config.role)
                bar.advance(count, **({"usd": spent.spent.usd} if config.prices and spent else {}))

            try:
                if schema is None:
                    results: Sequence[Sequence[Outcome | None]] = endpoint.answer(
                        calls, progress=show
                    )
                else:
                    prompts = [question.prompt for question in questions]
                    results = endpoint.generate_json(
                        prompts, schema, n=n, seed=seed, sampling=sampling, progress=show
                    )
            except EndpointError as error:
                stopped, results = error, error.results
        written = write_answers(out, questions, results)
        if stopped is not None:
            raise ValueError(f"{stopped}\n{out}: {written} of {len(calls) * n} rows") from stopped
        return _summary(endpoint, config, out, results)


def write_answers(
    out: Path, questions: Sequence[Question], results: Sequence[Sequence[Outcome | None]]
) -> int:
    """One row per sample that has an outcome; returns how many. Written whole or not at all."""
    count = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for question, row in zip(questions, results, strict=False):
            for index, outcome in enumerate(row):
                if outcome is not None:
                    fields = {"id": question.id, "index": index, **dict(_fields(outcome))}
                    lines.write(json.dumps(fields) + "\n")
                    count += 1
    return count


def _fields(outcome: Outcome) -> Iterator[tuple[str, Any]]:
    if isinstance(outcome, Failure):
        yield "error", {"kind": outcome.kind, "message": outcome.message}
        return
    yield "text", outcome.text
    if outcome.value is not None:
        yield "value", outcome.value
    if outcome.reasoning is not None:
        yield "reasoning", outcome.reasoning
    yield "finish_reason", outcome.finish_reason
    yield "prompt_tokens", outcome.prompt_tokens
    yield "completion_tokens", outcome.completion_tokens


def _summary(
    endpoint: Endpoint,
    config: EndpointConfig,
    out: Path,
    results: Sequence[Sequence[Outcome | None]],
) -> dict[str, Any]:
    flat = [outcome for row in results for outcome in row]
    failed: dict[str, int] = {}
    for outcome in flat:
        if isinstance(outcome, Failure):
            failed[outcome.kind] = failed.get(outcome.kind, 0) + 1
    usage = endpoint.usage.get(config.role, Usage())
    return {
        "out": str(out),
        "answered": sum(isinstance(outcome, Answer) for outcome in flat),
        "cached": sum(isinstance(outcome, Answer) and outcome.cached for outcome in flat),
        "failed": failed,
        "spent_so_far": {
            "calls": usage.spent.calls,
            "prompt_tokens": usage.spent.prompt_tokens,
            "completion_tokens": usage.spent.completion_tokens,
            "usd": round(usage.spent.usd, 6),
        },
    }
