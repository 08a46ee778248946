"""Which tokens may be drawn next: ready-made masks for `Request.mask` and `generate(masks=...)`.

`forbid_first(ids)`, `allow_only(ids)`; any callable that takes the tokens drawn so far and returns
None (all) or a bool array over the vocabulary will do. Nothing is written.

A mask must be a function of the drawn tokens alone: samples may be put off and begun again. It runs
inside the engine's step, so it must not call the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from phiforge.inference.interface import TokenMask


@dataclass(frozen=True)
class Constraint:
    """A mask that waits for the vocabulary's size; the engine binds it."""

    token_ids: frozenset[int]
    allowed: bool  # whether these are the allowed tokens, or the forbidden ones
    first_only: bool

    def bind(self, vocab_size: int) -> TokenMask:
        """The mask itself. ValueError for an unknown token, or when no token is left."""
        unknown = [token for token in self.token_ids if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"mask: token id {min(unknown)} is unknown; ids run from 0 to {vocab_size - 1}"
            )
        mask = np.full(vocab_size, not self.allowed)
        mask[list(self.token_ids)] = self.allowed
        if not mask.any():
            raise ValueError(f"mask: none of the {vocab_size} tokens is left; allow at least one")

        def ask(drawn: Sequence[int]) -> np.ndarray | None:
            return None if self.first_only and drawn else mask

        return ask

    def __call__(self, drawn: Sequence[int]) -> None:
        raise TypeError("this mask does not know the vocabulary's size: call .bind(vocab_size)")


def forbid_first(token_ids: Collection[int]) -> Constraint:
    """The first token must be none of `token_ids`, its law renormalised; later ones are free."""
    return Constraint(frozenset(token_ids), allowed=False, first_only=True)


def allow_only(token_ids: Collection[int]) -> Constraint:
    """Every token must be one of `token_ids`; name a stop token too if the answer should be able
    to end by itself."""
    return Constraint(frozenset(token_ids), allowed=True, first_only=False)


def bind(mask: TokenMask | None, vocab_size: int) -> TokenMask | None:
    """The mask, told the vocabulary's size if it waits for that."""
    return mask.bind(vocab_size) if isinstance(mask, Constraint) else mask


def check_mask(mask: object, vocab_size: int, name: str) -> np.ndarray | None:
    """What a mask returned, as a bool array or None. ValueError, naming the request, otherwise."""
    if mask is None:
        return None
    allowed = np.asarray(mask)
    if allowed.dtype != np.bool_ or allowed.shape != (vocab_size,):
        raise ValueError(
            f"{name}: its mask returned {allowed.dtype} of shape {list(allowed.shape)}; it must "
            f"return None or a bool array of {vocab_size} values, one per token"
        )
    if not allowed.any():
        raise ValueError(f"{name}: its mask forbids every token; allow at least one (a stop token)")
    return allowed
