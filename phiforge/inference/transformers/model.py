"""Any causal language model of `transformers` as a generator, `TransformersModel(model, tokenizer)`

`generate` and `score` as our engine's, with its random numbers: on the same fp32 weights, the same
tokens. A prompt is computed once for its samples and for prompts that are its beginnings; where an
architecture refuses that, prompt by prompt, said once. Nothing is written.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from phiforge.inference.engine.constrain import Constraint, forbid_first
from phiforge.inference.engine.requests import Bounds, Call
from phiforge.inference.interface import (
    Completion,
    PerPrompt,
    Progress,
    Prompt,
    Sampling,
    check_count,
    sample_spans,
    stop_strings,
)
from phiforge.inference.transformers.batch import AloneBatch, Batch, SharedBatch, why_not_cached
from phiforge.inference.transformers.network import Network
from phiforge.inference.transformers.sampling import draw_all
from phiforge.inference.transformers.scoring import score_alone, score_shared
from phiforge.inference.transformers.tokenizer import wrap_tokenizer


class TransformersModel:
    """A Generator (`phiforge.inference.interface`) on a loaded model, on its own device.

    `tokenizer`: one of `transformers`, or any PromptTokenizer. `rows`: most samples at a time; a
    row holds a copy of its prompt's keys and values, so memory grows with rows x tokens.
    `prefix_tokens`: prompts' tokens whose keys and values are kept between calls.

    Sample i is a function of (seed, the prompt's token ids, i) up to the rounding of the model's
    products, which may depend on the batch. `num_prefilled_tokens` of prompts were computed (the
    last of each once more, with its samples), `num_generated_tokens` drawn so far. Threads may
    share it. Raises ValueError for an encoder-decoder, or when no token would end an answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, rows: int = 64, prefix_tokens: int = 16_384
    ) -> None:
        _require_transformers()
        check_count("rows", rows, 1)
        check_count("prefix_tokens", prefix_tokens, 0)
        self.model, self.rows = model, rows
        self._network = Network(model)
        vocab_size = self._network.vocab_size
        self.tokenizer = wrap_tokenizer(tokenizer, vocab_size, _stop_ids(model))
        self._prefix_tokens = prefix_tokens
        self._prefixes: Any = None
        self._alone: AloneBatch | None = None
        self._stamp: tuple[object, ...] | None = None
        self._lock = threading.RLock()
        self._num_calls = 0
        self.num_generated_tokens = 0

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        rows: int = 64,
        **options: Any,
    ) -> TransformersModel:
        """A model of a Hugging Face folder or Hub name.

        `dtype` "auto" keeps the file's; `options` go to `AutoModelForCausalLM.from_pretrained`.
        Chats and texts become the token ids that our engine gives them, where the folder has a
        tokenizer.json. Raises what `transformers` raises for a folder it cannot read.
        """
        transformers = _require_transformers()
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        if "device_map" not in options:
            model = model.to(device)
        return cls(model.eval(), _tokenizer_of(path), rows)

    @property
    def name(self) -> str:
        """What computes, e.g. "transformers Phi3ForCausalLM float32 cpu"."""
        return f"transformers {self._network.name}"

    @property
    def context(self) -> int:
        """The longest row, prompt and answer, in tokens."""
        return self._network.context

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed so far."""
        shared = self._prefixes.num_computed if self._prefixes else 0
        return shared + (self._alone.num_computed if self._alone else 0)

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
        forbidden_first: Sequence[Collection[int]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt its samples `first_index` .. + `n` - 1 (`Generator.generate`).

        Settings as in `Sampling`; `logprobs` are the model's at temperature 1, before filters and
        `forbidden_first`. Raises ValueError for a wrong setting or prompt, naming it;
        NonFiniteLogits for a damaged model.
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
        with self._running():
            bounds = self._bounds()
            ids = bounds.prompts(prompts)
            masks = _masks(forbidden_first, len(ids))
            call = Call(bounds, self._num_calls)
            for prompt, span, mask in zip(ids, spans, masks, strict=True):
                call.ask(prompt, span.of(sampling), seed, span.indices, (), mask)
            answers = call.begin()
            try:
                draw_all(
                    self._batch(),
                    answers,
                    sampling,
                    self.rows,
                    self.tokenizer,
                    lambda: call.collect(progress),
                )
            finally:
                self.num_generated_tokens += sum(len(answer.tokens) for answer in answers)
            call.collect(progress)
            return call.completions()

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Log-probability of each completion token given all before it, at `temperature`, in fp32.

        Raises ValueError for an unknown token, a sequence longer than the model's context, or a
        temperature that is not above 0; NonFiniteLogits.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"score: {len(prompts)} prompts but {len(completions)} completions; give one each"
            )
        if not 0.0 < temperature < 1e4:
            raise ValueError(f"temperature is {temperature!r}; allowed: above 0, below 1e4")
        sampling = Sampling(max_tokens=self.context, logprobs=True)
        with self._running():
            bounds = self._bounds()
            ids = bounds.prompts(prompts, room=0)
            call = Call(bounds, self._num_calls)
            for prompt, completion in zip(ids, completions, strict=True):
                call.ask_score(prompt, completion, sampling)
            answers = call.begin()
            if self._shared():
                score_shared(self._network, self._prefixes, answers, self.rows, temperature)
            else:
                score_alone(self._network, answers, temperature)
            call.collect()
            return call.logprobs()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One call at a time, without gradients and dropout; what is kept of other weights goes."""
        with self._lock, torch.inference_mode():
            training = self.model.training
            if training:
                self.model.eval()
            try:
                now = self._network.stamp()
                if self._stamp != now and self._prefixes is not None:
                    self._prefixes.clear()
                self._stamp = now
                self._num_calls += 1
                yield
            finally:
                if training:
                    self.model.train()

    def _bounds(self) -> Bounds:
        # Memory is bounded by rows, not by a cache of fixed size.
        return Bounds(self.tokenizer, self._network.vocab_size, self.context, sys.maxsize)

    def _shared(self) -> bool:
        """Whether prompts' caches are shared; tried out, and said where not, on first use."""
        if self._prefixes is None and self._alone is None:
            if (reason := self._network.why_not_shared()) is None:
                from phiforge.inference.transformers.cache import Prefixes

                self._prefixes = Prefixes(self._network, self._prefix_tokens)
            else:
                without = why_not_cached(self._network)
                self._alone = AloneBatch(self._network, cached=without is None)
                _announce(self.name, reason, without)
        return self._prefixes is not None

    def _batch(self) -> Batch:
        if self._shared():
            return SharedBatch(self._network, self._prefixes)
        assert self._alone is not None
        return self._alone


def _masks(
    forbidden_first: Sequence[Collection[int]] | None, count: int
) -> list[Constraint | None]:
    """For each prompt its mask, one object for equal ones, so that equal samples are drawn once."""
    if forbidden_first is None:
        return [None] * count
    if len(forbidden_first) != count:
        raise ValueError(
            f"forbidden_first has {len(forbidden_first)} entries for {count} prompts; give one each"
        )
    known: dict[frozenset[int], Constraint | None] = {frozenset(): None}
    for tokens in forbidden_first:
        ids = frozenset(int(token) for token in tokens)
        known.setdefault(ids, forbid_first(ids))
    return [known[frozenset(int(token) for token in tokens)] for tokens in forbidden_first]


def _stop_ids(model: Any) -> set[int]:
    """End tokens that the model's settings name."""
    found: set[int] = set()
    for settings in (getattr(model, "generation_config", None), model.config):
        ids = getattr(settings, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return found


def _tokenizer_of(path: str | Path) -> Any:
    """The folder's tokenizer: phiforge's where it can be, so that prompts become the same ids."""
    from phiforge.model.tokenizer import Tokenizer

    if (Path(path) / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    return _require_transformers().AutoTokenizer.from_pretrained(path)


def _require_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "models of `transformers` need the extra [transformers]: "
            "pip install 'phiforge[transformers]'"
        ) from error
    return transformers


@functools.cache
def _announce(name: str, reason: str, without: str | None) -> None:
    """Says once why a prompt's cache is not shared."""
    how = "each prompt by itself"
    if without is not None:
        how += f", and whole rows at every token, which is slow ({without})"
    print(f"{name}: no shared prompts ({reason}); computes {how}", file=sys.stderr, flush=True)
