"""The client of every OpenAI-compatible server: retries, replay cache, ledger, hard budget.

`Endpoint(base_url, model, cache=..., budget=Budget(max_usd=5), prices=Prices(...))` is a Generator;
`EndpointConfig` is the same as a checked block of settings. docs/endpoint.md is the guide.
"""

from phiforge.inference.endpoint.budget import Budget, BudgetExceeded, Prices, Spend, Usage
from phiforge.inference.endpoint.calls import (
    Answer,
    AnswersFailed,
    Call,
    EndpointError,
    Failure,
    Outcome,
    Result,
    TooManyFailures,
)
from phiforge.inference.endpoint.client import Endpoint
from phiforge.inference.endpoint.config import EndpointConfig
from phiforge.inference.endpoint.plan import Estimate
from phiforge.inference.endpoint.send import Patience

__all__ = [
    "Answer",
    "AnswersFailed",
    "Budget",
    "BudgetExceeded",
    "Call",
    "Endpoint",
    "EndpointConfig",
    "EndpointError",
    "Estimate",
    "Failure",
    "Outcome",
    "Patience",
    "Prices",
    "Result",
    "Spend",
    "TooManyFailures",
    "Usage",
]
