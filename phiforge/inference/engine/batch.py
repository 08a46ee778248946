"""The rows that are being sampled: rows join, each step draws a token for all, finished ones leave.

`batch.admit(starts)`, then `batch.step()` until nothing is active. Nothing is written.

Bookkeeping is in arrays over rows, so that a step costs the same Python whatever their number.
Shapes: b rows, d model dim, v vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.cache import KVCache
from phiforge.inference.engine.forward import Fused, attended_slots
from phiforge.inference.engine.prefill import Stored
from phiforge.inference.engine.sample import (
    BLOCK_STEPS,
    NonFiniteLogits,
    draw,
    token_logprobs,
    uniforms,
)
from phiforge.inference.interface import FinishReason, PromptTokenizer, Sampling


@dataclass(frozen=True)
class Start:
    """A sample about to begin: who asked, its random stream, its prompt's keys, values and x."""

    owner: int
    key: np.ndarray
    prompt_length: int
    limit: int  # most tokens to draw
    prefix: Stored
    x_d: Tensor


@dataclass(frozen=True)
class Finished:
    """A sample that ended, as raw tokens."""

    owner: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason


class Batch:
    """Up to `cache.rows` samples with the same settings; active rows are always the first ones."""

    def __init__(
        self,
        fused: Fused,
        tokenizer: PromptTokenizer,
        sampling: Sampling,
        cache: KVCache,
        name: Callable[[int], str],
    ) -> None:
        rows = cache.rows
        self._fused, self._tokenizer, self._sampling = fused, tokenizer, sampling
        self._cache, self._name = cache, name
        self.num_active = 0
        self._owners = np.zeros(rows, np.int64)
        self._lengths = np.zeros(rows, np.int64)  # tokens in the row, prompt and drawn
        self._counts = np.zeros(rows, np.int64)  # tokens drawn
        self._limits = np.zeros(rows, np.int64)
        self._tokens = np.zeros((rows, min(256, sampling.max_tokens)), np.int32)
        self._logprobs = np.zeros_like(self._tokens, dtype=np.float32)
        self._uniforms = np.zeros((rows, BLOCK_STEPS))
        self._keys = np.zeros((rows, 2), np.uint64)
        self._tails = np.full(rows, b"", object)  # last bytes, for stop strings
        self._x_bd = torch.zeros(
            rows, fused.config.hidden_size, dtype=fused.dtype, device=fused.device
        )
        self._is_stop = np.zeros(fused.config.vocab_size, bool)
        self._is_stop[[i for i in tokenizer.stop_ids if i < fused.config.vocab_size]] = True
        self._stop = tuple(text.encode() for text in sampling.stop)
        self._tail_bytes = max(map(len, self._stop), default=1) - 1

    @property
    def num_free(self) -> int:
        """Rows that could be admitted."""
        return self._cache.rows - self.num_active

    def admit(self, starts: list[Start]) -> None:
        """Lets samples join; their prompts' keys and values are copied into their rows."""
        rows = np.arange(self.num_active, self.num_active + len(starts))
        self.num_active += len(starts)
        from_cache: dict[int, list[int]] = defaultdict(list)
        for place, start in enumerate(starts):
            from_cache[id(start.prefix.cache)].append(place)
            self._keys[rows[place]] = start.key
            self._uniforms[rows[place]] = uniforms(start.key, 0)
        self._owners[rows] = [start.owner for start in starts]
        self._lengths[rows] = [start.prompt_length for start in starts]
        self._limits[rows] = [start.limit for start in starts]
        self._counts[rows] = 0
        self._tails[rows] = b""
        self._x_bd[int(rows[0]) : self.num_active] = torch.stack([s.x_d for s in starts])
        for places in from_cache.values():
            chosen = [starts[place] for place in places]
            self._cache.copy_rows(
                self._index(rows[places]),
                chosen[0].prefix.cache,
                self._index(np.array([start.prefix.row for start in chosen])),
                max(start.prompt_length for start in chosen),
            )

    def step(self) -> list[Finished]:
        """Draws one token for every active row; returns the samples that ended with it.

        Raises NonFiniteLogits, naming the sample.
        """
        n = self.num_active
        logits_bv = self._fused.logits(self._x_bd[:n])
        ids_b, finite_b = draw(logits_bv, self._sampling, self._next_uniforms(n))
        if not bool(finite_b.all()):
            self._refuse(int((~finite_b).nonzero()[0, 0]))
        ids = ids_b.cpu().numpy()
        self._record(n, ids, logits_bv, ids_b)
        stopped = self._is_stop[ids] | self._match_stop_strings(n, ids)
        ended = stopped | (self._counts[:n] >= self._limits[:n])
        finished = [self._finish(int(row), bool(stopped[row])) for row in np.flatnonzero(ended)]
        if finished:
            ids = self._compact(n, ended, ids)
        if self.num_active:
            self._forward(ids)
        return finished

    def last_token(self, row: int) -> tuple[int, float]:
        """The token drawn last in a row, and its log-probability (0 when not asked for)."""
        place = int(self._counts[row]) - 1
        return int(self._tokens[row, place]), float(self._logprobs[row, place])

    def partial(self, row: int) -> Finished:
        """An active row as it stands, cancelled."""
        tokens, logprobs = self._drawn(row)
        return Finished(int(self._owners[row]), tokens, logprobs, "cancelled")

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self._fused.device)

    def _next_uniforms(self, n: int) -> Tensor:
        places = self._counts[:n] % BLOCK_STEPS
        for row in np.flatnonzero((places == 0) & (self._counts[:n] > 0)):
            self._uniforms[row] = uniforms(self._keys[row], int(self._counts[row]) // BLOCK_STEPS)
        return self._index(self._uniforms[np.arange(n), places])

    def _record(self, n: int, ids: np.ndarray, logits_bv: Tensor, ids_b: Tensor) -> None:
        if self._counts[:n].max() == self._tokens.shape[1]:
            more = ((0, 0), (0, self._tokens.shape[1]))
            self._tokens, self._logprobs = np.pad(self._tokens, more), np.pad(self._logprobs, more)
        places = (np.arange(n), self._counts[:n])
        self._tokens[places] = ids
        if self._sampling.logprobs:
            self._logprobs[places] = token_logprobs(logits_bv, ids_b).cpu().numpy()
        self._counts[:n] += 1
        self._lengths[:n] += 1

    def _match_stop_strings(self, n: int, ids: np.ndarray) -> np.ndarray:
        """Which rows' bytes now contain a stop string; a match always ends in the newest token."""
        matched = np.zeros(n, bool)
        if self._stop:
            for row in range(n):
                tail = self._tails[row] + self._tokenizer.token_bytes(int(ids[row]))
                matched[row] = any(text in tail for text in self._stop)
                self._tails[row] = tail[-self._tail_bytes :] if self._tail_bytes else b""
        return matched

    def _drawn(self, row: int) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
        count = int(self._counts[row])
        tokens = tuple(self._tokens[row, :count].tolist())
        if not self._sampling.logprobs:
            return tokens, None
        return tokens, tuple(self._logprobs[row, :count].tolist())

    def _finish(self, row: int, stopped: bool) -> Finished:
        tokens, logprobs = self._drawn(row)
        return Finished(int(self._owners[row]), tokens, logprobs, "stop" if stopped else "length")

    def _compact(self, n: int, ended: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Moves the last active rows into the places of those that ended."""
        self.num_active = n - int(ended.sum())
        holes = np.flatnonzero(ended[: self.num_active])
        movers = self.num_active + np.flatnonzero(~ended[self.num_active :])
        if len(holes):
            for array in self._arrays():
                array[holes] = array[movers]
            ids = ids.copy()
            ids[holes] = ids[movers]
            length = int(self._lengths[movers].max())
            self._cache.move_rows(self._index(holes), self._index(movers), length)
        return ids[: self.num_active]

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self._owners,
            self._lengths,
            self._counts,
            self._limits,
            self._tokens,
            self._logprobs,
            self._uniforms,
            self._keys,
            self._tails,
        )

    def _forward(self, ids: np.ndarray) -> None:
        n = self.num_active
        positions = self._lengths[:n] - 1
        x_btd = self._fused.hidden(
            self._index(ids)[:, None],
            self._index(positions)[:, None],
            self._cache,
            attended_slots(int(positions.max())),
        )
        self._x_bd[:n] = x_btd[:, 0]

    def _refuse(self, row: int) -> None:
        raise NonFiniteLogits(
            f"{self._name(int(self._owners[row]))}, token {int(self._counts[row])}: the model's "
            "logits are NaN or infinite; its weights are damaged, or its training diverged: look "
            "at the training's loss and load an earlier checkpoint"
        )
