"""Keys and values of many rows that end at one place, and of prompts that rows begin with.

`RowCache(network)` lets rows `join`, computes their next tokens, lets them leave; `Prefixes` keeps
each prompt's keys and values, so that its samples, and prompts that are its beginnings, need not
compute them again. Nothing is written.

Shapes: b rows, q new tokens, k cached and new tokens, h heads, s slots, d head dim, v vocabulary.

Rows lie side by side with their newest tokens in the same slot: to the model that is a batch padded
on the left, which every architecture of `transformers` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from phiforge.inference.transformers.network import Network

TokenIds = tuple[int, ...]
CHUNK = 2048  # prompt tokens computed at a time
_ROOM = 64  # slots for new tokens, at least


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's token ids and, for each layer, its keys and values [h, s, d] (None: no cache)."""

    ids: np.ndarray
    layers: list[tuple[Tensor, Tensor] | None]

    def shared(self, ids: np.ndarray) -> int:
        """How many first tokens it has in common with `ids`."""
        size = min(len(ids), len(self.ids))
        differ = self.ids[:size] != ids[:size]
        return int(differ.argmax()) if differ.any() else size


Start = tuple[Prefix | None, int]  # the first so many tokens of a prefix


class _Layer(DynamicLayer):
    """One layer's keys and values of all rows; tokens are written in place."""

    def __init__(self, rows: RowCache) -> None:
        super().__init__()
        self.rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        rows, new = self.rows, key_states.shape[-2]
        if self.keys is None or self.values is None:
            self.hold(rows.empty(key_states), rows.empty(value_states))
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, rows.end : rows.end + new] = key_states
        self.values[:, :, rows.end : rows.end + new] = value_states
        seen = slice(rows.end - rows.width, rows.end + new)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Takes buffers [b, h, s, d]."""
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self, *args: Any) -> int:
        return self.rows.width

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # transformers 4 gives the places of the new tokens, 5 their number.
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.rows.width + new, 0


class RowCache:
    """Rows under way: `lengths` [b] are their cached tokens, `width` the most of them."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cache = Cache(layer_class_to_replicate=lambda: _Layer(self))  # type: ignore[arg-type]
        self.lengths = np.zeros(0, np.int64)
        self.end = self.width = self._capacity = 0

    def empty(self, like: Tensor) -> Tensor:
        """A buffer for all rows; zeros, because what is masked must still be finite."""
        _, heads, _, dim = like.shape
        return like.new_zeros((len(self.lengths), heads, self._capacity, dim))

    def change(self, kept: np.ndarray, starts: Sequence[tuple[Start, int]] = ()) -> None:
        """Keeps some rows, in this order, and lets others join after them: of each start so many.

        Everything moves to the left as far as the longest row allows.
        """
        lengths = [self.lengths[kept], *(np.full(n, start[1]) for start, n in starts)]
        self._rebuild(kept, starts, np.concatenate(lengths).astype(np.int64), new=1)

    def compute(self, ids_bq: np.ndarray, num_last: int = 1) -> Tensor:
        """Adds tokens to every row; logits [b, num_last, v] of the last ones."""
        new = ids_bq.shape[1]
        if self.end + new > self._capacity:
            self._rebuild(np.arange(len(self.lengths)), (), self.lengths, new)
        device = self._network.device
        places_k = np.arange(self.width + new)
        mask_bk = places_k >= (self.width - self.lengths)[:, None]
        # Padding, and rows that have ended, may be beyond the model's last position.
        last_place = self._network.context - 1
        positions_bq = np.minimum(self.lengths[:, None] + np.arange(new), last_place)
        logits, _ = self._network.forward(
            torch.from_numpy(ids_bq).to(device),
            self._cache,
            torch.from_numpy(positions_bq).to(device),
            torch.from_numpy(mask_bk.astype(np.int64)).to(device),
            num_last,
        )
        self.lengths = self.lengths + new
        self.end, self.width = self.end + new, self.width + new
        return logits

    def take(self, row: int, first: int, last: int) -> list[tuple[Tensor, Tensor] | None]:
        """A copy of what a row has in slots `first` .. `last` - 1."""
        found: list[tuple[Tensor, Tensor] | None] = []
        for layer in self._layers:
            if layer.keys is None or layer.values is None:
                found.append(None)
            else:
                part = slice(first, last)
                found.append((layer.keys[row, :, part].clone(), layer.values[row, :, part].clone()))
        return found

    @property
    def _layers(self) -> list[Any]:
        return self._cache.layers

    def _rebuild(
        self,
        kept: np.ndarray,
        starts: Sequence[tuple[Start, int]],
        lengths: np.ndarray,
        new: int,
    ) -> None:
        old_width = int(self.lengths[kept].max(initial=0))
        old = slice(self.end - old_width, self.end)
        width = int(lengths.max(initial=0))
        self.lengths, self._capacity = lengths, width + max(_ROOM, width // 4, new)
        num_layers = [len(prefix.layers) for (prefix, _), _ in starts if prefix is not None]
        while len(self._layers) < max(num_layers, default=0):
            self._layers.append(_Layer(self))
        index = torch.from_numpy(kept).to(self._network.device)
        for number, layer in enumerate(self._layers):
            parts = [None if p is None else p.layers[number] for (p, _), _ in starts]
            like = [
                part
                for part in [(layer.keys, layer.values), *parts]
                if part and part[0] is not None
            ]
            if not like:
                continue
            buffers = [self.empty(one.unsqueeze(0) if one.ndim == 3 else one) for one in like[0]]
            if layer.keys is not None and len(kept):
                for buffer, before in zip(buffers, (layer.keys, layer.values), strict=True):
                    source = before.index_select(0, index.to(before.device))[:, :, old]
                    buffer[: len(kept), :, width - old_width : width] = source
            row = len(kept)
            for ((_, length), count), part in zip(starts, parts, strict=True):
                if part is not None and length:
                    for buffer, source in zip(buffers, part, strict=True):
                        buffer[row : row + count, :, width - length : width] = source[:, :length]
                row += count
            layer.hold(*buffers)
        self.end = self.width = width


class Prefixes:
    """Prompts' keys and values, the longest of each family; old ones go beyond `max_tokens`."""

    def __init__(self, network: Network, max_tokens: int) -> None:
        self._network, self._max_tokens = network, max_tokens
        self._kept: dict[TokenIds, Prefix] = {}  # the least recently used first
        self.num_computed = 0

    def clear(self) -> None:
        """Forgets all, as for changed weights."""
        self._kept.clear()

    def find(self, prompts: Sequence[TokenIds]) -> list[Prefix]:
        """For each prompt a prefix that begins with it; what is missing is computed.

        Prompts that are the beginning of another come after it: they find themselves in it.
        """
        missing: list[TokenIds] = []
        for prompt in prompts:
            if not any(longer[: len(prompt)] == prompt for longer in missing[-1:]):
                best, length = self._best(np.array(prompt))
                if best is None or length < len(prompt):
                    missing.append(prompt)
        for group in _groups(missing):
            self._compute(group)
        found = []
        for prompt in prompts:
            best, length = self._best(np.array(prompt))
            assert best is not None
            assert length == len(prompt)
            key = tuple(best.ids.tolist())
            self._kept[key] = self._kept.pop(key)
            found.append(best)
        self._forget_old({id(prefix) for prefix in found})
        return found

    def _best(self, ids: np.ndarray) -> tuple[Prefix | None, int]:
        best, most = None, 0
        for prefix in self._kept.values():
            if (length := prefix.shared(ids)) > most:
                best, most = prefix, length
        return best, most

    def _compute(self, prompts: Sequence[TokenIds]) -> None:
        """A few short prompts at once, padded on the right; a long one alone, in chunks."""
        arrays = [np.array(prompt) for prompt in prompts]
        starts = [self._best(ids) for ids in arrays]
        rows = RowCache(self._network)
        rows.change(np.zeros(0, np.int64), [(start, 1) for start in starts])
        rests = [ids[length:] for ids, (_, length) in zip(arrays, starts, strict=True)]
        longest = max(map(len, rests))
        padded_bq = np.zeros((len(rests), longest), np.int64)
        for row, rest in enumerate(rests):
            padded_bq[row, : len(rest)] = rest
        for place in range(0, longest, CHUNK):
            rows.compute(padded_bq[:, place : place + CHUNK])
        first = rows.end - longest
        for row, (ids, (_, length)) in enumerate(zip(arrays, starts, strict=True)):
            layers = rows.take(row, first - length, first + len(rests[row]))
            self._kept[prompts[row]] = Prefix(ids, layers)
            self.num_computed += len(rests[row])

    def _forget_old(self, needed: set[int]) -> None:
        total = sum(len(key) for key in self._kept)
        for key, prefix in list(self._kept.items()):
            if total <= self._max_tokens:
                return
            if id(prefix) not in needed:
                del self._kept[key]
                total -= len(key)


def _groups(prompts: Sequence[TokenIds]) -> list[list[TokenIds]]:
    """Neighbours together while they make no more than a chunk, padding included."""
    groups: list[list[TokenIds]] = []
    for prompt in prompts:
        size = max(len(prompt), *(len(p) for p in groups[-1])) if groups else 0
        if groups and size * (len(groups[-1]) + 1) <= CHUNK:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups


def tried_out(network: Network) -> str | None:
    """Rows of two lengths on one prompt's cache against plain passes; what went wrong, or None."""
    probe = tuple(network.probe)
    short = probe[: max(1, len(probe) // 2)]
    try:
        (prefix,) = Prefixes(network, 0).find([probe])
        rows = RowCache(network)
        starts: list[tuple[Start, int]] = [((prefix, len(p) - 1), 1) for p in (probe, short)]
        rows.change(np.zeros(0, np.int64), starts)
        rows.compute(np.array([[probe[-1]], [short[-1]]]))
        found = rows.compute(np.array([[probe[0]], [probe[0]]]))[:, 0]
        for row, ids in enumerate((probe, short)):
            plain = network.forward(network.row([*ids, probe[0]]), use_cache=False)[0][0, 0]
            if network.differs(found[row], plain):
                return "its logits on a shared cache are not those of a plain pass"
    except (
        Exception
    ) as error:  # whatever a foreign architecture raises: it is told, and done without
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
    return None
