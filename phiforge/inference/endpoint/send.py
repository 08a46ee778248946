"""One request until it is answered or has failed: retries, reservations, what each status means.

`Sender(...)` is shared by an endpoint's jobs; `await sender.send(unit, stopped)` gives one Answer
or Failure per index of the unit. Answers are not judged here (`length` is an answer).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from phiforge.inference.endpoint.budget import NOTHING, Account, Spend
from phiforge.inference.endpoint.calls import Answer, Failure, FailureKind, Outcome
from phiforge.inference.endpoint.pace import Pace
from phiforge.inference.endpoint.replies import Choice, Garbage, Parsed, first_bytes, parse
from phiforge.inference.endpoint.transport import Reply, TimedOut, Transport, Unreachable
from phiforge.inference.endpoint.wire import (
    Prepared,
    Server,
    expected_tokens,
    text_tokens,
    worst_tokens,
)

GARBAGE_ATTEMPTS = 3
_HINTS = {
    401: "check the key (api_key_env)",
    403: "check the key (api_key_env) and its rights",
    404: "is the model's name right, and does base_url end as the server wants it (often /v1)?",
}


@dataclass
class Unit:
    """One request to make: samples `indices` of one call and their cache keys. `in_flight` while
    it is on the wire."""

    prepared: Prepared
    indices: list[int]
    keys: list[bytes]
    in_flight: bool = False


@dataclass(frozen=True)
class Trouble:
    """Why one attempt brought no answer. `wait_seconds` is what the server asked for."""

    kind: FailureKind
    message: str
    status: int | None = None
    transient: bool = True
    wait_seconds: float | None = None


@dataclass(frozen=True)
class Patience:
    """How long to try: attempts of one request, seconds to wait where the server throttles, and
    the bounds of the waits between attempts (uniform below a doubling bound)."""

    attempts: int = 6
    throttled_seconds: float = 300.0
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0

    def wait(self, generator: random.Random, attempt: int) -> float:
        """Seconds before attempt `attempt` + 1 (from 1), with full jitter."""
        bound = self.first_wait_seconds * 2 ** min(attempt - 1, 60)
        return generator.uniform(0.0, min(self.longest_wait_seconds, bound))


class Sender:
    """Sends units through one transport, at one pace, on one account."""

    def __init__(
        self,
        server: Server,
        tokenizer: object,
        transport: Transport,
        account: Account,
        pace: Pace,
        patience: Patience,
        generator: random.Random,
        takes_schema: bool | None,
    ):
        self.server, self.tokenizer, self.transport = server, tokenizer, transport
        self.account, self.pace, self.patience = account, pace, patience
        self.takes_schema = takes_schema
        self._generator = generator

    async def send(self, unit: Unit, stopped: Callable[[], bool]) -> list[Outcome]:
        """Try until there are answers, the trouble is permanent, patience ends or `stopped()`.

        Raises BudgetExceeded before an attempt that could pass a limit.
        """
        begun = time.monotonic()
        counts = {"all": 0, "counted": 0, "garbage": 0}
        while True:
            counts["all"] += 1
            found = await self._attempt(unit)
            if not isinstance(found, Trouble):
                return list(found)
            counts["garbage"] += found.kind == "garbage"
            counts["counted"] += found.kind != "rate"
            asked = found.wait_seconds
            wait = self.patience.wait(self._generator, counts["all"]) if asked is None else asked
            waited = time.monotonic() - begun + wait
            if stopped() or self._is_final(found, counts, waited):
                failure = self._failure(found, counts["all"])
                return [failure for _ in unit.indices]
            await asyncio.sleep(wait)

    def _is_final(self, trouble: Trouble, counts: dict[str, int], waited: float) -> bool:
        if not trouble.transient or counts["garbage"] >= GARBAGE_ATTEMPTS:
            return True
        if trouble.kind == "rate":
            return waited > self.patience.throttled_seconds
        return counts["counted"] >= self.patience.attempts

    def _failure(self, trouble: Trouble, attempts: int) -> Failure:
        message = trouble.message
        if trouble.kind == "rate" and trouble.wait_seconds is not None:
            message += f" (it asks to wait {trouble.wait_seconds:.0f} s)"
        return Failure(
            kind=trouble.kind,
            message=self.transport.redact(message),
            status=trouble.status,
            attempts=attempts,
        )

    async def _attempt(self, unit: Unit) -> list[Answer | Failure] | Trouble:
        schema = unit.prepared.call.schema is not None and self.takes_schema is not False
        found = await self._exchange(unit, schema)
        if not schema or self.takes_schema is True:
            return found
        if not isinstance(found, Trouble):
            self.takes_schema = True
            return found
        if found.kind != "refused" or found.status not in (400, 404, 415, 422):
            return found
        again = await self._exchange(unit, with_schema=False)
        if not isinstance(again, Trouble) and self.takes_schema is None:
            self.takes_schema = False
            warnings.warn(
                f"{self.transport.shown_url} takes no response_format json_schema "
                f"({self.transport.redact(found.message)}); the schema goes into the prompt"
            )
        if isinstance(again, Trouble) and again.kind == "refused":
            message = f"{found.message}; without response_format: {again.message}"
            return replace(again, message=message)
        return again

    async def _exchange(self, unit: Unit, with_schema: bool) -> list[Answer | Failure] | Trouble:
        """One request: place, reservation, POST, settlement."""
        prepared = unit.prepared
        body = prepared.payload(self.server, unit.indices, with_schema)
        permit = await self.pace.enter()
        try:
            worst = await self._reserve(unit)
            unit.in_flight = True
            try:
                reply = await self.transport.post(prepared.path, body)
                found = self._read(reply, unit)
            except BaseException as error:
                found = self._broken(error, unit, worst)
                if found is None:
                    raise
                return found
            finally:
                unit.in_flight = False
        finally:
            self.pace.leave()
        if isinstance(found, Parsed):
            self.pace.succeeded()
            return self._answers(found, unit, worst)
        self.account.settle(worst)  # no server charges for these
        if found.status in (429, 503):
            self.pace.throttled(permit, self._pause(found))
        return found

    def _pause(self, trouble: Trouble) -> float | None:
        wait = trouble.wait_seconds
        return wait if wait is not None and wait <= self.patience.throttled_seconds else None

    def _broken(self, error: BaseException, unit: Unit, worst: Spend | None) -> Trouble | None:
        """Errors of the exchange; what may have been charged is entered as lost."""
        if isinstance(error, Unreachable):
            self.account.settle(worst, lost=self._worst(unit) if error.sent else NOTHING)
            return Trouble("connection", f"{self.transport.shown_url}: {error}")
        self.account.settle(worst, lost=self._worst(unit))
        if isinstance(error, TimedOut):
            return Trouble("timeout", f"{self.transport.shown_url}: {error}")
        if isinstance(error, Garbage):
            return Trouble("garbage", f"the server sent {error}", status=200)
        return None

    async def _reserve(self, unit: Unit) -> Spend | None:
        """Hold what the request can cost at most; None without a budget."""
        if self.account.budget is None:
            return None
        worst = self._worst(unit)
        await self.account.reserve(worst)
        return worst

    def _worst(self, unit: Unit) -> Spend:
        call, samples = unit.prepared.call, len(unit.indices)
        most = 1 if call.echo else call.sampling.max_tokens
        prompt = worst_tokens(unit.prepared.content, self.tokenizer)
        return self.account.spend(prompt, most * samples)

    def _read(self, reply: Reply, unit: Unit) -> Parsed | Trouble:
        if 200 <= reply.status < 300:
            return parse(reply.body, unit.prepared.path)
        return sort_status(reply)

    def _answers(self, parsed: Parsed, unit: Unit, worst: Spend | None) -> list[Answer | Failure]:
        choices = parsed.choices[: len(unit.indices)]
        completion = [self._completion_tokens(choice) for choice in choices]
        total = parsed.completion_tokens
        if total is not None:
            completion = [total] if len(choices) == 1 else shares(completion, total)
        estimated = total is None or parsed.prompt_tokens is None
        prompt = parsed.prompt_tokens
        if prompt is None:
            prompt = expected_tokens(unit.prepared.content, self.tokenizer)
        self.account.settle(worst, self.account.spend(prompt, sum(completion)))
        found: list[Answer | Failure] = [
            _answer(choice, prompt, tokens, estimated)
            for choice, tokens in zip(choices, completion, strict=True)
        ]
        for _ in range(len(unit.indices) - len(choices)):
            message = f"{len(choices)} choices for n={len(unit.indices)}; set provider_n=False"
            found.append(Failure(kind="garbage", message=message, status=200))
        return found

    def _completion_tokens(self, choice: Choice) -> int:
        for known in (choice.token_ids, choice.logprobs):
            if known is not None:
                return len(known)
        return text_tokens((choice.reasoning or "") + choice.text, self.tokenizer)


def _answer(choice: Choice, prompt: int, tokens: int, estimated: bool) -> Answer:
    return Answer(
        text=choice.refusal or choice.text,
        finish_reason="content_filter" if choice.refusal else choice.finish_reason,
        prompt_tokens=prompt,
        completion_tokens=tokens,
        estimated=estimated,
        reasoning=choice.reasoning,
        token_ids=choice.token_ids,
        logprobs=choice.logprobs,
    )


def shares(weights: list[int], total: int) -> list[int]:
    """`total` split in proportion to the weights, in whole numbers that add up to it."""
    whole, begun, given, shared = sum(weights) or len(weights), 0, 0, []
    for weight in weights if sum(weights) else [1] * len(weights):
        begun += weight
        shared.append(total * begun // whole - given)
        given += shared[-1]
    return shared


def sort_status(reply: Reply) -> Trouble:
    """What a status other than 2xx means: to be tried again, or not."""
    status, wait = reply.status, reply.retry_after
    message, code = _error_of(reply.body)
    text = f"HTTP {status}: {message}"
    if status == 429 and code == "insufficient_quota":
        return Trouble("refused", text, status, transient=False)
    if status == 429 or (status == 503 and wait is not None):
        return Trouble("rate", text, status, wait_seconds=wait)
    if status == 408:
        return Trouble("timeout", text, status, wait_seconds=wait)
    if status in (409, 425) or status >= 500:
        return Trouble("server", text, status, wait_seconds=wait)
    if 300 <= status < 400:
        text += "; redirects are not followed: give the final address as base_url"
    if status in _HINTS:
        text += f"; {_HINTS[status]}"
    return Trouble("refused", text, status, transient=False)


def _error_of(body: bytes) -> tuple[str, str | None]:
    """(message, code) of an error body, or its first bytes."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        if isinstance(error, str):
            return error[:300], None
        message = error.get("message") or error.get("detail")
        if message:
            code = error.get("code") or error.get("type")
            return str(message)[:300], code if isinstance(code, str) else None
    except (ValueError, AttributeError, RecursionError):
        pass
    return first_bytes(body), None
