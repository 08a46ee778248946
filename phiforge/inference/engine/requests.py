"""Checks what is asked for and makes answers of it: by one stream, or by a whole call.

`bounds.prompts(...)`, `bounds.answer(...)`; a `Call` collects the answers of generate or score,
each distinct one once, and puts what comes of them back in order. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phiforge.inference.engine.answer import Answer, Order, close_forced, to_completion
from phiforge.inference.engine.constrain import bind
from phiforge.inference.engine.sample import prompt_digest, stream_key
from phiforge.inference.interface import (
    Completion,
    Progress,
    Prompt,
    PromptTokenizer,
    Sampling,
    TokenMask,
    check_known,
    check_token_ids,
    prompt_token_ids,
)

TokenIds = tuple[int, ...]
_UNUSED_KEY = np.zeros(2, np.uint64)  # of answers that draw nothing


@dataclass(frozen=True)
class Bounds:
    """What a request must keep to."""

    tokenizer: PromptTokenizer
    vocab_size: int
    context: int  # tokens
    cache_tokens: int

    def prompts(self, prompts: Sequence[Prompt], room: int = 1) -> list[TokenIds]:
        """Token ids of prompts; ValueError unless each leaves `room` tokens of the context."""
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of prompts: [text]")
        ids = [prompt_token_ids(self.tokenizer, prompt) for prompt in prompts]
        for number, prompt in enumerate(ids):
            check_token_ids(f"prompt {number}", prompt, self.vocab_size, self.context, room)
        return ids

    def answer(
        self,
        prompt: TokenIds,
        sampling: Sampling,
        key: np.ndarray,
        name: str,
        order: Order,
        forced: Sequence[int] = (),
        mask: TokenMask | None = None,
    ) -> Answer:
        """An answer to a checked prompt; ValueError when it could never be had."""
        limit = min(sampling.max_tokens, self.context - len(prompt))
        tokens = [int(token) for token in forced]
        check_known(f"{name}: forced", tokens, self.vocab_size)
        if len(tokens) > limit:
            raise ValueError(
                f"{name}: {len(tokens)} tokens are forced, but the answer may have {limit} "
                "(max_tokens and the model's context): force fewer or raise max_tokens"
            )
        self.check_fits(name, len(prompt), limit)
        tokens, closed = close_forced(self.tokenizer, tokens, sampling, limit)
        return Answer(
            prompt_ids=np.array(prompt, np.int32),
            sampling=sampling,
            key=key,
            limit=limit,
            name=name,
            order=order,
            tokens=tokens,
            mask=bind(mask, self.vocab_size),
            closed=closed,
        )

    def given(
        self,
        prompt: TokenIds,
        completion: Sequence[int],
        sampling: Sampling,
        number: int,
        order: Order,
        temperature: float = 1.0,
    ) -> Answer:
        """A completion that is there already, to be scored; `number` names it in errors."""
        tokens = tuple(int(token) for token in completion)
        check_known(f"completion {number}", tokens, self.vocab_size)
        name = f"prompt {number} with its completion"
        check_token_ids(name, prompt + tokens, self.vocab_size, self.context, room=0)
        self.check_fits(f"completion {number}", len(prompt), len(tokens))
        return Answer(
            prompt_ids=np.array(prompt, np.int32),
            sampling=sampling,
            key=_UNUSED_KEY,
            limit=len(tokens),
            name=f"completion {number}",
            order=order,
            tokens=list(tokens),
            closed="length",
            score_temperature=temperature,
        )

    def check_fits(self, name: str, num_prompt: int, num_answer: int) -> None:
        """ValueError for what could never be cached."""
        needed = num_prompt + num_answer - 1  # the last token is drawn, and never computed
        if needed > self.cache_tokens:
            raise ValueError(
                f"{name} needs {needed} tokens of cache ({num_prompt} of the prompt, {num_answer} "
                f"of the answer), but the cache holds {self.cache_tokens}: raise max_cache_tokens "
                "or lower max_tokens"
            )


class Call:
    """The answers of one call, each distinct one once, in the order they should begin.

    Prompts that extend one another are next to each other, the longest first: it is computed, and
    the others find themselves in the cache.
    """

    def __init__(self, bounds: Bounds, number: int) -> None:
        self._bounds, self._number = bounds, number
        self._answers: dict[object, Answer] = {}
        self._rows: list[TokenIds] = []  # for each answer, the tokens it begins with
        self._asked: list[list[Answer]] = []  # for each prompt, its samples
        self._times: dict[int, int] = {}  # how many of the caller's samples an answer is
        self._done: list[Answer] = []
        self._num_done = 0

    @property
    def is_open(self) -> bool:
        """Whether answers are missing."""
        return self._num_done < len(self._answers)

    def ask(
        self,
        prompt: TokenIds,
        sampling: Sampling,
        seed: int,
        indices: range,
        forced: Sequence[int] = (),
        mask: TokenMask | None = None,
    ) -> None:
        """One more prompt and its samples; greedy ones are all the same."""
        number, digest = len(self._asked), prompt_digest(seed, prompt)
        row = prompt + tuple(forced)
        samples: list[Answer] = []
        for index in indices:
            greedy = sampling.temperature == 0.0
            key = (prompt, tuple(forced), id(mask), indices[0] if greedy else index)
            if key not in self._answers:
                self._answers[key] = self._bounds.answer(
                    prompt,
                    sampling,
                    stream_key(digest, index),
                    f"prompt {number}, sample {index}",
                    (1, self._number, 0),
                    forced,
                    mask,
                )
                self._rows.append(row)
            samples.append(self._count(self._answers[key]))
        self._asked.append(samples)

    def ask_score(
        self,
        prompt: TokenIds,
        completion: Sequence[int],
        sampling: Sampling,
        temperature: float = 1.0,
    ) -> None:
        """One more prompt whose completion is given."""
        number = len(self._asked)
        order = (1, self._number, 0)
        answer = self._bounds.given(prompt, completion, sampling, number, order, temperature)
        if not answer.tokens:
            self._asked.append([])
            return
        self._answers[number] = answer
        self._rows.append(prompt + tuple(answer.tokens))
        self._asked.append([self._count(answer)])

    def begin(self) -> list[Answer]:
        """The answers for the scheduler; those that need nothing computed are done at once."""
        for answer in self._answers.values():
            answer.on_done = self._done.append
        families: dict[TokenIds, list[Answer]] = {}
        for answer, row in zip(self._answers.values(), self._rows, strict=True):
            families.setdefault(row, []).append(answer)
        ordered = [answer for row in sorted(families, reverse=True) for answer in families[row]]
        for place, answer in enumerate(ordered):
            answer.order = (1, self._number, place)
            if answer.closed and not answer.owes_logprobs:
                answer.finish(answer.closed)
        return [answer for answer in ordered if not answer.done]

    def collect(self, progress: Progress | None = None) -> None:
        """Takes note of answers that are done; raises the error of one that failed."""
        done = [self._done.pop() for _ in range(len(self._done))]
        failed = [answer for answer in done if answer.error is not None]
        if failed:
            first = min(failed, key=self._first_asked)
            assert first.error is not None
            raise first.error
        self._num_done += len(done)
        if done and progress is not None:
            progress(sum(self._times[id(answer)] for answer in done))

    def completions(self) -> list[list[Completion]]:
        """For each prompt its samples."""
        tokenizer = self._bounds.tokenizer
        made = {id(a): to_completion(tokenizer, a) for a in self._answers.values()}
        return [[made[id(answer)] for answer in samples] for samples in self._asked]

    def logprobs(self) -> list[list[float]]:
        """For each prompt the log-probabilities of its completion."""
        return [samples[0].logprobs if samples else [] for samples in self._asked]

    def _count(self, answer: Answer) -> Answer:
        self._times[id(answer)] = self._times.get(id(answer), 0) + 1
        return answer

    def _first_asked(self, answer: Answer) -> tuple[int, int]:
        for number, samples in enumerate(self._asked):
            for place, sample in enumerate(samples):
                if sample is answer:
                    return number, place
        raise AssertionError("an answer belongs to a prompt")
