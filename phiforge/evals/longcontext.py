"""Key-value recall and copying at multiples of the pretraining context.

Call `context_questions(tokenizer, context=512, lengths=(1, 2, 4), num=50, seed=0)`; a model's share
of right answers per length is its recall. Tasks: phiforge.synth.procedural.recall.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from phiforge.core.records import Problem
from phiforge.evals.ask import Question
from phiforge.synth.procedural.recall import Task, fit_copy, fit_needle, fit_recall

TASKS = ("needle", "recall", "copy")
FIT = {"needle": fit_needle, "recall": fit_recall}  # tasks with an asked pair at some depth
STOP = ("\n",)
_ANSWER_TOKENS = 8  # room for the "Answer:" that chat models are taught to write first


def context_questions(
    tokenizer: Any,
    *,
    context: int,
    lengths: Sequence[float],
    num: int,
    seed: int,
    tasks: Sequence[str] = TASKS,
    chat: bool = False,
) -> list[Question]:
    """`num` questions per task and length, whose prompt and answer fill length x context tokens.

    The asked pair's depth runs evenly from first to last. A question is a function of (tokenizer,
    context, length, seed, index): every checkpoint gets the same. Chat models are asked in a
    message and for recall alone, which is what they are taught.
    """
    wanted = ["recall"] if chat else tasks
    return [
        question
        for task in wanted
        for length in lengths
        for question in _questions(tokenizer, task, context, float(length), num, seed, chat)
    ]


def longest_answer(tokenizer: Any, questions: Sequence[Question]) -> int:
    """Tokens that the longest expected answer needs, with the space before and the end after it."""
    answers = [f" {question.problem.answer}\n" for question in questions]
    return max((len(ids) for ids in tokenizer.encode_batch(answers)), default=0) + _ANSWER_TOKENS


def _questions(
    tokenizer: Any, task: str, context: int, length: float, num: int, seed: int, chat: bool
) -> Iterator[Question]:
    def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    room = int(context * length)
    if chat:
        empty = [{"role": "user", "content": ""}]
        room -= len(tokenizer.encode_chat(empty, add_generation_prompt=True)) + _ANSWER_TOKENS
    for index in range(num):
        depth = index / (num - 1) if num > 1 else 0.5
        rng = random.Random(f"{seed}/{task}/{length}/{index}")
        drawn = FIT[task](rng, tokens, room, depth) if task in FIT else fit_copy(rng, tokens, room)
        yield _question(task, drawn, length, depth, index, chat)


def _question(
    task: str, drawn: Task, length: float, depth: float, index: int, chat: bool
) -> Question:
    facts: dict[str, Any] = {"task": task, "length": length}
    if task in FIT:
        facts["depth"] = round(depth, 4)
    problem = Problem(
        id=f"{task}/{length:g}x/{index}",
        prompt=drawn.prompt,
        answer=drawn.answer,
        kind="text",
        metadata=facts,
    )
    if chat:
        message = [{"role": "user", "content": drawn.prompt}]
        return Question(suite=task, problem=problem, prompt=message)
    return Question(suite=task, problem=problem, prompt=drawn.prompt, expected=drawn.answer)
