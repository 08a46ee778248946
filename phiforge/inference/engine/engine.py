"""The engine's front: `Engine(model, tokenizer)` checks requests and drives the scheduler.

`generate` and `score` answer whole calls, `submit` streams one request; all share the rows of one
scheduler, from any thread. Which kernels run is printed once to standard error.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from phiforge.inference.engine.answer import Answer
from phiforge.inference.engine.constrain import forbid_first
from phiforge.inference.engine.memory import free_bytes
from phiforge.inference.engine.requests import Bounds, Call
from phiforge.inference.engine.runner import BLOCK, Kernels, Mode, Runner, make_runner, why_torch
from phiforge.inference.engine.sample import prompt_digest, stream_key
from phiforge.inference.engine.scheduler import Scheduler
from phiforge.inference.engine.stream import Stream
from phiforge.inference.engine.turns import Turns
from phiforge.inference.engine.weights import Weights, from_model, stamp
from phiforge.inference.interface import (
    Completion,
    PerPrompt,
    Progress,
    Prompt,
    Request,
    Sampling,
    TokenMask,
    check_count,
    sample_spans,
    stop_strings,
)
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.quantize import Format, check_format


class Engine:
    """Samples and scores with a model on its own device.

    `rows`: most samples at a time. `weights`: the format matrices are kept in ("fp32", "bf16",
    "int8", "int4"; None: the model's compute dtype). `kernels`: "auto" takes own C++ kernels on a
    CPU where they compile, else torch's; "native" and "torch" insist. `mode` "exact": a sample is
    the same bits whatever else is asked for, on one machine (torch's kernels: on CPUs, at one
    thread count); "fast" lets torch's kernels drop the padding and order this takes.
    `max_cache_tokens` bounds the cache of prompts and answers (default: what the rows can use, at
    most half the free memory). It moves time, never results.

    `num_prefilled_tokens` of prompts were computed, `num_cached_tokens` found in the cache,
    `num_generated_tokens` drawn so far. Weights are copied on first use, and again when the model
    has changed; requests under way then go on with the new ones. Threads may share an engine.
    """

    def __init__(
        self,
        model: Phi,
        tokenizer: Any,
        rows: int = 256,
        mode: Mode = "exact",
        max_cache_tokens: int | None = None,
        weights: Format | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        self._set_up(tokenizer, rows, mode, max_cache_tokens, weights, kernels)
        self.model: Phi | None = model
        self.config: PhiConfig = model.config

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        rows: int = 256,
        mode: Mode = "exact",
        max_cache_tokens: int | None = None,
        weights: Format | None = None,
        kernels: Kernels = "auto",
        device: str | torch.device = "cpu",
        tokenizer: Any = None,
    ) -> Engine:
        """An engine on a Hugging Face folder or Hub name, whose matrices are read and packed one
        by one, on `device`.

        `weights` None keeps the file's format, `tokenizer` None takes the folder's. Raises what
        reading the folder raises.
        """
        from phiforge.inference.engine.weights import from_folder
        from phiforge.model.huggingface import resolve_folder
        from phiforge.model.tokenizer import Tokenizer

        engine = cls.__new__(cls)
        folder = resolve_folder(folder)
        tokenizer = Tokenizer.load(folder) if tokenizer is None else tokenizer
        engine._set_up(tokenizer, rows, mode, max_cache_tokens, weights, kernels)
        engine.model = None
        loaded = from_folder(folder, weights, device)
        engine.config = loaded.config
        engine._take_weights(loaded)
        return engine

    def _set_up(
        self,
        tokenizer: Any,
        rows: int,
        mode: Mode,
        max_cache_tokens: int | None,
        weights: Format | None,
        kernels: Kernels,
    ) -> None:
        check_count("rows", rows, 1)
        _check_choice("mode", mode, ("exact", "fast"))
        _check_choice("kernels", kernels, ("auto", "native", "torch"))
        if max_cache_tokens is not None:
            check_count("max_cache_tokens", max_cache_tokens, 1)
        if weights is not None:
            check_format(weights)
        self.tokenizer, self.rows = tokenizer, rows
        self.mode: Mode = mode
        self.kernels: Kernels = kernels
        self.weights: Format | None = weights
        self.max_cache_tokens = max_cache_tokens
        self.lock = Turns()
        self._scheduler: Scheduler | None = None
        self._stamp: tuple[object, ...] | None = None
        self._num_requests = 0

    @property
    def name(self) -> str:
        """What computes, e.g. "native bf16 (avx512_bf16)"."""
        return self._fresh().runner.name

    @property
    def context(self) -> int:
        """The longest row, prompt and answer, in tokens."""
        return self.config.max_position_embeddings

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return self._scheduler.num_prefilled_tokens if self._scheduler else 0

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the cache so far."""
        return self._scheduler.num_cached_tokens if self._scheduler else 0

    @property
    def num_generated_tokens(self) -> int:
        """Tokens drawn so far."""
        return self._scheduler.num_generated_tokens if self._scheduler else 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: PerPrompt = 1,
        max_tokens: PerPrompt = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        first_index: PerPrompt = 0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        progress: Progress | None = None,
        forced: Sequence[Sequence[int]] | None = None,
        masks: Sequence[TokenMask | None] | None = None,
        forbidden_first: Sequence[Collection[int]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt its samples `first_index` .. `first_index + n - 1`, in order.

        Settings as in `Sampling`; sample i is a function of (seed, the prompt's token ids, i),
        of its forced tokens and its mask. `forced`: for each prompt the tokens every answer begins
        with; they count toward `max_tokens`, and the draws after them are those the sample would
        have made at these places. `masks`: for each prompt None or a mask (constrain.py);
        `forbidden_first`: the token ids that the first drawn token must not be, as masks.
        `logprobs` are the model's at temperature 1, in fp32, before masks. `progress(k)` is called
        as k more of the len(prompts) x n completions are done.

        Raises ValueError for a wrong setting or prompt, naming it; NonFiniteLogits for a damaged
        model; whatever a mask raises.
        """
        spans = sample_spans(n, first_index, max_tokens, len(prompts))
        sampling = Sampling(
            max_tokens=max((span.max_tokens for span in spans), default=1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop_strings(stop),
            logprobs=logprobs,
        )
        with self.lock:
            bounds = self._bounds()
            ids = bounds.prompts(prompts)
            starts = _one_each("forced", forced, len(ids), ())
            if forbidden_first is not None:
                if masks is not None:
                    raise ValueError("give masks or forbidden_first, not both")
                masks = [forbid_first(tokens) if tokens else None for tokens in forbidden_first]
            rules = _one_each("masks", masks, len(ids), None)
            call = self._new_call(bounds)
            for prompt, span, start, mask in zip(ids, spans, starts, rules, strict=True):
                law = span.of(sampling)
                call.ask(prompt, law, seed, span.indices, start, mask)
        self._drive(call, progress)
        return call.completions()

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Log-probability of each completion token given all before it, in fp32.

        At temperature 1 the same numbers, in exact mode to the bit, as `generate` returns; else
        those of a sampler at `temperature`. Raises ValueError for an unknown token, a sequence
        longer than the model's context, or a temperature of 0; NonFiniteLogits.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; scores need one above 0")
        if len(prompts) != len(completions):
            raise ValueError(
                f"score: {len(prompts)} prompts but {len(completions)} completions; give one each"
            )
        sampling = Sampling(max_tokens=self.context, logprobs=True)
        with self.lock:
            bounds = self._bounds()
            ids = bounds.prompts(prompts, room=0)
            call = self._new_call(bounds)
            for prompt, completion in zip(ids, completions, strict=True):
                call.ask_score(prompt, completion, sampling, temperature)
        self._drive(call, None)
        return call.logprobs()

    def submit(self, request: Request) -> Stream:
        """Streams one answer; it joins the rows under way at the next step.

        An iterator of `Token`s, see `Stream`. Raises ValueError at once for a wrong setting or
        prompt, or a request that the cache could never hold.
        """
        sampling = request.sampling
        check_count("index", request.index, 0)
        with self.lock:
            bounds = self._bounds()
            (prompt,) = bounds.prompts([request.prompt])
            self._num_requests += 1
            answer = bounds.answer(
                prompt,
                sampling,
                stream_key(prompt_digest(request.seed, prompt), request.index),
                f"request {self._num_requests}",
                (0, self._num_requests, 0),
                request.forced,
                request.mask,
            )
            return self._stream(answer)

    def submit_score(
        self, prompt: Prompt, completion: Sequence[int], top_logprobs: int = 0
    ) -> Stream:
        """`score` of one completion as a stream, so that it is computed beside the requests under
        way: its `completion` has the log-probabilities, and those of the likeliest tokens.

        Raises ValueError at once, as `score` does.
        """
        sampling = Sampling(max_tokens=self.context, logprobs=True, top_logprobs=top_logprobs)
        with self.lock:
            bounds = self._bounds()
            (ids,) = bounds.prompts([prompt], room=0)
            self._num_requests += 1
            order = (0, self._num_requests, 0)
            return self._stream(bounds.given(ids, completion, sampling, 0, order))

    def _stream(self, answer: Answer) -> Stream:
        answer.streamed = True
        if answer.closed and not answer.owes_logprobs:
            answer.finish(answer.closed)
        else:
            self._fresh().submit([answer])
        return Stream(self, self.tokenizer, answer)

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass for all submitted requests; False when nothing is active."""
        with self.lock:
            return self._scheduler is not None and self._scheduler.step()

    def cancel(self, answers: Iterable[Answer]) -> None:
        """Ends answers that are not done."""
        with self.lock:
            if self._scheduler is not None:
                self._scheduler.cancel(answers)

    def _bounds(self) -> Bounds:
        cache_tokens = self._fresh().num_blocks * BLOCK
        return Bounds(self.tokenizer, self.config.vocab_size, self.context, cache_tokens)

    def _new_call(self, bounds: Bounds) -> Call:
        self._num_requests += 1
        return Call(bounds, self._num_requests)

    def _drive(self, call: Call, progress: Progress | None) -> None:
        """Steps until a call's answers are done; ends them all when one fails or is interrupted."""
        answers = call.begin()
        try:
            with self.lock:
                self._fresh().submit(answers)
            call.collect(progress)
            while call.is_open:
                active = self.step()
                call.collect(progress)
                assert active or not call.is_open, "nothing is under way, but answers are missing"
        finally:
            if call.is_open:
                self.cancel(answers)

    def _fresh(self) -> Scheduler:
        """The scheduler over the model's weights as they are now."""
        with self.lock:
            if self.model is not None and self._stamp != (now := stamp(self.model)):
                if self._scheduler is not None:
                    self._scheduler.put_all_off()
                self._take_weights(from_model(self.model, self.weights))
                self._stamp = now
            assert self._scheduler is not None
            return self._scheduler

    def _take_weights(self, weights: Weights) -> None:
        runner = make_runner(weights, self.mode, self.kernels)
        reason = why_torch(weights, self.kernels)
        _announce(f"engine: {runner.name}" + (f" ({reason})" if reason else ""))
        if self.mode == "exact" and not runner.mode_is_exact:
            warnings.warn(
                "mode 'exact' was measured on CPU kernels only; on this device a sample's last "
                "bits may depend on its batch",
                stacklevel=4,
            )
        num_blocks = self._num_blocks(runner)
        if self._scheduler is None:
            self._scheduler = Scheduler(runner, self.tokenizer, self.rows, num_blocks)
        else:
            self._scheduler.start(runner, num_blocks)

    def _num_blocks(self, runner: Runner) -> int:
        if self.max_cache_tokens is not None:
            return max(1, self.max_cache_tokens // BLOCK)
        per_block = runner.block_bytes + BLOCK * self.config.hidden_size * runner.dtype.itemsize
        affordable = free_bytes(runner.device) // 2 // per_block
        useful = (self.rows + self.rows // 4 + 1) * -(-self.context // BLOCK)
        return max(1, min(affordable, useful))


def _one_each(name: str, given: Sequence[Any] | None, count: int, missing: Any) -> Sequence[Any]:
    """One value per prompt; ValueError when there are more or fewer."""
    if given is None:
        return [missing] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; give one each")
    return given


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


@functools.cache
def _announce(line: str) -> None:
    """Says which kernels run, once per process and choice."""
    print(line, file=sys.stderr, flush=True)
