"""The client of every OpenAI-compatible server: generate, score, chat, complete, stream, JSON.

`with Endpoint("http://127.0.0.1:8000/v1", "model", cache=Path("answers.sqlite")) as endpoint:
endpoint.generate(prompts, n=4)`. Answers and the usage ledger go to the cache file.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from phiforge.inference.endpoint import first_token, plan, structured
from phiforge.inference.endpoint.budget import Account, Budget, Prices, Usage
from phiforge.inference.endpoint.calls import (
    Answer,
    Call,
    Cut,
    Outcome,
    Result,
    all_answered,
)
from phiforge.inference.endpoint.job import Job
from phiforge.inference.endpoint.loop import LoopThread, Work
from phiforge.inference.endpoint.pace import Pace
from phiforge.inference.endpoint.scores import read_scores, score_calls
from phiforge.inference.endpoint.send import Patience, Sender
from phiforge.inference.endpoint.store import Store
from phiforge.inference.endpoint.transport import Access, Transport
from phiforge.inference.endpoint.wire import Prepared, Preparer, Server
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

DEFAULT_URL = "http://127.0.0.1:8000/v1"


class Endpoint:
    """A Generator (`phiforge.inference.interface`) over HTTP; usable from any thread.

    base_url, model   where it is and what it calls the model
    api_key_env, api_key_file   the key's environment variable, or file; neither: no key is sent
    key_header, headers, query  for Azure: "api-key", and {"api-version": "..."} as query
    tokenizer         counts tokens, renders chats for /completions, makes ids of texts
    chat              True: everything through /chat/completions; False: through /completions;
                      None: chat messages there, text and token ids here
    concurrency       most calls in flight; fewer while the server throttles
    cache             SQLite file of answers and of the ledger; None keeps neither
    budget, prices    hard limits of this `role` in this cache file; USD per million tokens
    timeout_seconds   of one attempt; `patience` says how many attempts
    base_model        the name answers are kept under (default: `model`)
    sends_seed        send a seed per sample; off for servers that refuse the field
    provider_n        ask for a prompt's missing samples in one call (the server's `n`)
    takes_schema      response_format json_schema: True, False (schema in the prompt), None (try)
    max_tokens_field  "max_completion_tokens" for servers whose chat API wants that name
    returns_token_ids ask for the drawn token ids (`return_token_ids`; phiforge serve, vLLM)
    extra_body        further fields of every request; part of the cache key
    max_error_share   a job stops when, of its first 20 or more calls, more than this share fails
    jitter_seed       seed of the waits between attempts

    Raises ValueError for settings that cannot work. Nothing is sent before the first call.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        model: str = "default",
        *,
        api_key_env: str | None = None,
        api_key_file: Path | None = None,
        key_header: str = "Authorization",
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        tokenizer: Any = None,
        chat: bool | None = None,
        concurrency: int = 64,
        cache: Path | str | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        role: str = "teacher",
        timeout_seconds: float = 600.0,
        patience: Patience | None = None,
        base_model: str | None = None,
        sends_seed: bool = True,
        provider_n: bool = False,
        takes_schema: bool | None = None,
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        returns_token_ids: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        max_error_share: float = 0.5,
        jitter_seed: int = 0,
    ):
        check_count("concurrency", concurrency, 1)
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds!r}; it must be above 0")
        if not 0 < max_error_share <= 1:
            raise ValueError(f"max_error_share is {max_error_share!r}; above 0, at most 1 (never)")
        access = Access(
            api_key_env, api_key_file, key_header, dict(headers or {}), dict(query or {})
        )
        self.model, self.role, self.tokenizer = model, role, tokenizer
        self._server = Server(
            model=model,
            base_model=base_model or model,
            chat=chat,
            sends_seed=sends_seed,
            provider_n=provider_n,
            max_tokens_field=max_tokens_field,
            returns_token_ids=returns_token_ids,
            extra_body=dict(extra_body or {}),
        )
        self._preparer = Preparer(self._server, tokenizer)
        self._transport = Transport(base_url, access, timeout_seconds, concurrency)
        self._store = Store(None if cache is None else Path(cache), role)
        self._account = Account(self._store, budget, prices)
        self._sender = Sender(
            self._server,
            tokenizer,
            self._transport,
            self._account,
            Pace(concurrency),
            patience or Patience(),
            random.Random(jitter_seed),
            takes_schema,
        )
        self._max_error_share = max_error_share
        self._thread = LoopThread()
        # Also runs when the interpreter ends: what arrived is committed.
        self._close = weakref.finalize(self, _close, self._thread, self._transport, self._store)

    def __repr__(self) -> str:
        return f"Endpoint({self._transport.shown_url!r}, {self.model!r}, role={self.role!r})"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs, commit, close connections and cache; may be called twice."""
        self._close()

    # ------------------------------------------------------------------------ many calls at once

    def answer(
        self, calls: Sequence[Call], *, progress: Progress | None = None
    ) -> list[list[Outcome]]:
        """Per call the outcome of each of its samples, in order: an Answer or a Failure.

        Raises BudgetExceeded before a call that could pass a limit and TooManyFailures when most
        calls fail; both hold the `results` so far, which are in the cache too. Ctrl-C commits what
        has arrived.
        """
        done = _Counter(progress)
        return self._start(calls, done.count).wait(done.tell)  # type: ignore[return-value]

    def stream(self, calls: Sequence[Call]) -> Iterator[Result]:
        """Results as they finish (what the cache has first); raises like `answer`. Leaving the
        loop early cancels the rest."""
        arrived: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
        work = self._start(calls, arrived.put)
        work.future.add_done_callback(lambda _: arrived.put(None))
        try:
            while (result := arrived.get()) is not None:
                yield result
            work.future.result()
        finally:
            work.cancel()

    async def stream_async(self, calls: Sequence[Call]) -> AsyncIterator[Result]:
        """`stream` for a caller with an event loop of its own."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Result | None] = asyncio.Queue()

        def put(result: Result | None) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, result)

        work = self._start(calls, put)
        work.future.add_done_callback(lambda _: put(None))
        try:
            while (result := await arrived.get()) is not None:
                yield result
            work.future.result()
        finally:
            work.cancel()

    def chat(
        self, calls: Sequence[Call | Prompt], *, progress: Progress | None = None
    ) -> list[list[Outcome]]:
        """`answer` through /chat/completions, whatever `chat` is; plain prompts become Calls."""
        return self.answer([_via("chat", call) for call in calls], progress=progress)

    def complete(
        self, calls: Sequence[Call | Prompt], *, progress: Progress | None = None
    ) -> list[list[Outcome]]:
        """`answer` through /completions, whatever `chat` is; plain prompts become Calls."""
        return self.answer([_via("completions", call) for call in calls], progress=progress)

    # ------------------------------------------------------------------------------ the Generator

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
        allow: tuple[Cut, ...] = ("length",),
        template_version: str = "",
    ) -> list[list[Completion]]:
        """For each prompt its samples `first_index` .. + `n` - 1 (`Generator.generate`).

        An answer cut at `max_tokens` is a Completion with finish_reason "length", as every
        generator's; `allow=()` makes it a failure. Raises AnswersFailed when any sample failed for
        good. `token_ids` are the server's, else the tokenizer's encoding of the text, else empty.
        With `forbidden_first` the first token is drawn under `logit_bias` and each sample goes on
        from it in a call of its own; ValueError for a server that ignores the field.
        """
        if "content_filter" in allow:
            raise ValueError("allow: a Completion cannot say 'content_filter'; use answer(...)")
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
        calls = [
            Call(
                prompt=prompt,
                sampling=span.of(sampling),
                n=len(span.indices),
                first_index=span.indices.start,
                seed=seed,
                allow=allow,
                template_version=template_version,
            )
            for prompt, span in zip(prompts, spans, strict=True)
        ]
        if forbidden_first is None:
            results = all_answered(self.answer(calls, progress=progress))
        else:
            results = first_token.generate(
                lambda asked, count: self.answer(asked, progress=count),
                self.forget,
                calls,
                forbidden_first,
                self.tokenizer,
                self._server,
                self._transport.shown_url,
                progress,
            )
        return [[self._completion(answer) for answer in row] for row in results]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Log-probability of each token of each completion after its prompt, by /completions with
        `echo` and `logprobs`; prompts need the tokenizer unless they are token ids.

        Raises ValueError for another `temperature` than 1, which no server scores at, and for a
        server that returns no log-probabilities of a prompt's tokens.
        """
        if temperature != 1.0:
            raise ValueError(
                f"temperature is {temperature!r}; {self._transport.shown_url} scores at 1.0 alone, "
                "as every server does: score with our engine or transformers"
            )
        calls = score_calls(prompts, completions, self.tokenizer)
        results = self.answer(calls)
        return read_scores(calls, completions, results, self._transport.shown_url)

    def generate_json(
        self,
        prompts: Sequence[Prompt],
        schema: Any,
        *,
        n: int = 1,
        first_index: int = 0,
        seed: int = 0,
        sampling: Sampling | None = None,
        template_version: str = "",
        progress: Progress | None = None,
    ) -> list[list[Outcome]]:
        """Answers whose `value` fits `schema`: a pydantic model (values are its instances) or a
        JSON Schema (values are plain). What does not fit is asked to be repaired once; then it is
        a Failure of kind "schema" that names what is wrong. Raises like `answer`.
        """
        shape = structured.shape_of(schema)
        calls = [
            Call(
                prompt=structured.as_messages(prompt),
                sampling=sampling or Sampling(max_tokens=1024),
                n=n,
                first_index=first_index,
                seed=seed,
                schema=shape.schema,
                template_version=template_version,
            )
            for prompt in prompts
        ]
        return structured.answer_json(self, calls, shape, progress)

    # ------------------------------------------------------------------------- costs and failures

    def dry_run(self, calls: Sequence[Call]) -> plan.Estimate:
        """What a job would send and cost, without sending anything."""
        return plan.estimate(self._prepare(calls), self._store, self._account, self.tokenizer)

    @property
    def usage(self) -> dict[str, Usage]:
        """The ledger: what each role has spent in this cache file, earlier runs included."""
        return self._store.usage()

    @property
    def failures(self) -> dict[str, int]:
        """How many of this role's calls failed and were not answered since, by kind."""
        return self._store.failures()

    def forget(self, calls: Sequence[Call]) -> None:
        """Drop the cached answers of these calls, so that they are asked (and paid) again."""
        self._store.forget(key for one in self._prepare(calls) for key in one.sample_keys())

    # ------------------------------------------------------------------------------------- inside

    def _prepare(self, calls: Sequence[Call]) -> list[Prepared]:
        found = []
        for position, call in enumerate(calls):
            try:
                found.append(self._preparer.prepare(call))
            except (ValueError, TypeError) as error:
                raise ValueError(f"call {position}: {error}") from error
        return found

    def _start(
        self, calls: Sequence[Call], deliver: Callable[[Result], None]
    ) -> Work[list[list[Outcome | None]]]:
        if not self._close.alive:
            raise ValueError(f"{self!r} is closed; open it again")
        job = Job(self._sender, self._store, self._prepare(calls), deliver, self._max_error_share)
        return self._thread.submit(job.run())

    def _completion(self, answer: Answer) -> Completion:
        ids = answer.token_ids
        if ids is None:
            ids = tuple(self.tokenizer.encode(answer.text)) if self.tokenizer else ()
        logprobs = answer.logprobs
        return Completion(
            text=answer.text,
            token_ids=ids,
            logprobs=None if logprobs is None else tuple(p for p in logprobs if p is not None),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
        )


class _Counter:
    """Results counted in the loop's thread, told to `progress` in the caller's."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._lock = threading.Lock()
        self._count = 0

    def count(self, _: Result) -> None:
        with self._lock:
            self._count += 1

    def tell(self) -> None:
        with self._lock:
            count, self._count = self._count, 0
        if count and self._progress is not None:
            self._progress(count)


def _via(api: Literal["chat", "completions"], call: Call | Prompt) -> Call:
    return replace(call, via=api) if isinstance(call, Call) else Call(prompt=call, via=api)


def _close(thread: LoopThread, transport: Transport, store: Store) -> None:
    try:
        thread.stop(transport.close)
    finally:
        store.close()
