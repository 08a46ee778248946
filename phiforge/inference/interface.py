"""What generates text, seen from outside: prompts in, completions out, and the settings between.

Everything that samples takes a `Generator`: our engine, an endpoint, `transformers`. Call
`prompt_token_ids(tokenizer, prompt)` for the ids a generator would see. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]
Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids, chat messages
Progress = Callable[[int], object]
PerPrompt = int | Sequence[int]  # one for all prompts, or one each
# Asked before every draw with the tokens drawn so far (forced ones included): which tokens may
# come next, as a bool array [vocabulary], or None for all of them.
TokenMask = Callable[[Sequence[int]], Any]
TopLogprobs = tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt.

    `token_ids` hold every token drawn: when a stop token ended the answer it is the last of them,
    and `text` leaves it out; when a stop string did, `text` ends before it. `logprobs` are the
    model's own at temperature 1, before any filter, one per token, or None when not asked for.
    `top_logprobs` are those of the likeliest tokens in each one's place, if asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    top_logprobs: tuple[TopLogprobs, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn and when to end; checked on construction (ValueError).

    In this order: logits / `temperature` (0 = greedy), the `top_k` likeliest tokens (0 = all), the
    smallest set that holds `top_p` of the probability (arXiv 1904.09751), tokens at least `min_p`
    times as likely as the likeliest (arXiv 2407.01082). `stop` are strings; the tokenizer's stop
    tokens always end an answer, and so do `max_tokens` and the end of the model's context.
    `logprobs` asks for each token's log-probability, `top_logprobs` for so many alternatives' too.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _check_whole("max_tokens", self.max_tokens, 1)
        _check_whole("top_k", self.top_k, 0, "0 keeps every token")
        _check_whole("top_logprobs", self.top_logprobs, 0)
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, which needs logprobs=True")
        _check("temperature", self.temperature, 0.0 <= self.temperature < 1e4, "0 (greedy) to 1e4")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1 (1 = off)")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "0 (off) to 1")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of non-empty strings")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to stream: a prompt, the settings of `Sampling`, and which sample it is.

    Sample `index` under `seed` is the one `generate(..., seed=seed, first_index=index)` returns.
    `forced` are token ids the answer begins with: given, not drawn, and part of `max_tokens`.
    """

    prompt: Prompt
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int = 0
    index: int = 0
    forced: Sequence[int] = ()
    mask: TokenMask | None = None

    @property
    def sampling(self) -> Sampling:
        """The settings alone, checked."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=stop_strings(self.stop),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
        )


class PromptTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Any, add_generation_prompt: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...
    def token_bytes(self, index: int) -> bytes: ...


class Generator(Protocol):
    """Anything that answers prompts and scores answers."""

    @property
    def tokenizer(self) -> Any: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: PerPrompt = 1,
        max_tokens: PerPrompt = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        first_index: PerPrompt = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        progress: Progress | None = None,
        forbidden_first: Sequence[Collection[int]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt its samples `first_index` .. `first_index + n - 1`, in order.

        `n`, `max_tokens` and `first_index` are numbers, or one for each prompt. Sample i is a
        function of (seed, the prompt's token ids, i) alone, and of `forbidden_first`: for each
        prompt the token ids that the first token drawn must not be (the others' probabilities are
        renormalised; later tokens are free). `progress(k)` is called as k more completions are
        done.
        """
        ...

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Log-probability of each token of each completion after its prompt, at `temperature`."""
        ...


def stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; one bare string is taken as one, not as its letters."""
    return (stop,) if isinstance(stop, str) else tuple(stop)


def prompt_token_ids(tokenizer: PromptTokenizer, prompt: Prompt) -> tuple[int, ...]:
    """A prompt's token ids: text plainly encoded (special tokens' names are ordinary text there),
    chat messages rendered with the assistant's turn opened, token ids as they are.

    Raises ValueError when it is none of the three.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return tuple(tokenizer.encode_chat(items, add_generation_prompt=True))
    if not all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items):
        raise ValueError(
            f"prompt {_brief(items)} is neither text, token ids (whole numbers) nor chat messages "
            "({'role': ..., 'content': ...})"
        )
    return tuple(item.__index__() for item in items)


def check_token_ids(
    name: str, ids: Sequence[int], vocab_size: int, context: int, room: int = 1
) -> None:
    """Raises ValueError, naming `name`, for an empty or over-long prompt or an unknown token id.

    `room` tokens of the `context` (tokens) must be left for the answer.
    """
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token (a document's start will do)")
    if len(ids) > context - room:
        raise ValueError(
            f"{name} has {len(ids)} tokens; the model's context is {context} "
            f"(max_position_embeddings) and {room} must be left: shorten it to {context - room}"
        )
    check_known(name, ids, vocab_size)


def check_known(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError, naming `name`, for a token id outside 0 .. vocab_size - 1."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        place, unknown = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
        raise ValueError(
            f"{name}: token id {unknown} at place {place} is unknown; ids run from 0 to "
            f"{vocab_size - 1}: do the tokenizer and the model belong together?"
        )


def _brief(items: Sequence[Any]) -> str:
    return f"{list(items[:4])!r}" + (" …" if len(items) > 4 else "")


def _check(name: str, value: float, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def _check_whole(name: str, value: Any, least: int, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        remark = f" ({note})" if note else ""
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {least}{remark}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    _check_whole(name, value, least)


def one_each(name: str, value: PerPrompt, num_prompts: int, least: int) -> list[int]:
    """`value` for each prompt. Raises ValueError, naming it, for another number of them."""
    values = [value] * num_prompts if isinstance(value, int) else list(value)
    if len(values) != num_prompts:
        raise ValueError(f"{name}: {len(values)} values for {num_prompts} prompts; give one each")
    for item in values:
        _check_whole(name, item, least)
    return values


@dataclass(frozen=True)
class Span:
    """Which samples of a prompt, and how long each may get."""

    indices: range
    max_tokens: int

    def of(self, sampling: Sampling) -> Sampling:
        """`sampling` with this prompt's length."""
        same = sampling.max_tokens == self.max_tokens
        return sampling if same else replace(sampling, max_tokens=self.max_tokens)


def sample_spans(
    n: PerPrompt, first_index: PerPrompt, max_tokens: PerPrompt, num_prompts: int
) -> list[Span]:
    """The samples of each prompt; ValueError, naming the setting, for what cannot be."""
    counts = one_each("n", n, num_prompts, 1)
    firsts = one_each("first_index", first_index, num_prompts, 0)
    lengths = one_each("max_tokens", max_tokens, num_prompts, 1)
    return [
        Span(range(first, first + count), length)
        for count, first, length in zip(counts, firsts, lengths, strict=True)
    ]
