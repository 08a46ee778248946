"""One answer, token by token: `for token in engine.submit(request): print(token.text, end="")`.

Whoever iterates drives the engine for all requests; `take()` only collects what is there.
`cancel()` ends it, `completion` is the answer so far. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from phiforge.inference.engine.answer import Answer, to_completion
from phiforge.inference.engine.turns import Turns
from phiforge.inference.interface import Completion, PromptTokenizer, TopLogprobs


@dataclass(frozen=True)
class Token:
    """One token of a stream. `text` is what it completes: empty inside a character or before what
    may become a stop string; the texts of a finished stream joined are its completion's text."""

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: TopLogprobs = ()


class Driver(Protocol):
    """What a stream needs of the engine."""

    @property
    def lock(self) -> Turns: ...
    def step(self) -> bool: ...
    def cancel(self, answers: Iterable[Answer]) -> None: ...


class Stream:
    """An iterator over the tokens of one answer. Threads may iterate different streams at once."""

    def __init__(self, driver: Driver, tokenizer: PromptTokenizer, answer: Answer) -> None:
        self._driver, self._tokenizer, self._answer = driver, tokenizer, answer
        self._given = 0  # tokens handed out
        self._text = _Text(tokenizer, answer.sampling.stop)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        """The next token; drives the engine until it is there. Raises `error` at the end."""
        while True:
            with self._driver.lock:
                if self._given < self._num_ready:
                    return self._give()
                if self._answer.error is not None:
                    raise self._answer.error
                if self._answer.done:
                    raise StopIteration
                active = self._driver.step()
                assert active or self.done, "nothing is under way, but the stream is not done"

    def take(self) -> list[Token]:
        """The tokens that are there and were not handed out yet, without driving the engine."""
        with self._driver.lock:
            return [self._give() for _ in range(self._num_ready - self._given)]

    def cancel(self) -> None:
        """Ends the stream; what was drawn stays in `completion`, and its memory is free."""
        with self._driver.lock:
            self._driver.cancel([self._answer])
            self._given = len(self._answer.tokens)

    @property
    def done(self) -> bool:
        """Whether no more tokens will be drawn; some may not have been handed out yet."""
        return self._answer.done

    @property
    def error(self) -> Exception | None:
        """What went wrong with this request, if anything."""
        return self._answer.error

    @property
    def completion(self) -> Completion:
        """The answer so far; its finish_reason is "cancelled" unless it came to its own end."""
        with self._driver.lock:
            return to_completion(self._tokenizer, self._answer)

    @property
    def _num_ready(self) -> int:
        answer = self._answer
        return len(answer.logprobs if answer.sampling.logprobs else answer.tokens)

    def _give(self) -> Token:
        answer, place = self._answer, self._given
        self._given += 1
        is_last = answer.finish_reason is not None and self._given == len(answer.tokens)
        if is_last:
            text = self._text.end(to_completion(self._tokenizer, answer).text)
        else:
            text = self._text.add(answer.tokens[place])
        logprob = answer.logprobs[place] if answer.sampling.logprobs else None
        top_logprobs = answer.top_logprobs[place] if answer.sampling.top_logprobs else ()
        return Token(answer.tokens[place], text, logprob, top_logprobs)


class _Text:
    """Text that later tokens cannot change: no half character, no start of a stop string.

    Tokens are decoded from the last place where the text was whole, with one stretch before it,
    since a tokenizer may treat the start of a text in its own way.
    """

    def __init__(self, tokenizer: PromptTokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._before: list[int] = []  # tokens whose text is known
        self._open: list[int] = []  # tokens after them, which end inside a character
        self._held = ""  # whole characters that may begin a stop string
        self._num_shown = 0

    def add(self, token: int) -> str:
        """One more token; what can be shown with it."""
        self._open.append(token)
        before = self._tokenizer.decode(self._before)
        both = self._tokenizer.decode([*self._before, *self._open])
        if not both.endswith("\ufffd"):
            self._held += both[len(before) :]
            self._before, self._open = self._open, []
        num_kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - num_kept]
        self._held = self._held[len(shown) :]
        self._num_shown += len(shown)
        return shown

    def end(self, text: str) -> str:
        """The rest of the whole answer's text."""
        return text[self._num_shown :]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
