"""Samples whose first token must not be one of some: a first token under a ban, then the rest.

`generate(answer, forget, calls, forbidden_first, ...)` sends both halves and puts them together.
`logit_bias` would forbid a token everywhere in an answer, so the first one is asked for alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phiforge.inference.endpoint.calls import Answer, Call, Outcome, all_answered
from phiforge.inference.endpoint.wire import Server
from phiforge.inference.interface import Progress, prompt_token_ids

_IDS_NEEDED = (
    "forbidden_first goes on from the first token's id, so the server must return token ids: set "
    "returns_token_ids=True where the server knows `return_token_ids` (phiforge serve, vLLM, "
    "SGLang), or use our engine"
)


@dataclass(frozen=True)
class Slot:
    """Sample `index` of the prompt at `position`, the first token of which has been drawn."""

    position: int
    index: int
    first: Answer

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first token, as a list of one."""
        assert self.first.token_ids is not None
        return self.first.token_ids


def generate(
    answer: Callable[[Sequence[Call], Progress | None], list[list[Outcome]]],
    forget: Callable[[Sequence[Call]], None],
    calls: Sequence[Call],
    forbidden_first: Sequence[Collection[int]],
    tokenizer: Any,
    server: Server,
    where: str,
    progress: Progress | None,
) -> list[list[Answer]]:
    """Per call its answers, the first token of each none of the call's `forbidden_first`.

    `answer` sends calls, `forget` drops their kept answers, `where` names the server in errors.
    Raises ValueError for what cannot be had through a server (no token ids, stop strings) and for
    one that ignores `logit_bias`, whose answers are forgotten; AnswersFailed, BudgetExceeded and
    TooManyFailures as `answer` does, with the results of the half that it was asked for.
    """
    firsts = first_calls(calls, forbidden_first, tokenizer, server)
    begun = all_answered(answer(firsts, None))
    try:
        slots = first_tokens(firsts, begun)
    except ValueError as error:
        forget(firsts)  # else a better server would never be asked
        raise ValueError(f"{where}: {error}") from None
    longer = [slot for slot in slots if goes_on(slot, calls[slot.position])]
    if progress is not None and (done := sum(map(len, begun)) - len(longer)):
        progress(done)
    rests = all_answered(answer(later_calls(longer, firsts, calls), progress)) if longer else []
    for slot, (rest,) in zip(longer, rests, strict=True):
        call = calls[slot.position]
        begun[slot.position][slot.index - call.first_index] = joined(slot.first, rest, tokenizer)
    return begun


def first_calls(
    calls: Sequence[Call],
    forbidden_first: Sequence[Collection[int]],
    tokenizer: Any,
    server: Server,
) -> list[Call]:
    """The calls for one token each, prompts as token ids; where nothing is forbidden, the call."""
    if len(forbidden_first) != len(calls):
        raise ValueError(
            f"forbidden_first has {len(forbidden_first)} entries for {len(calls)} prompts; give "
            "one each"
        )
    shows_ids = "return_tokens_as_token_ids", "return_token_ids"
    if not server.returns_token_ids and not any(map(server.extra_body.get, shows_ids)):
        raise ValueError(_IDS_NEEDED)
    return [
        _first_call(position, call, tuple(sorted({int(token) for token in forbidden})), tokenizer)
        if forbidden
        else call
        for position, (call, forbidden) in enumerate(zip(calls, forbidden_first, strict=True))
    ]


def _first_call(position: int, call: Call, forbidden: tuple[int, ...], tokenizer: Any) -> Call:
    if call.sampling.stop:
        raise ValueError(
            f"stop is {list(call.sampling.stop)}, which forbidden_first does not take: a stop "
            "string could begin in the first token, where the server would not see it; leave out "
            "stop, or use our engine"
        )
    if forbidden[0] < 0:
        raise ValueError(f"forbidden_first[{position}]: token id {forbidden[0]} is below 0")
    is_ids = not isinstance(call.prompt, str) and all(hasattr(i, "__index__") for i in call.prompt)
    if tokenizer is None and not is_ids:
        raise ValueError(
            f"prompts[{position}]: forbidden_first works on token ids; give Endpoint a tokenizer, "
            "or prompts of token ids"
        )
    cut = call.allow if call.sampling.max_tokens == 1 else ("length",)
    return replace(
        call,
        prompt=prompt_token_ids(tokenizer, call.prompt),  # type: ignore[arg-type]
        sampling=replace(call.sampling, max_tokens=1),
        via="completions",
        allow=cut,
        forbidden=forbidden,
    )


def first_tokens(calls: Sequence[Call], answers: Sequence[Sequence[Answer]]) -> list[Slot]:
    """The samples begun, in order. Raises ValueError when an answer is not one allowed token."""
    slots = []
    for position, (call, row) in enumerate(zip(calls, answers, strict=True)):
        for offset, answer in enumerate(row if call.forbidden else ()):
            ids = answer.token_ids
            if ids is None:
                raise ValueError(f"the server returned no token ids. {_IDS_NEEDED}")
            if len(ids) != 1:
                raise ValueError(f"the server drew {len(ids)} tokens where max_tokens is 1")
            if ids[0] in call.forbidden:
                raise ValueError(
                    f"prompt {position}: the server drew token {ids[0]}, which logit_bias -100 "
                    "forbids: it ignores the field `logit_bias`; use a server that keeps to it "
                    "(phiforge serve, vLLM, SGLang), or our engine"
                )
            slots.append(Slot(position, call.first_index + offset, answer))
    return slots


def later_calls(slots: Sequence[Slot], firsts: Sequence[Call], calls: Sequence[Call]) -> list[Call]:
    """For each sample that goes on, the call for the rest of it."""
    return [
        replace(
            firsts[slot.position],
            prompt=(*firsts[slot.position].prompt, *slot.token_ids),
            sampling=replace(
                calls[slot.position].sampling,
                max_tokens=calls[slot.position].sampling.max_tokens - 1,
            ),
            n=1,
            first_index=slot.index,
            seed=later_seed(calls[slot.position].seed),
            allow=calls[slot.position].allow,
            forbidden=(),
        )
        for slot in slots
    ]


def goes_on(slot: Slot, call: Call) -> bool:
    """Whether a sample has more than its first token."""
    return slot.first.finish_reason == "length" and call.sampling.max_tokens > 1


def later_seed(seed: int) -> int:
    """The seed of what follows a first token: another than `seed`, or the rest would be the very
    sample that this index has of prompt and token together, and no independent one."""
    digest = hashlib.blake2b(f"{seed}:after the first token".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def joined(first: Answer, rest: Answer, tokenizer: Any) -> Answer:
    """One answer of two, in text, token ids, log-probabilities and counts."""
    if first.token_ids is None or rest.token_ids is None:
        raise ValueError(f"the server returned no token ids. {_IDS_NEEDED}")
    ids, logprobs = (*first.token_ids, *rest.token_ids), None
    if first.logprobs is not None and rest.logprobs is not None:
        logprobs = (*first.logprobs, *rest.logprobs)
    text = first.text + rest.text
    if tokenizer is not None:  # a character may begin in the one and end in the other
        text = tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_ids else ids)
    return replace(
        rest,
        text=text,
        token_ids=ids,
        logprobs=logprobs,
        completion_tokens=first.completion_tokens + rest.completion_tokens,
        cached=first.cached and rest.cached,
    )
