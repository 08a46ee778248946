"""From the last layer's output to tokens: logits, masks, draws, log-probabilities, ends.

`chooser.draw(rows, index, x)` adds a token to rows and says which end; `chooser.score(...)` gives
the log-probabilities of tokens that were given. Nothing is written.

Shapes: b rows, n tokens, d model dim, v vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phiforge.inference.engine.answer import Answer, text_bytes
from phiforge.inference.engine.constrain import check_mask
from phiforge.inference.engine.rows import Rows
from phiforge.inference.engine.runner import Runner
from phiforge.inference.engine.sample import NonFiniteLogits, draw, token_logprobs, top_logprobs
from phiforge.inference.interface import FinishReason, PromptTokenizer

_LOGITS = 1 << 25  # logits of scored tokens held at a time (fp32: 128 MiB)
DAMAGED = (
    "the model's logits are NaN or infinite; its weights are damaged, or its training diverged: "
    "look at the training's loss and load an earlier checkpoint"
)


def damaged(answer: Answer, count: int) -> NonFiniteLogits:
    """The error of an answer whose token `count` could not be computed."""
    place = answer.name if answer.closed else f"{answer.name}, token {count}"
    return NonFiniteLogits(f"{place}: {DAMAGED}")


class Chooser:
    """What ends an answer, and the runner's logits."""

    def __init__(self, runner: Runner, tokenizer: PromptTokenizer) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._draw = getattr(runner, "draw", draw)  # a runner may bring a faster one
        self._vocab_size = runner.config.vocab_size
        self._is_stop = np.zeros(self._vocab_size, bool)
        self._is_stop[[i for i in tokenizer.stop_ids if i < self._vocab_size]] = True

    def tail(self, answer: Answer) -> bytes:
        """The last bytes of an answer so far, if it has stop strings."""
        if not answer.sampling.stop or not answer.tokens:
            return b""
        data = b"".join(text_bytes(self._tokenizer, token) for token in answer.tokens)
        return _last(data, answer)

    def draw(
        self, state: Rows, rows: np.ndarray, x: Tensor
    ) -> tuple[dict[int, FinishReason], dict[int, Exception]]:
        """Draws and records a token for each of `rows`; (rows that end, rows that cannot draw)."""
        logits_bv = self._logits(state, rows, state.length[rows] - 1, x)
        failed: dict[int, Exception] = {}
        masked_bv = logits_bv
        if state.has_mask[rows].any():
            masked_bv, failed = self._mask(state, rows, logits_bv)
        uniforms_b = state.next_uniforms(rows)
        ids_b, finite_b = self._draw(masked_bv, state.laws.take(rows), uniforms_b)
        logprobs = None
        if state.wants_logprobs[rows].any():
            logprobs = token_logprobs(logits_bv, ids_b).cpu().numpy()
        ids, finite = ids_b.cpu().numpy(), finite_b.cpu().numpy()
        if state.num_top[rows].any():
            self._tell_top(state, rows, state.count[rows], logits_bv)
        if not finite.all():
            for row in rows[~finite].tolist():
                failed.setdefault(row, damaged(state.answers[row], int(state.count[row])))
        if failed:
            fine = ~np.isin(rows, list(failed))
            rows, ids = rows[fine], ids[fine]
            logprobs = None if logprobs is None else logprobs[fine]
        if not len(rows):
            return {}, failed
        state.record(rows, ids, logprobs)
        return self._ended(state, rows, ids, logprobs), failed

    def score(self, state: Rows, rows: np.ndarray, x: Tensor) -> dict[int, Exception]:
        """Fills in the log-probabilities that answers owe of tokens given to them."""
        owed = [(row, self._owed(state, row)) for row in rows.tolist()]
        rows_n = np.concatenate([np.full(len(places), row) for row, places in owed])
        places_n = np.concatenate([places for _, places in owed])
        firsts = np.array([len(answer.prompt_ids) for answer in state.answers])
        targets_n = state.tokens[rows_n, places_n]
        values = np.zeros(len(rows_n), np.float32)
        most = max(16, _LOGITS // self._vocab_size)
        for start in range(0, len(rows_n), most):
            part = slice(start, start + most)
            positions = firsts[rows_n[part]] - 1 + places_n[part]
            logits_nv = self._logits(state, rows_n[part], positions, x)
            told = [state.answers[row].score_temperature for row in rows_n[part]]
            if any(temperature != 1.0 for temperature in told):
                logits_nv = (
                    logits_nv.float() / logits_nv.new_tensor(told, dtype=torch.float32)[:, None]
                )
            ids_n = torch.from_numpy(targets_n[part].astype(np.int64)).to(logits_nv.device)
            values[part] = token_logprobs(logits_nv, ids_n).cpu().numpy()
            if state.num_top[rows_n[part]].any():
                self._tell_top(state, rows_n[part], places_n[part], logits_nv)
        state.logprobs[rows_n, places_n] = values
        state.owes_logprobs[rows] = False
        failed: dict[int, Exception] = {}
        for row, places in owed:
            answer, mine = state.answers[row], state.logprobs[row, places]
            answer.logprobs += mine.tolist()
            if np.isnan(mine).any():
                failed[row] = damaged(answer, int(places[np.isnan(mine)][0]))
        return failed

    def _tell_top(
        self, state: Rows, rows: np.ndarray, places: np.ndarray, logits_nv: Tensor
    ) -> None:
        """Notes the likeliest tokens at places of those `rows` that asked for them."""
        index = np.flatnonzero(state.num_top[rows])
        wanted_nv = logits_nv[torch.from_numpy(index).to(logits_nv.device)]
        found = top_logprobs(wanted_nv, state.num_top[rows[index]].tolist())
        for row, place, top in zip(rows[index], places[index], found, strict=True):
            state.answers[row].top_logprobs[place:] = [top]  # a step done again tells it again

    def _owed(self, state: Rows, row: int) -> np.ndarray:
        return np.arange(len(state.answers[row].logprobs), state.count[row])

    def _logits(self, state: Rows, rows: np.ndarray, positions: np.ndarray, x: Tensor) -> Tensor:
        """Logits [n, v] after given positions of rows."""
        slots = torch.from_numpy(state.slots(rows, positions)).to(x.device)
        return self._runner.logits(x.view(-1, x.shape[-1]).index_select(0, slots))

    def _mask(
        self, state: Rows, rows: np.ndarray, logits_bv: Tensor
    ) -> tuple[Tensor, dict[int, Exception]]:
        """The logits with forbidden tokens at -inf; an answer whose mask is of no use fails."""
        masked_bv, failed = logits_bv.clone(), {}
        for place in np.flatnonzero(state.has_mask[rows]).tolist():
            row = int(rows[place])
            answer = state.answers[row]
            assert answer.mask is not None
            drawn = tuple(state.tokens[row, : state.count[row]].tolist())
            try:
                allowed = check_mask(answer.mask(drawn), self._vocab_size, answer.name)
            except Exception as error:  # the caller's code: its own request fails, no other
                failed[row] = error
                continue
            if allowed is not None:
                forbidden = torch.from_numpy(~allowed).to(logits_bv.device)
                masked_bv[place].masked_fill_(forbidden, -torch.inf)
        return masked_bv, failed

    def _ended(
        self, state: Rows, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray | None
    ) -> dict[int, FinishReason]:
        """Which rows end with the token just recorded; streamed answers get it."""
        stopped = self._is_stop[ids]
        for place in np.flatnonzero(state.has_stop[rows]).tolist():
            stopped[place] |= self._meets_stop(state, int(rows[place]), int(ids[place]))
        for place in np.flatnonzero(state.is_streamed[rows]).tolist():
            answer = state.answers[rows[place]]
            answer.tokens.append(int(ids[place]))
            if answer.sampling.logprobs and logprobs is not None:
                answer.logprobs.append(float(logprobs[place]))
        over = stopped | (state.count[rows] >= state.limit[rows])
        return {
            int(rows[place]): "stop" if stopped[place] else "length"
            for place in np.flatnonzero(over).tolist()
        }

    def _meets_stop(self, state: Rows, row: int, token: int) -> bool:
        """Whether the text now holds a stop string; a match always ends in the newest token."""
        answer = state.answers[row]
        data = state.tails[row] + text_bytes(self._tokenizer, token)
        state.tails[row] = _last(data, answer)
        return any(stop.encode() in data for stop in answer.sampling.stop)


def _last(data: bytes, answer: Answer) -> bytes:
    """As many last bytes as a stop string might have begun in."""
    longest = max(len(stop.encode()) for stop in answer.sampling.stop)
    return data[max(0, len(data) - longest + 1) :]
