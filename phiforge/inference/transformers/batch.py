"""The rows of a generation on a model: what is computed for them, shared or prompt by prompt.

`SharedBatch` takes rows of any prompts and computes each prompt once; `AloneBatch`, for
architectures that refuse that, takes rows of one prompt at a time. Both: `begin(prompts)`,
`join(prompts, counts)`, `step(tokens)`, `keep(rows)`. Nothing is written.

Shapes: b rows, p prompts, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.transformers.network import Network

TokenIds = tuple[int, ...]
_NONE = np.zeros(0, np.int64)


class Batch(Protocol):
    """What the sampling loop needs."""

    mixes: bool  # whether rows of different prompts may be in it together

    def begin(self, prompts: Sequence[TokenIds]) -> Tensor:
        """Logits [p, v] after each of some different prompts, longer ones first."""
        ...

    def join(self, prompts: Sequence[TokenIds], counts: Sequence[int]) -> None:
        """Lets rows join after the others: so many of each prompt that was begun."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Gives every row one more token; logits [b, v] after it."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Lets all other rows leave."""
        ...


class SharedBatch:
    """Rows on copies of their prompts' keys and values, which are computed once a prompt."""

    mixes = True

    def __init__(self, network: Network, prefixes: Any) -> None:
        from phiforge.inference.transformers.cache import RowCache

        self._network, self._prefixes = network, prefixes
        self._new_rows = RowCache
        self._rows = RowCache(network)
        self._places = _NONE  # which of the cache's rows are under way

    def begin(self, prompts: Sequence[TokenIds]) -> Tensor:
        """Computes the last token of every prompt on what the prefixes know of it."""
        self._begun = dict(zip(prompts, self._prefixes.find(prompts), strict=True))
        rows = self._new_rows(self._network)
        rows.change(_NONE, [((self._begun[p], len(p) - 1), 1) for p in prompts])
        return rows.compute(np.array([[prompt[-1]] for prompt in prompts]))[:, 0]

    def join(self, prompts: Sequence[TokenIds], counts: Sequence[int]) -> None:
        starts = [
            ((self._begun[prompt], len(prompt)), count)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        self._rows.change(self._places, starts)
        self._places = np.arange(len(self._rows.lengths))

    def step(self, tokens: Sequence[int]) -> Tensor:
        ids_b1 = np.zeros((len(self._rows.lengths), 1), np.int64)
        ids_b1[self._places, 0] = tokens
        logits_bv = self._rows.compute(ids_b1)[:, 0]
        if len(self._places) == len(logits_bv):
            return logits_bv
        return logits_bv[torch.from_numpy(self._places).to(logits_bv.device)]

    def keep(self, rows: Sequence[int]) -> None:
        self._places = self._places[list(rows)]
        # Leaving copies what stays: ended rows are computed along until there are a few of them.
        if 8 * len(self._places) <= 7 * len(self._rows.lengths):
            self._rows.change(self._places)
            self._places = np.arange(len(self._places))


class AloneBatch:
    """Rows of one prompt, on the model's own cache, or on none (`cached` False): whole rows are
    computed again for every token then."""

    mixes = False

    def __init__(self, network: Network, cached: bool) -> None:
        self._network, self._cached = network, cached
        self.num_computed = 0

    def begin(self, prompts: Sequence[TokenIds]) -> Tensor:
        (prompt,) = prompts
        self._ids_bk = self._network.row(prompt)
        logits, self._cache = self._network.forward(self._ids_bk, use_cache=self._cached)
        self.num_computed += len(prompt)
        return logits[:, 0]

    def join(self, prompts: Sequence[TokenIds], counts: Sequence[int]) -> None:
        self.keep([0] * sum(counts))

    def step(self, tokens: Sequence[int]) -> Tensor:
        new_b1 = torch.tensor(tokens, device=self._ids_bk.device)[:, None]
        self._ids_bk = torch.cat((self._ids_bk, new_b1), dim=1)
        if not self._cached:
            return self._network.forward(self._ids_bk, use_cache=False)[0][:, 0]
        logits, self._cache = self._network.forward(new_b1, self._cache)
        return logits[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._cache = None
            return
        index = torch.tensor(rows, device=self._ids_bk.device)
        self._ids_bk = self._ids_bk[index]
        if self._cached:
            self._cache.reorder_cache(index)  # type: ignore[union-attr]


def why_not_cached(network: Network) -> str | None:
    """Why rows must be computed from their beginning at every token; None: the model's own cache
    can be copied and cut to some rows, which is tried out."""
    probe = network.probe
    batch = AloneBatch(network, cached=True)
    try:
        batch.begin([tuple(probe[:-1])])
        batch.join([tuple(probe[:-1])], [3])
        batch.step([probe[-1], probe[0], probe[-1]])
        batch.keep([1, 2])
        found = batch.step([probe[1], probe[1]])
        for row, last in enumerate((probe[0], probe[-1])):
            ids = network.row([*probe[:-1], last, probe[1]])
            if network.differs(found[row], network.forward(ids, use_cache=False)[0][0, 0]):
                return "its logits on its own cache are not those of a plain pass"
    except Exception as error:  # as in `tried_out`
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
    return None
