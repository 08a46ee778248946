"""One answer, token by token: `for token in engine.submit(request): print(token.text, end="")`.

`stream.cancel()` ends it; `stream.completion` is the whole answer afterwards. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from phiforge.inference.engine.batch import Batch, Finished
from phiforge.inference.interface import Completion, PromptTokenizer, Sampling


@dataclass(frozen=True)
class Token:
    """One token of a stream. `text` is what it completes: empty inside a character or before what
    may become a stop string; the texts of a finished stream joined are its completion's text."""

    token_id: int
    text: str
    logprob: float | None


class Stream:
    """An iterator over the tokens of one answer; each `next` computes one."""

    def __init__(
        self,
        begin: Callable[[], Batch],
        tokenizer: PromptTokenizer,
        sampling: Sampling,
    ) -> None:
        self._begin, self._tokenizer, self._sampling = begin, tokenizer, sampling
        self._batch: Batch | None = None
        self._cancelled = False
        self._shown = ""
        self._completion: Completion | None = None

    def __iter__(self) -> Iterator[Token]:
        return self

    @torch.inference_mode()
    def __next__(self) -> Token:
        if self._completion is not None:
            raise StopIteration
        if self._cancelled:
            self._close()
            raise StopIteration
        if self._batch is None:
            self._batch = self._begin()
        ended = self._batch.step()
        drawn = ended[0] if ended else self._batch.partial(0)
        if ended:
            self._completion = to_completion(self._tokenizer, drawn, self._sampling)
            text = self._completion.text
        else:
            text = self._settled(drawn)
        new, self._shown = text[len(self._shown) :], text
        logprob = None if drawn.logprobs is None else drawn.logprobs[-1]
        return Token(drawn.token_ids[-1], new, logprob)

    def cancel(self) -> None:
        """Ends the stream before its next token; what was drawn stays in `completion`."""
        self._cancelled = True
        if self._completion is None:
            self._close()

    @property
    def completion(self) -> Completion:
        """The answer so far; its finish_reason is "cancelled" unless it came to its own end."""
        if self._completion is not None:
            return self._completion
        return to_completion(self._tokenizer, self._partial(), self._sampling)

    def _partial(self) -> Finished:
        if self._batch is None:
            return Finished(0, (), () if self._sampling.logprobs else None, "cancelled")
        return self._batch.partial(0)

    def _close(self) -> None:
        self._completion = self.completion
        self._batch = None  # gives the cache's memory back

    def _settled(self, drawn: Finished) -> str:
        """Text that later tokens cannot change: no half character, no start of a stop string."""
        text = self._tokenizer.decode(drawn.token_ids).rstrip("\ufffd")
        held = max((_overlap(text, stop) for stop in self._sampling.stop), default=0)
        text = text[: len(text) - held]
        return text if text.startswith(self._shown) else self._shown


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def to_completion(tokenizer: PromptTokenizer, finished: Finished, sampling: Sampling) -> Completion:
    """Raw tokens as a completion: its text without the stop token or string that ended it."""
    ids = finished.token_ids
    stopped = finished.finish_reason == "stop"
    text = tokenizer.decode(ids[:-1] if stopped and ids[-1] in tokenizer.stop_ids else ids)
    if stopped and sampling.stop:
        found = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
    return Completion(text, ids, finished.logprobs, finished.finish_reason)
