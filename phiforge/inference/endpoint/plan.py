"""What a job would send and cost, reckoned without sending anything.

`estimate(prepared, store, account, tokenizer)` returns an Estimate; `lines()` of it is for people,
`row()` for programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phiforge.inference.endpoint.budget import Account, Budget, Spend
from phiforge.inference.endpoint.job import judge
from phiforge.inference.endpoint.replies import load
from phiforge.inference.endpoint.store import Store
from phiforge.inference.endpoint.wire import Prepared, expected_tokens, worst_tokens


@dataclass(frozen=True)
class Estimate:
    """The price of a job. `worst` is what the budget's reservations would add up to without
    retries and JSON repairs; `expected` takes the mean answer of this role so far (`basis`)."""

    samples: int
    cached: int
    expected: Spend
    worst: Spend
    basis: str
    priced: bool
    spent: Spend
    budget: Budget | None

    @property
    def beyond(self) -> tuple[str, ...]:
        """The limits that the expected cost, on top of what is spent, would pass."""
        if self.budget is None:
            return ()
        total = self.spent + self.expected
        sums = {"max_usd": total.usd, "max_tokens": total.tokens, "max_calls": total.calls}
        limits = {name: getattr(self.budget, name) for name in sums}
        return tuple(n for n, limit in limits.items() if limit is not None and sums[n] > limit)

    def row(self) -> dict[str, Any]:
        """The figures as one JSON object; money only with prices."""
        money = {"expected_usd": self.expected.usd, "worst_usd": self.worst.usd}
        return {
            "samples": self.samples,
            "cached": self.cached,
            "calls": self.expected.calls,
            "prompt_tokens": self.expected.prompt_tokens,
            "expected_completion_tokens": self.expected.completion_tokens,
            "worst_completion_tokens": self.worst.completion_tokens,
            **(money if self.priced else {}),
            "beyond": list(self.beyond),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, value) rows to print."""
        yield "samples", f"{self.samples:,} ({self.cached:,} in the cache)"
        yield "calls to make", f"{self.expected.calls:,}"
        yield "prompt tokens", f"{self.expected.prompt_tokens:,}"
        yield (
            "completion tokens",
            f"{self.expected.completion_tokens:,} expected ({self.basis}), "
            f"{self.worst.completion_tokens:,} at most",
        )
        if self.priced:
            yield "cost", f"${self.expected.usd:,.4f} expected, ${self.worst.usd:,.4f} at most"
        for name in self.beyond:
            yield "limit", f"{name} would stop this job"


def estimate(
    prepared: Sequence[Prepared], store: Store, account: Account, tokenizer: Any
) -> Estimate:
    """Price a job: samples in the cache are free, the others cost prompt and answer."""
    usage = store.usage().get(store.role)
    mean, basis = None, "half of max_tokens: no answers yet"
    if usage is not None and usage.spent.calls:
        mean = usage.spent.completion_tokens / usage.spent.calls
        basis = f"mean of {usage.spent.calls:,} answers so far: {mean:.0f}"
    calls = prompt_sum = worst_prompt = answer_sum = worst_answer = samples = 0
    for one, missing in zip(prepared, _missing(prepared, store), strict=True):
        samples += one.call.n
        most = 1 if one.call.echo else one.call.sampling.max_tokens
        calls += missing
        prompt_sum += missing * expected_tokens(one.content, tokenizer)
        worst_prompt += missing * worst_tokens(one.content, tokenizer)
        worst_answer += missing * most
        answer_sum += missing * min(most, most / 2 if mean is None else mean)
    return Estimate(
        samples=samples,
        cached=samples - calls,
        expected=account.spend(prompt_sum, round(answer_sum), calls),
        worst=account.spend(worst_prompt, worst_answer, calls),
        basis=basis,
        priced=account.prices is not None,
        spent=Spend() if usage is None else usage.spent + usage.lost,
        budget=account.budget,
    )


def _missing(prepared: Sequence[Prepared], store: Store) -> Iterator[int]:
    """Per call how many of its samples would be sent; one asked for twice is sent once."""
    seen: set[bytes] = set()
    for one in prepared:
        call = one.call
        keys = one.sample_keys()
        found = {key: load(text) for key, text in store.lookup(keys).items()}
        good = {key for key, answer in found.items() if judge(call, answer) is answer}
        wanted = set(keys) - good - seen
        seen |= wanted
        yield len(wanted)
