"""The engine's front: `Engine(model, tokenizer)` checks requests, plans them and runs them.

`generate` fills up to `rows` rows and replaces each finished one by the next sample that waits;
`score` and `submit` use the same parts. Nothing is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from phiforge.inference.engine.batch import Batch, Finished, Start
from phiforge.inference.engine.cache import KVCache, default_cache_tokens, round_slots
from phiforge.inference.engine.forward import ROW_BLOCK, Fused, stamp
from phiforge.inference.engine.prefill import PromptPool
from phiforge.inference.engine.prefix import TokenIds, plan
from phiforge.inference.engine.sample import prompt_digest, stream_key
from phiforge.inference.engine.score import score
from phiforge.inference.engine.stream import Stream, to_completion
from phiforge.inference.interface import (
    Completion,
    Progress,
    Prompt,
    Request,
    Sampling,
    check_count,
    check_known,
    check_token_ids,
    prompt_token_ids,
    stop_strings,
)
from phiforge.model.phi import Phi

_PREFILL_SLOTS = 16384  # cache slots of prompts computed at a time, memory permitting


class Engine:
    """Samples and scores with a model on its own device, in its compute dtype.

    `rows`: most samples at a time. `mode` "exact": a sample is the same bits whatever else is
    asked for in the same call, on one machine and thread count (measured on CPU kernels); "fast"
    drops the padding and the reduction order this takes. `max_cache_tokens` bounds the cache of
    the rows and of the prompts being computed (default: half the free memory); prefixes kept for
    later prompts come on top, one row each. It moves time, never results.

    `num_prefilled_tokens` and `num_generated_tokens` count the work done so far. Weights are copied
    on first use, and again when the model has changed.
    """

    def __init__(
        self,
        model: Phi,
        tokenizer: Any,
        rows: int = 256,
        mode: Literal["exact", "fast"] = "exact",
        max_cache_tokens: int | None = None,
    ) -> None:
        check_count("rows", rows, 1)
        if mode not in ("exact", "fast"):
            raise ValueError(f"mode is {mode!r}; allowed: 'exact', 'fast'")
        if max_cache_tokens is not None:
            check_count("max_cache_tokens", max_cache_tokens, 1)
        self.model, self.tokenizer = model, tokenizer
        self.rows, self.mode, self.max_cache_tokens = rows, mode, max_cache_tokens
        self.num_prefilled_tokens = 0
        self.num_generated_tokens = 0
        self._fused: Fused | None = None
        self._spare: KVCache | None = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        first_index: int = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """For each prompt its samples `first_index` .. `first_index + n - 1`, in order.

        Settings as in `Sampling`; sample i is a function of (seed, the prompt's token ids, i)
        alone. `logprobs` are the model's at temperature 1, in fp32. `progress(k)` is called as k
        more of the len(prompts) x n completions are done. Raises ValueError for a wrong setting or
        prompt, naming it; NonFiniteLogits for a damaged model.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop_strings(stop),
            logprobs=logprobs,
        )
        check_count("n", n, 1)
        check_count("first_index", first_index, 0)
        fused = self._fresh()
        ids = self._checked_prompts(prompts, fused)
        if not ids:
            return []
        asked: dict[TokenIds, list[int]] = {}
        for number, prompt in enumerate(ids):
            asked.setdefault(prompt, []).append(number)
        indices = range(first_index, first_index + (1 if temperature == 0.0 else n))
        results: list[list[Completion]] = [[] for _ in ids]
        jobs = _Jobs(sorted(asked), asked, indices, seed)
        found: dict[int, Completion] = {}
        for finished in self._decode(fused, jobs, sampling):
            found[finished.owner] = to_completion(self.tokenizer, finished, sampling)
            self.num_generated_tokens += len(finished.token_ids)
            if progress is not None:
                progress(len(jobs.numbers(finished.owner)) * (n // len(indices)))
        for place, prompt in enumerate(jobs.prompts):
            mine = [found[place * len(indices) + k] for k in range(len(indices))]
            for number in asked[prompt]:
                results[number] = mine * (n // len(indices))
        return results

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability of each completion token given all before it, temperature 1, fp32.

        The same numbers, in exact mode to the bit, as `generate` returns. Raises ValueError for an
        unknown token or a sequence longer than the model's context.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"score: {len(prompts)} prompts but {len(completions)} completions; give one each"
            )
        fused = self._fresh()
        ids = self._checked_prompts(prompts, fused, room=0)
        answers = [tuple(int(token) for token in completion) for completion in completions]
        for number, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
            check_known(f"completion {number}", answer, fused.config.vocab_size)
            check_token_ids(
                f"prompt {number} with its completion",
                prompt + answer,
                fused.config.vocab_size,
                fused.context,
                room=0,
            )
        values, num_computed = score(fused, ids, answers, self._prefill_slots(fused, 0))
        self.num_prefilled_tokens += num_computed
        return values

    def submit(self, request: Request) -> Stream:
        """Streams one answer: an iterator of `Token`s with `.cancel()` and `.completion`.

        Each step computes one token for this request alone. Raises ValueError at once for a wrong
        setting or prompt.
        """
        sampling = request.sampling
        check_count("index", request.index, 0)
        fused = self._fresh()
        prompt = self._checked_prompts([request.prompt], fused)[0]

        def begin() -> Batch:
            jobs = _Jobs(
                [prompt], {prompt: [0]}, range(request.index, request.index + 1), request.seed
            )
            slots = self._row_slots(fused, jobs, sampling)
            self._rows_that_fit(fused, slots, 1)
            cache = KVCache(fused.config, 1, slots, fused.dtype, fused.device)
            batch = Batch(fused, self.tokenizer, sampling, cache, jobs.name)
            pool = PromptPool(fused, plan(jobs.prompts), self._prefill_slots(fused, slots))
            batch.admit([jobs.start(0, pool, fused, sampling)])
            self.num_prefilled_tokens += pool.num_computed_tokens
            return batch

        return Stream(begin, self.tokenizer, sampling)

    def _fresh(self) -> Fused:
        """The weights as the engine multiplies them; copied anew when the model has changed."""
        if self._fused is None or self._fused.stamp != stamp(self.model):
            self._fused = None
            self._fused = Fused(self.model, exact=self.mode == "exact")
            if self.mode == "exact" and self._fused.device.type != "cpu":
                warnings.warn(
                    "mode 'exact' was measured on CPU kernels only; on this device a sample's last "
                    "bits may depend on its batch",
                    stacklevel=3,
                )
        return self._fused

    def _checked_prompts(
        self, prompts: Sequence[Prompt], fused: Fused, room: int = 1
    ) -> list[TokenIds]:
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of prompts: [text]")
        ids = [prompt_token_ids(self.tokenizer, prompt) for prompt in prompts]
        for number, prompt in enumerate(ids):
            name = f"prompt {number}"
            check_token_ids(name, prompt, fused.config.vocab_size, fused.context, room)
        return ids

    def _decode(self, fused: Fused, jobs: _Jobs, sampling: Sampling) -> Iterator[Finished]:
        slots = self._row_slots(fused, jobs, sampling)
        rows = self._rows_that_fit(fused, slots, min(self.rows, jobs.num_samples))
        cache = self._take_cache(fused, rows, slots)
        batch = Batch(fused, self.tokenizer, sampling, cache, jobs.name)
        pool = PromptPool(fused, plan(jobs.prompts), self._prefill_slots(fused, rows * slots))
        next_sample = 0
        while next_sample < jobs.num_samples or batch.num_active:
            last = min(jobs.num_samples, next_sample + batch.num_free)
            if last > next_sample:
                wanted = range(next_sample, last)
                batch.admit([jobs.start(owner, pool, fused, sampling) for owner in wanted])
                next_sample = last
            yield from batch.step()
        self.num_prefilled_tokens += pool.num_computed_tokens
        self._spare = cache

    def _cache_tokens(self, fused: Fused) -> int:
        if self.max_cache_tokens is not None:
            return self.max_cache_tokens
        return default_cache_tokens(fused.config, fused.dtype, fused.device)

    def _row_slots(self, fused: Fused, jobs: _Jobs, sampling: Sampling) -> int:
        return round_slots(max(len(p) + jobs.limit(p, fused, sampling) for p in jobs.prompts))

    def _rows_that_fit(self, fused: Fused, slots: int, rows: int) -> int:
        """Rows of the cache beside one prompt being computed; a quarter is left for prompts."""
        total = self._cache_tokens(fused)
        if 2 * slots > total:
            raise ValueError(
                f"max_cache_tokens is {total}, but one sample (prompt and answer, rounded up to "
                f"{slots} tokens) and its prompt's computation need {2 * slots}: raise "
                "max_cache_tokens or lower max_tokens"
            )
        return max(1, min(rows, (total - total // 4) // slots))

    def _prefill_slots(self, fused: Fused, taken: int) -> int:
        return max(ROW_BLOCK, min(_PREFILL_SLOTS, self._cache_tokens(fused) - taken))

    def _take_cache(self, fused: Fused, rows: int, slots: int) -> KVCache:
        """The cache of the call before, if it is large enough; it goes back after the call."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.fits(rows, slots, fused.dtype, fused.device):
            return spare
        return KVCache(fused.config, rows, slots, fused.dtype, fused.device)


class _Jobs:
    """The samples of one call, in the order they start: prompts sorted, indices ascending."""

    def __init__(
        self,
        prompts: list[TokenIds],
        asked: dict[TokenIds, list[int]],
        indices: range,
        seed: int,
    ) -> None:
        self.prompts, self._asked, self._indices = prompts, asked, indices
        self._digests = [prompt_digest(seed, prompt) for prompt in prompts]

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * len(self._indices)

    def numbers(self, owner: int) -> list[int]:
        """Which of the caller's prompts a sample answers."""
        return self._asked[self.prompts[owner // len(self._indices)]]

    def name(self, owner: int) -> str:
        """How errors call a sample."""
        index = self._indices[owner % len(self._indices)]
        return f"prompt {self.numbers(owner)[0]}, sample {index}"

    def limit(self, prompt: TokenIds, fused: Fused, sampling: Sampling) -> int:
        """Most tokens a sample may draw."""
        return min(sampling.max_tokens, fused.context - len(prompt))

    def start(self, owner: int, pool: PromptPool, fused: Fused, sampling: Sampling) -> Start:
        """What the batch needs to begin a sample; a prompt is let go with its last one."""
        number, place = divmod(owner, len(self._indices))
        prefix, x_d = pool.take(number)
        if place == len(self._indices) - 1:
            pool.release(number)
        prompt = self.prompts[number]
        key = stream_key(self._digests[number], self._indices[place])
        return Start(owner, key, len(prompt), self.limit(prompt, fused, sampling), prefix, x_d)
