"""An endpoint as a block of a recipe or a handful of flags, checked key by key.

`with EndpointConfig(model="phi-4", max_usd=5, prices={...}).open() as endpoint: ...`. Secrets are
named (a variable, a file), never held.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiforge.inference.endpoint.budget import Budget, Prices

if TYPE_CHECKING:
    from phiforge.inference.endpoint.client import Endpoint


class EndpointConfig(BaseModel):
    """An OpenAI-compatible server, what to ask it for, and what it may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(
        default="http://127.0.0.1:8000/v1", description="Address of the API, usually ending in /v1."
    )
    model: str = Field(description="What the server calls the model.")
    base_model: str | None = Field(
        default=None, description="Name answers are kept under; `model` when not set."
    )
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key; none: no key is sent."
    )
    api_key_file: Path | None = Field(default=None, description="File that holds the key.")
    key_header: str = Field(
        default="Authorization", description="Header the key goes into; `api-key` for Azure."
    )
    headers: dict[str, str] = Field(default={}, description="Further headers of every request.")
    query: dict[str, str] = Field(
        default={}, description="Query of every request; `api-version` for Azure."
    )
    chat: bool | None = Field(
        default=None,
        description="true: all through /chat/completions; false: all through /completions; "
        "not set: messages there, text and token ids here.",
    )
    concurrency: int = Field(default=64, ge=1, description="Most calls in flight.")
    timeout_seconds: float = Field(default=600.0, gt=0, description="Limit of one attempt.")
    cache: Path | None = Field(default=None, description="SQLite file of answers and the ledger.")
    role: str = Field(default="teacher", description="Whose ledger and budget it is.")
    prices: Prices | None = Field(default=None, description="USD per million tokens.")
    max_usd: float | None = Field(default=None, ge=0, description="Most money to spend, in USD.")
    max_tokens: int | None = Field(
        default=None, ge=0, description="Most tokens to spend, prompts and answers together."
    )
    max_calls: int | None = Field(default=None, ge=0, description="Most calls to pay.")
    sends_seed: bool = Field(default=True, description="Send a seed with every sample.")
    provider_n: bool = Field(
        default=False, description="Ask for a prompt's missing samples in one call."
    )
    takes_schema: bool | None = Field(
        default=None, description="Whether response_format json_schema works; not set: try."
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="Name of the field in chat calls."
    )
    returns_token_ids: bool = Field(default=False, description="Ask for the drawn token ids.")
    extra_body: dict[str, Any] = Field(default={}, description="Further fields of every request.")

    @property
    def budget(self) -> Budget:
        """The three limits."""
        return Budget(max_usd=self.max_usd, max_tokens=self.max_tokens, max_calls=self.max_calls)

    def open(self, tokenizer: Any = None) -> Endpoint:
        """The client; sends nothing yet. Raises ValueError for settings that cannot work."""
        from phiforge.inference.endpoint.client import Endpoint

        rest = self.model_dump(exclude={"prices", "max_usd", "max_tokens", "max_calls"})
        return Endpoint(**rest, prices=self.prices, budget=self.budget, tokenizer=tokenizer)
