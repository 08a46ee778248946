"""The SFT builder: chats from problems, unanswerable problems, recall tasks, questions of identity.

Each function returns one Chat, a function of its arguments; `phiforge.synth.synthesize` writes them
to chats.jsonl.
"""

from __future__ import annotations

import random
from typing import Any

from phiforge.core.records import Chat
from phiforge.synth.procedural import Item
from phiforge.synth.procedural.recall import Length, fit_recall
from phiforge.synth.worksheets import solution

WHO = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Tell me who you are.",
    "Introduce yourself.",
    "Are you a person?",
    "Hello, who is this?",
    "Who am I talking to?",
)
I_AM = (
    "I am {name}, a small language model.",
    "My name is {name}. I am a small language model.",
    "I am {name}, a language model trained by an open recipe.",
)
WHAT_FOR = (
    "What can you do?",
    "How can you help me?",
    "What are you good at?",
    "What should I ask you?",
)
I_CAN = (
    "I solve short problems step by step.",
    "I solve small problems of mathematics, finance, engineering and logic.",
    "Ask me a short problem, and I work it out step by step.",
)


def _chat(id: str, question: str, answer: str, metadata: dict[str, Any]) -> Chat:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(id=id, messages=messages, metadata={"split": "train", **metadata})


def problem_chat(id: str, item: Item, style: str, lineage: dict[str, Any]) -> Chat:
    """A problem answered in one of the styles "worked", "skipping", "terse"."""
    metadata = {"source": "problems", "variant": "answerable", "style": style, **lineage}
    return _chat(id, item.question, solution(item, style), metadata)


def bogus_chat(id: str, item: Item, lineage: dict[str, Any]) -> Chat:
    """An unanswerable problem and the refusal that says what is missing (arXiv 2412.08905, A.1).

    Raises ValueError when the item has no unanswerable variant.
    """
    if item.bogus_question is None or item.refusal is None:
        raise ValueError(f"problem {item.key} has no unanswerable variant")
    metadata = {"source": "problems", "variant": "bogus", "style": "refusal", **lineage}
    return _chat(id, item.bogus_question, item.refusal, metadata)


def recall_chat(id: str, rng: random.Random, length: Length, max_tokens: int) -> Chat:
    """A list of keys and values with a question, answered by "Answer: value"."""
    task = fit_recall(rng, length, max_tokens)
    metadata = {"source": "recall", "style": "recall", "tokens": max_tokens}
    return _chat(id, task.prompt, f"Answer: {task.answer}", metadata)


def identity_chat(id: str, rng: random.Random, name: str) -> Chat:
    """A question about the model and its answer, with the model's name."""
    asked, told = rng.choice(((WHO, I_AM), (WHO, I_AM), (WHAT_FOR, I_CAN)))
    answer = rng.choice(told).format(name=name)
    return _chat(id, rng.choice(asked), answer, {"source": "identity", "style": "identity"})
