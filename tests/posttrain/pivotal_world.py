"""A scripted model for the pivotal tests: a Markov chain with p(success) in closed form.

`Chain` is the law, `ScriptedEngine` samples it behind the generator interface (evenly spread or
pseudo-random) and keeps every call, `ScriptedTokenizer` names its tokens.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phiforge.core.records import Problem
from phiforge.inference.interface import PerPrompt, sample_spans

STOP, YES, NO = 0, 1, 2
START = 100  # a prompt's last token; prompts are [50 + question, START]


class ScriptedTokenizer:
    """Token ids with fixed bytes; everything else is written <id>."""

    stop_ids = frozenset({STOP})

    def __init__(self, spelling: Mapping[int, bytes] | None = None):
        self.spelling = {STOP: b"", YES: b"Y", NO: b"N"} | dict(spelling or {})

    def token_bytes(self, index: int) -> bytes:
        return self.spelling.get(index, f"<{index}>".encode())

    def encode(self, text: str) -> list[int]:
        return [1000 + ord(letter) for letter in text]

    def encode_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        assert add_generation_prompt
        return [i for m in messages for i in [900, *self.encode(m["content"])]] + [START]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


@dataclass
class Chain:
    """`law[token]` lists (next token, probability); p(success) follows by recursion."""

    law: Mapping[int, Sequence[tuple[int, float]]]

    def p(self, token: int) -> float:
        """p(success) after `token`: success is passing through YES."""
        if token in (YES, NO, STOP):
            return float(token == YES)
        return sum(share * self.p(following) for following, share in self.next(token))

    def next(self, token: int) -> Sequence[tuple[int, float]]:
        return [(STOP, 1.0)] if token in (YES, NO) else self.law[token]


@dataclass
class Sample:
    """A completion, as the interface has it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: str


@dataclass
class Call:
    """One engine call; counts, first indices and lengths are one for each prompt."""

    prompts: list[tuple[int, ...]]
    n: list[int]
    first_index: list[int]
    max_tokens: list[int]


@dataclass
class ScriptedEngine:
    """Samples `chain`. `strata`: sample i takes the quantile (i mod strata + ½) / strata, so that
    shares which are multiples of 1/strata come out exactly; None: hashed pseudo-randomness.
    `die_at`: the call (from 0) that raises KeyboardInterrupt instead.
    """

    chain: Chain
    strata: int | None = None
    tokenizer: ScriptedTokenizer = field(default_factory=ScriptedTokenizer)
    die_at: int | None = None
    calls: list[Call] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: PerPrompt,
        max_tokens: PerPrompt,
        temperature: float,
        seed: int,
        first_index: PerPrompt,
        logprobs: bool,
        forbidden_first: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Sample]]:
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        spans = sample_spans(n, first_index, max_tokens, len(prompts))
        self.calls.append(
            Call(
                [tuple(p) for p in prompts],
                [len(span.indices) for span in spans],
                [span.indices.start for span in spans],
                [span.max_tokens for span in spans],
            )
        )
        refused = forbidden_first or [()] * len(prompts)
        return [
            [self._sample(tuple(p), seed, i, s.max_tokens, logprobs, no) for i in s.indices]
            for p, s, no in zip(prompts, spans, refused, strict=True)
        ]

    def _sample(
        self,
        prompt: tuple[int, ...],
        seed: int,
        index: int,
        limit: int,
        logprobs: bool,
        refused: Sequence[int] = (),
    ) -> Sample:
        u = self._quantile(prompt, seed, index)
        ids: list[int] = []
        logs: list[float] = []
        last = prompt[-1]
        while len(ids) < limit and last != STOP:
            choices = self.chain.next(last)
            if refused and not ids:
                choices = [choice for choice in choices if choice[0] not in refused]
                total = sum(share for _, share in choices)
                choices = [(token, share / total) for token, share in choices]
            last, share, u = _branch(choices, u)
            ids.append(last)
            logs.append(math.log(share))
        reason = "stop" if last == STOP else "length"
        text = self.tokenizer.decode(ids)
        return Sample(text, tuple(ids), tuple(logs) if logprobs else None, reason)

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probabilities of given tokens."""
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            places = zip([prompt[-1], *completion], completion, strict=False)
            scores.append([math.log(dict(self.chain.next(a))[b]) for a, b in places])
        return scores

    def _quantile(self, prompt: tuple[int, ...], seed: int, index: int) -> float:
        if self.strata:
            return (index % self.strata + 0.5) / self.strata
        key = hashlib.sha256(repr((prompt, seed, index)).encode()).digest()
        return int.from_bytes(key[:8], "big") / 2**64

    @property
    def drawn(self) -> list[tuple[tuple[int, ...], int]]:
        """(prompt, sample index) of everything that was ever sampled."""
        return [
            (prompt, i)
            for call in self.calls
            for prompt, first, n in zip(call.prompts, call.first_index, call.n, strict=True)
            for i in range(first, first + n)
        ]


def _branch(choices: Sequence[tuple[int, float]], u: float) -> tuple[int, float, float]:
    low = 0.0
    for token, share in choices[:-1]:
        if u < low + share:
            return token, share, (u - low) / share
        low += share
    token, share = choices[-1]
    return token, share, min((u - low) / share, 1 - 1e-12)


# p: start .5, then 10 → .75 or 11 → .25; 12, 13, 14 are fillers.
FORK = Chain(
    {
        START: [(10, 0.5), (11, 0.5)],
        10: [(12, 1.0)],
        12: [(13, 1.0)],
        13: [(YES, 0.75), (NO, 0.25)],
        11: [(14, 1.0)],
        14: [(YES, 0.25), (NO, 0.75)],
    }
)

# 20 raises p from .5 to .75 and 22 takes it back to .5 before the answer.
CANCEL = Chain(
    {
        START: [(20, 0.5), (21, 0.5)],
        20: [(22, 0.5), (23, 0.5)],
        22: [(YES, 0.5), (NO, 0.5)],
        23: [(YES, 1.0)],
        21: [(24, 1.0)],
        24: [(YES, 0.25), (NO, 0.75)],
    }
)


def oracle(problem: Problem, response: str) -> bool:
    """Success: the answer says Y."""
    return "Y" in response


def problems(count: int, **fields: Any) -> list[Problem]:
    """Questions that differ in their prompt alone."""
    return [
        Problem(id=f"q{i}", prompt=[50 + i, START], answer="Y", metadata=dict(fields))
        for i in range(count)
    ]
