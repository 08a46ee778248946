"""What is asked of a server and what comes back: calls, answers, failures, results.

Build `Call(prompt=..., sampling=Sampling(max_tokens=64), n=4)`; each of its samples becomes an
`Answer` or a `Failure`. `sample_seed(seed, index)` is the seed a request carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phiforge.inference.interface import Prompt, Sampling, check_count

Api = Literal["chat", "completions"]
Cut = Literal["length", "content_filter"]
FailureKind = Literal[
    "length",  # cut at max_tokens or at the end of the context, and not allowed
    "content_filter",  # withheld by the server's filter, and not allowed
    "refused",  # the server will not take this request: 400, 401, 403, 404, 422 …
    "rate",  # 429, or 503 with Retry-After, for longer than we wait
    "server",  # 5xx, again and again
    "timeout",
    "connection",
    "garbage",  # no JSON, or JSON of another shape
    "schema",  # the answer and its repair do not fit the JSON schema
]
# Failures that say that the server is in trouble, whatever the prompt is.
TROUBLE = frozenset({"rate", "server", "timeout", "connection"})
CUTS: tuple[Cut, ...] = ("length", "content_filter")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One prompt, how to sample, and which of its samples: `first_index` .. + `n` - 1.

    `via` chooses the API (None: chat messages go to /chat/completions, text and token ids to
    /completions). `schema` is a JSON Schema the server is asked to keep to. `allow` names the cuts
    that count as answers. `template_version` enters the cache key: change it with a prompt's
    meaning, not its text. `echo` scores the prompt's own tokens (used by `Endpoint.score`).
    `forbidden` are token ids that may not be drawn, sent as `logit_bias` -100.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    first_index: int = 0
    seed: int = 0
    via: Api | None = None
    schema: Mapping[str, Any] | None = None
    allow: tuple[Cut, ...] = ()
    template_version: str = ""
    echo: bool = False
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count("n", self.n, 1)
        check_count("first_index", self.first_index, 0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number")
        if self.via not in (None, "chat", "completions"):
            raise ValueError(f"via is {self.via!r}; allowed: 'chat', 'completions', None")
        if isinstance(self.allow, str) or set(self.allow) - set(CUTS):
            raise ValueError(f"allow is {self.allow!r}; it lists any of 'length', 'content_filter'")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample's text. Token counts are the server's, or `estimated` where it sends none.

    `token_ids` and `logprobs` (one per token) are there when the server was asked and gave them.
    `value` is what `generate_json` parsed. `cached`: read from the replay cache, not paid now.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    reasoning: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float | None, ...] | None = None
    cached: bool = False
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a sample has no answer. `status` is the last HTTP status, None without one."""

    kind: FailureKind
    message: str
    status: int | None = None
    attempts: int = 1


Outcome = Answer | Failure


@dataclass(frozen=True)
class Result:
    """The outcome of sample `index` of the call at `position` of the list that was given."""

    position: int
    index: int
    outcome: Outcome


class EndpointError(RuntimeError):
    """A job that did not answer everything. `results` holds what there is: per call its samples,
    None where nothing came back."""

    results: Sequence[Sequence[Outcome | None]]

    def __init__(self, message: str, results: Sequence[Sequence[Outcome | None]] = ()):
        super().__init__(message)
        self.results = results


class AnswersFailed(EndpointError):
    """Some samples failed for good; the others are in `results` (and in the cache)."""


class TooManyFailures(EndpointError):
    """The job was stopped because most calls fail; the message says what the server answers."""


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index`: `seed` itself for sample 0, else 31 bits of a hash of both."""
    if index == 0 and 0 <= seed < 2**31:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def count_kinds(outcomes: Sequence[Outcome | None]) -> str:
    """ "2 length, 1 timeout": how many failures of which kind, the most frequent first."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {kind}" for kind, number in ordered)


def all_answered(results: list[list[Outcome]]) -> list[list[Answer]]:
    """The results when all are Answers. Raises AnswersFailed, which holds them, when not."""
    flat = [outcome for row in results for outcome in row]
    failures = [outcome for outcome in flat if isinstance(outcome, Failure)]
    if failures:
        raise AnswersFailed(
            f"{len(failures)} of {len(flat)} samples failed ({count_kinds(flat)}); the first: "
            f"{failures[0].message}. The others are in `results` and in the cache.",
            results,
        )
    return results  # type: ignore[return-value]
