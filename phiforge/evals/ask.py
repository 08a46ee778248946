"""Asks a model many questions at once and grades what it says: one transcript per sample.

Call `ask(engine, questions, temperature=0.0, max_tokens=96)`. Returns Transcripts; `write` and
`read` keep them as JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiforge.core.files import atomic_path
from phiforge.core.records import Problem
from phiforge.verify.answers import is_correct, is_refusal

if TYPE_CHECKING:
    from phiforge.inference.interface import Completion, Generator, Prompt


@dataclass(frozen=True, kw_only=True)
class Question:
    """A problem as it is put to a model: `prompt` is what the model gets, `suite` what it tests.

    `stop` ends generation; `expected` replaces the grader: the response must start with it.
    """

    suite: str
    problem: Problem
    prompt: Prompt
    expected: str | None = None


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One response to one question, with its verdict."""

    checkpoint: str
    suite: str
    id: str
    prompt: str
    response: str
    answer: str | None
    correct: bool
    refused: bool
    temperature: float
    sample: int
    finish_reason: str
    prompt_tokens: int
    response_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


def ask(
    engine: Generator,
    questions: Sequence[Question],
    *,
    checkpoint: str,
    temperature: float,
    max_tokens: int,
    samples: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Transcript]:
    """All `questions` in one call of the engine, `samples` responses each, graded in order."""
    if not questions:
        return []
    answers = engine.generate(
        [question.prompt for question in questions],
        n=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=tuple(stop),
        progress=progress,
    )
    tokenizer = engine.tokenizer
    return [
        _transcript(checkpoint, question, completion, index, temperature, tokenizer)
        for question, completions in zip(questions, answers, strict=True)
        for index, completion in enumerate(completions)
    ]


def grade(question: Question, response: str) -> bool:
    """Whether a response is right: the problem's own check, or the expected beginning."""
    if question.expected is not None:
        return response.strip().startswith(question.expected.strip())
    return is_correct(question.problem, response)


def write(path: Path, transcripts: Iterable[Transcript]) -> int:
    """Write transcripts as JSON lines, whole or not at all; returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for transcript in transcripts:
            file.write(json.dumps(asdict(transcript), ensure_ascii=False) + "\n")
            count += 1
    return count


def read(path: Path) -> list[Transcript]:
    """Read transcripts; ValueError with FILE:LINE when a line is no transcript."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Transcript(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a transcript ({error})") from None
    return found


def _transcript(
    checkpoint: str,
    question: Question,
    completion: Completion,
    sample: int,
    temperature: float,
    tokenizer: Any,
) -> Transcript:
    text, num_tokens = _prompt_text(question.prompt, tokenizer)
    problem = question.problem
    return Transcript(
        checkpoint=checkpoint,
        suite=question.suite,
        id=problem.id,
        prompt=text,
        response=completion.text,
        answer=question.expected if question.expected is not None else problem.answer,
        correct=grade(question, completion.text),
        refused=is_refusal(completion.text),
        temperature=temperature,
        sample=sample,
        finish_reason=completion.finish_reason,
        prompt_tokens=num_tokens,
        response_tokens=len(completion.token_ids),
        metadata=problem.metadata,
    )


def _prompt_text(prompt: Prompt, tokenizer: Any) -> tuple[str, int]:
    if isinstance(prompt, str):
        return prompt, len(tokenizer.encode(prompt))
    if prompt and isinstance(prompt[0], int):
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        return tokenizer.decode(ids), len(ids)
    messages: Any = prompt
    number = len(tokenizer.encode_chat(messages, add_generation_prompt=True))
    return "\n\n".join(message["content"] for message in messages), number
