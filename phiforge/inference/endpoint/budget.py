"""What calls cost and what they may cost: prices, budgets, and the hard stop before each call.

`await account.reserve(worst)` holds a call's worst case (or raises BudgetExceeded) before it is
sent; `account.settle(held, spent)` turns it into what the call did cost. Kept in the Store.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from phiforge.inference.endpoint.calls import EndpointError

if TYPE_CHECKING:
    from phiforge.inference.endpoint.store import Store


class Prices(BaseModel):
    """What a provider charges, in USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: float = Field(ge=0, allow_inf_nan=False, description="USD per million prompt tokens.")
    completion: float = Field(
        ge=0, allow_inf_nan=False, description="USD per million completion tokens."
    )

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens, in USD."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that one role may ever spend, earlier runs on the same cache file included.

    Tokens are prompt and completion tokens together. None sets no limit.
    """

    max_usd: float | None = None
    max_tokens: int | None = None
    max_calls: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_usd", "max_tokens", "max_calls"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}; it must be a finite number from 0, or None")

    @property
    def limits(self) -> bool:
        """Whether any limit is set."""
        return (self.max_usd, self.max_tokens, self.max_calls) != (None, None, None)


@dataclass(frozen=True)
class Spend:
    """Calls, tokens and money of one call or of many."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.usd + other.usd,
        )


NOTHING = Spend()


@dataclass(frozen=True)
class Usage:
    """The ledger of one role. `lost` are the worst cases of requests whose outcome nobody saw
    (timeouts, broken connections, unreadable bodies, killed processes): they may have been charged,
    so budgets count them."""

    spent: Spend = NOTHING
    lost: Spend = NOTHING
    cached: int = 0


class BudgetExceeded(EndpointError):
    """The next call could pass a limit, so it was not sent; what was answered is kept."""


class Account:
    """Reserves before calls, settles after them; belongs to one event loop."""

    def __init__(self, store: Store, budget: Budget | None, prices: Prices | None):
        if budget is not None and budget.max_usd is not None and prices is None:
            raise ValueError(
                "max_usd is set but prices is not; give prices=Prices(prompt=..., completion=...) "
                "in USD per million tokens, or limit max_tokens"
            )
        self.store = store
        self.budget = budget if budget is not None and budget.limits else None
        self.prices = prices
        self._held = 0
        self._settled = asyncio.Event()

    def spend(self, prompt_tokens: int, completion_tokens: int, calls: int = 1) -> Spend:
        """So many tokens with their price."""
        usd = self.prices.usd(prompt_tokens, completion_tokens) if self.prices else 0.0
        return Spend(calls, prompt_tokens, completion_tokens, usd)

    async def reserve(self, worst: Spend) -> None:
        """Hold `worst`; waits for calls in flight where only their worst cases stand in the way.

        Raises BudgetExceeded when the call does not fit although none of ours is in flight.
        """
        assert self.budget is not None
        while (refusal := self.store.reserve(worst, self.budget)) is not None:
            if self._held == 0:
                raise BudgetExceeded(refusal)
            self._settled.clear()
            await self._settled.wait()
        self._held += 1

    def settle(self, held: Spend | None, spent: Spend = NOTHING, lost: Spend = NOTHING) -> None:
        """Enter what a call cost (or may have cost: `lost`); give back what was held for it."""
        if spent is NOTHING and lost is NOTHING and held is None:
            return
        self.store.enter(spent=spent, lost=lost, released=held or NOTHING)
        if held is not None:
            self._held -= 1
            self._settled.set()
