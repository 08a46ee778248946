"""How problems are put to a model: worksheets for base models, chat messages for chat models.

Call `chat_questions(problems)` or `few_shot_questions(problems, shots, ...)`; they give Questions.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from phiforge.core.records import Problem, read_records
from phiforge.evals.ask import Question
from phiforge.synth.worksheets import few_shot_prompt

Shot = tuple[str, str]
SUITES = {"answerable": "problems", "bogus": "bogus"}


def choose_problems(path: Path, per_family: int, bogus_per_family: int) -> list[Problem]:
    """The first problems of each family and variant, in file order.

    Raises ValueError when there is none.
    """
    wanted = {"answerable": per_family, "bogus": bogus_per_family}
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for problem in read_records(path, Problem):
        variant = problem.metadata.get("variant", "answerable")
        key = (problem.metadata.get("family", ""), variant)
        if taken.get(key, 0) < wanted.get(variant, 0):
            taken[key] = taken.get(key, 0) + 1
            chosen.append(problem)
    if not chosen:
        raise ValueError(
            f"{path}: no problem to ask; check evaluate.problems_per_family ({per_family}) and "
            f"the file's metadata.variant ({', '.join(wanted)})"
        )
    return chosen


def read_shots(path: Path, count: int) -> dict[str, list[Shot]]:
    """The first `count` worked training problems of each family, as (question, solution)."""
    shots: dict[str, list[Shot]] = {}
    if count == 0:
        return shots
    for problem in read_records(path, Problem):
        found = shots.setdefault(problem.metadata.get("family", ""), [])
        if len(found) < count and "worked" in problem.metadata:
            found.append((_text(problem), problem.metadata["worked"]))
    return shots


def chat_questions(problems: Sequence[Problem]) -> list[Question]:
    """Each problem as one user message (or as its own messages)."""
    return [
        Question(suite=_suite(problem), problem=problem, prompt=_messages(problem))
        for problem in problems
    ]


def few_shot_questions(
    problems: Sequence[Problem],
    shots: Mapping[str, Sequence[Shot]],
    tokenizer: Any,
    room: int,
) -> tuple[list[Question], int]:
    """Each problem after worked problems of its family, as plain text; and how many came before.

    All families share one number of shots: the largest for which every prompt has at most `room`
    tokens. Raises ValueError when a problem does not even fit alone.
    """
    longest = max((len(found) for found in shots.values()), default=0)
    for count in range(longest, -1, -1):
        prompts = [_few_shot(problem, shots, count) for problem in problems]
        if max(map(len, tokenizer.encode_batch(prompts))) <= room:
            questions = [
                Question(suite=_suite(problem), problem=problem, prompt=prompt)
                for problem, prompt in zip(problems, prompts, strict=True)
            ]
            return questions, count
    raise ValueError(
        f"a problem has more than the {room} tokens that the model's context leaves beside "
        "evaluate.max_tokens; lower max_tokens, or make this checkpoint a 'probe'"
    )


def _few_shot(problem: Problem, shots: Mapping[str, Sequence[Shot]], count: int) -> str:
    found = shots.get(problem.metadata.get("family", ""), ())
    return few_shot_prompt(list(islice(found, count)), _text(problem))


def _suite(problem: Problem) -> str:
    return SUITES[problem.metadata.get("variant", "answerable")]


def _messages(problem: Problem) -> list[dict[str, str]]:
    prompt: Any = problem.prompt
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if all(isinstance(message, Mapping) for message in prompt):
        return list(prompt)
    raise ValueError(f"problem {problem.id}: token ids cannot be put into a chat; give text")


def _text(problem: Problem) -> str:
    """The question alone, of a problem given as text or as messages."""
    return problem.prompt if isinstance(problem.prompt, str) else _messages(problem)[-1]["content"]
