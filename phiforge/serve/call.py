"""One call, ready for the engine: prompts as token ids, settings, what the answer must hold.

`completion_call(body, tokenizer, context)` and `chat_call(...)` check everything that can be known
before the engine is asked (ApiError 400 with the numbers). Nothing is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from phiforge.inference.engine.constrain import Constraint
from phiforge.inference.interface import (
    Request,
    Sampling,
    check_known,
    check_token_ids,
    prompt_token_ids,
)
from phiforge.model.tokenizer import Tokenizer
from phiforge.serve.body import ChatBody, CompletionBody, Message, SamplingBody, TokenizeBody
from phiforge.serve.errors import ApiError

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat's answer may fill the context


@dataclass(frozen=True)
class PromptPart:
    """A prompt as the model sees it, and its text for `echo`."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Call:
    """What to generate and what to tell.

    `num_top`: the likeliest tokens told at each place, 0 for the token's own log-probability
    alone, None for no log-probabilities. `sampling` None: nothing is generated, prompts are scored.
    """

    is_chat: bool
    prompts: tuple[PromptPart, ...]
    n: int
    sampling: Sampling | None
    seed: int
    echo: bool
    num_top: int | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    forbidden: tuple[int, ...] = ()  # tokens that may nowhere be drawn

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def scored(self) -> tuple[PromptPart, ...]:
        """Prompts whose own tokens' log-probabilities are told."""
        return self.prompts if self.echo and self.num_top is not None else ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """The samples, all of the first prompt first; choice i of a prompt is its sample i."""
        if self.sampling is None:
            return ()
        mask = None
        if self.forbidden:
            mask = Constraint(frozenset(self.forbidden), allowed=False, first_only=False)
        return tuple(
            Request(
                prompt=prompt.token_ids,
                max_tokens=self.sampling.max_tokens,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k,
                min_p=self.sampling.min_p,
                stop=self.sampling.stop,
                logprobs=self.sampling.logprobs,
                top_logprobs=self.sampling.top_logprobs,
                seed=self.seed,
                index=index,
                mask=mask,
            )
            for prompt in self.prompts
            for index in range(self.n)
        )


def completion_call(body: CompletionBody, tokenizer: Tokenizer, context: int) -> Call:
    """A checked POST /v1/completions."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(
            400,
            "max_tokens is 0, which asks for nothing without echo; give at least 1, or echo: true "
            "(with logprobs, to score the prompt)",
            param="max_tokens",
            code="invalid_value",
        )
    prompts = []
    for number, prompt in enumerate(body.prompt):
        name = "prompt" if len(body.prompt) == 1 else f"prompt[{number}]"
        ids = _ids(tokenizer, prompt, "prompt")
        _check(name, "prompt", ids, tokenizer, context, room=min(1, max_tokens))
        # Unlike an answer's, an echo's special tokens are told: the asker sent them.
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special=False)
        prompts.append(PromptPart(ids, text))
    forbidden = _forbidden(body.logit_bias or (), tokenizer)
    call = _call(body, prompts, max_tokens, context, echo=bool(body.echo), num_top=body.logprobs)
    return replace(call, forbidden=forbidden)


def chat_call(body: ChatBody, tokenizer: Tokenizer, context: int) -> Call:
    """A checked POST /v1/chat/completions."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens are two names of one limit; give one of them",
            param="max_tokens",
            code="invalid_value",
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit == 0:
        raise ApiError(
            400, "max_tokens is 0; give at least 1", param="max_tokens", code="invalid_value"
        )
    ids = _ids(tokenizer, _messages(body.messages), "messages")
    _check("messages", "messages", ids, tokenizer, context, room=1)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    return _call(body, [PromptPart(ids, "")], limit or context, context, False, num_top)


def tokenize_ids(body: TokenizeBody, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids that POST /tokenize answers with."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(
            400, "give prompt or messages, one of the two", param="prompt", code="invalid_value"
        )
    if body.prompt is not None:
        return _ids(tokenizer, body.prompt, "prompt")
    if body.add_generation_prompt:
        return _ids(tokenizer, _messages(body.messages or ()), "messages")
    return tuple(tokenizer.encode_chat(_messages(body.messages or ())))


def _call(
    body: SamplingBody,
    prompts: list[PromptPart],
    max_tokens: int,
    context: int,
    echo: bool,
    num_top: int | None,
) -> Call:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options needs stream: true", param="stream_options", code="invalid_value"
        )
    sampling = None
    if max_tokens:
        sampling = Sampling(
            max_tokens=min(max_tokens, context),
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=body.top_k or 0,
            min_p=_given(body.min_p, 0.0),
            stop=tuple(body.stop or ()),
            logprobs=num_top is not None,
            top_logprobs=num_top or 0,
        )
    return Call(
        is_chat=isinstance(body, ChatBody),
        prompts=tuple(prompts),
        n=body.n or 1,
        sampling=sampling,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        echo=echo,
        num_top=num_top,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=bool(body.return_token_ids),
    )


def _forbidden(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that `logit_bias` forbids; ApiError for an unknown one, or when none is left."""
    try:
        check_known("logit_bias", ids, tokenizer.vocab_size)
        if len(set(ids)) == tokenizer.vocab_size:
            raise ValueError("logit_bias forbids every token; allow at least one")
    except ValueError as error:
        raise ApiError(400, str(error), param="logit_bias", code="invalid_value") from None
    return ids


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    names = {"developer": "system"}
    return [{"role": names.get(m.role, m.role), "content": m.content} for m in messages]


def _ids(
    tokenizer: Tokenizer, prompt: str | list[int] | list[dict[str, str]], param: str
) -> tuple[int, ...]:
    try:
        return prompt_token_ids(tokenizer, prompt)
    except ValueError as error:  # no chat template, or one that refuses these messages
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from None


def _check(
    name: str, param: str, ids: tuple[int, ...], tokenizer: Tokenizer, context: int, room: int
) -> None:
    try:
        check_token_ids(name, ids, tokenizer.vocab_size, context, room)
    except ValueError as error:
        code = "context_length_exceeded" if len(ids) > context - room else "invalid_value"
        raise ApiError(400, str(error), param=param, code=code) from None
