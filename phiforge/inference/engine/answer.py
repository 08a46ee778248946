"""One answer in the making: what was asked, and what came of it so far.

`requests.py` makes answers, the scheduler fills `tokens`, `logprobs` and in the end `finish_reason`
or `error`, `to_completion` turns one into what the caller gets. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from phiforge.inference.interface import (
    Completion,
    FinishReason,
    PromptTokenizer,
    Sampling,
    TokenMask,
    TopLogprobs,
)

Order = tuple[int, int, int]  # (0 streams, 1 calls; number of the request; place within it)


@dataclass(eq=False, slots=True)
class Answer:
    """A prompt, the settings, and the tokens so far.

    `tokens` begin with the forced ones. `closed`: no token will be drawn, only log-probabilities of
    those given are wanted; it is the reason that the answer ended. `streamed`: each token is
    appended as it is drawn (else when the answer ends or is put off), and the whole row stays in
    the prefix cache. `on_done` is called once, with the answer.
    """

    prompt_ids: np.ndarray  # int32
    sampling: Sampling
    key: np.ndarray  # of its random stream
    limit: int  # most tokens, forced ones included
    name: str  # in errors
    order: Order
    tokens: list[int]
    on_done: Callable[[Answer], object] | None = None
    mask: TokenMask | None = None
    streamed: bool = False
    closed: FinishReason | None = None
    score_temperature: float = 1.0  # of the log-probabilities of given tokens
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    def __lt__(self, other: Answer) -> bool:
        return self.order < other.order

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def owes_logprobs(self) -> bool:
        """Whether log-probabilities of given tokens are wanted and not there yet."""
        return self.sampling.logprobs and len(self.logprobs) < len(self.tokens)

    def row_ids(self) -> np.ndarray:
        """The tokens that must be computed before the answer can go on."""
        tokens = self.tokens[:-1] if self.closed else self.tokens
        return np.concatenate((self.prompt_ids, np.array(tokens, np.int32)))

    def finish(self, reason: FinishReason) -> None:
        """Ends the answer."""
        self.finish_reason = reason
        if self.on_done is not None:
            self.on_done(self)

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error."""
        self.error = error
        if self.on_done is not None:
            self.on_done(self)


def to_completion(tokenizer: PromptTokenizer, answer: Answer) -> Completion:
    """The answer so far ("cancelled" if it is not done): its text without the stop token or string
    that ended it."""
    ids = tuple(answer.tokens)
    stopped = answer.finish_reason == "stop"
    text = tokenizer.decode(ids[:-1] if stopped and ids[-1] in tokenizer.stop_ids else ids)
    if stopped and answer.sampling.stop:
        found = [place for stop in answer.sampling.stop if (place := text.find(stop)) >= 0]
        text = text[: min(found)] if found else text
    logprobs = tuple(answer.logprobs) if answer.sampling.logprobs else None
    top_logprobs = tuple(answer.top_logprobs) if answer.sampling.top_logprobs else None
    reason = answer.finish_reason or "cancelled"
    return Completion(text, ids, logprobs, reason, top_logprobs)


def text_bytes(tokenizer: PromptTokenizer, token: int) -> bytes:
    """What a token adds to an answer's text: nothing if it is special, as decoding leaves it out.

    Stop strings are looked for in these bytes, never in a special token's name.
    """
    special = token in getattr(tokenizer, "special_ids", ())
    return b"" if special else tokenizer.token_bytes(token)


def close_forced(
    tokenizer: PromptTokenizer, tokens: list[int], sampling: Sampling, limit: int
) -> tuple[list[int], FinishReason | None]:
    """Forced tokens up to where they end an answer by themselves, and why they do (None: not)."""
    stops = tuple(text.encode() for text in sampling.stop)
    data = b""
    for place, token in enumerate(tokens):
        data += text_bytes(tokenizer, token)
        if token in tokenizer.stop_ids or any(stop in data for stop in stops):
            return tokens[: place + 1], "stop"
    return tokens, "length" if len(tokens) == limit else None
