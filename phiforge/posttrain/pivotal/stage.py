"""The pivotal stage: search the SFT model's own answers for pivotal tokens, and make pairs of them.

A recipe runs it as `pivotal`; from Python: `run(PivotalConfig(), inputs, StageDir.scratch(path))`.
Writes tokens.jsonl, pairs.jsonl, paths.jsonl (for the report) and rollouts.jsonl.gz (re-analysis).
"""

import codecs
import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, model_validator

from phiforge.core.config import StageConfig
from phiforge.core.distributed import resolve_device, resolve_dtype, set_threads
from phiforge.core.records import Problem, read_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.inference.interface import PromptTokenizer, prompt_token_ids
from phiforge.posttrain.pivotal.adaptive import by_first_token
from phiforge.posttrain.pivotal.estimates import Estimate, Request
from phiforge.posttrain.pivotal.results import (
    PairsFrom,
    PathChoice,
    PivotalToken,
    QuestionResult,
    Settings,
)
from phiforge.posttrain.pivotal.rollouts import row_of
from phiforge.posttrain.pivotal.search import Search, search

VERSION = 1
NUM_ALTERNATIVES = 8


class PivotalConfig(StageConfig):
    """Settings of the pivotal stage."""

    num_questions: int = Field(default=256, ge=1, description="Most questions to screen.")
    families: tuple[str, ...] = Field(default=(), description="Problem families; empty = all.")
    prompt_format: Literal["chat", "text"] = Field(
        default="chat", description="chat: text prompts become a user message; text: as they are."
    )
    system: str | None = Field(default=None, description="System message before a chat prompt.")
    method: Literal["paper", "fast", "balanced", "thorough"] = Field(
        default="balanced",
        description="paper: the report's bisection; the others: adaptive, with confirmation.",
    )
    gap: float = Field(default=0.2, gt=0, le=1, description="Least change of p(success).")
    band: tuple[float, float] = Field(
        default=(0.2, 0.8), description="Questions are kept when p(success) lies in this band."
    )
    n_filter: int = Field(default=32, ge=2, description="Rollouts per question for the band.")
    n_rollouts: int = Field(
        default=64, ge=2, description="Rollouts per prefix of a path (method paper)."
    )
    temperature: float = Field(default=1.0, gt=0, description="Temperature of all rollouts.")
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of a whole answer.")
    paths_per_question: int = Field(default=2, ge=1, description="Answers searched per question.")
    path_choice: PathChoice = Field(
        default="balanced", description="balanced: success, failure, ...; natural: as sampled."
    )
    pairs_from: PairsFrom = Field(
        default="pivotal",
        description="pivotal: a pair before each pivotal token, as in the report; all_prefixes: "
        "at every prefix that was estimated, for no further rollouts.",
    )
    pair_gap: float | None = Field(
        default=None, description="Least p(chosen) - p(rejected) of a pair; none = gap."
    )
    min_count: int = Field(default=3, ge=1, description="Least rollouts behind a pair's token.")
    n_pair: int = Field(
        default=24, ge=2, description="Fresh rollouts behind a pair's other token (not paper)."
    )
    max_pairs: int | None = Field(default=None, ge=1, description="Stop at this many pairs.")
    budget_tokens: int | None = Field(
        default=None, ge=1, description="Generated tokens to spend, in question order."
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="Weights of the model.")

    @model_validator(mode="after")
    def _check(self) -> "PivotalConfig":
        Settings(**self.search_arguments())
        if self.system is not None and self.prompt_format == "text":
            raise ValueError("system needs prompt_format: chat; a text prompt has no system part")
        return self

    def search_arguments(self) -> dict[str, Any]:
        """The fields that `pivotal.search` takes under the same names."""
        names = Settings.__dataclass_fields__
        return {name: getattr(self, name) for name in names}


def run(config: PivotalConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Search `inputs["sft"]/model` on `inputs["synthesize"]/problems_train.jsonl`.

    Raises ValueError when no problem is left after the filters, or none fits the context.
    """
    from phiforge.inference.engine import Engine
    from phiforge.model.huggingface import load
    from phiforge.verify.answers import is_correct

    problems = choose_problems(inputs["synthesize"] / "problems_train.jsonl", config)
    set_threads(out.exec)
    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    device = str(resolve_device(out.exec.device))
    model, tokenizer = load(inputs["sft"] / "model", dtype=dtype, device=device)
    engine = Engine(model, tokenizer, rows=out.exec.rows, mode="exact")
    asked = [as_prompt(problem, config) for problem in problems]
    fitting = with_room(asked, tokenizer, config.max_tokens, model.config.max_position_embeddings)
    if len(fitting) < len(asked):
        out.note(f"{len(asked) - len(fitting)} questions are too long for the model's context")
    found = search(
        engine,
        fitting,
        is_correct,
        **config.search_arguments(),
        max_pairs=config.max_pairs,
        budget_tokens=config.budget_tokens,
        log=out.state / "rollouts.jsonl",
        questions_in_flight=max(16, out.exec.rows // 4),
        rollouts_per_call=16 * out.exec.rows,
    )
    metrics = collect(found, len(fitting), tokenizer, out)
    return metrics | {"questions_too_long": len(asked) - len(fitting)}


def choose_problems(path: Path, config: PivotalConfig) -> list[Problem]:
    """`num_questions` answerable problems of the wanted families, shuffled by the seed."""
    usable = [
        problem
        for problem in read_records(path, Problem)
        if problem.answer is not None
        and problem.metadata.get("variant", "answerable") == "answerable"
        and (not config.families or problem.metadata.get("family") in config.families)
    ]
    if not usable:
        wanted = ", ".join(config.families) or "any family"
        raise ValueError(f"{path}: no answerable problem of {wanted}; check pivotal.families")
    random.Random(config.seed).shuffle(usable)
    return usable[: config.num_questions]


def as_prompt(problem: Problem, config: PivotalConfig) -> Problem:
    """The problem with its text prompt as the chat messages that the model was tuned on."""
    if config.prompt_format == "text" or not isinstance(problem.prompt, str):
        return problem
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    return replace(problem, prompt=[*system, {"role": "user", "content": problem.prompt}])


def with_room(
    problems: list[Problem], tokenizer: PromptTokenizer, max_tokens: int, context: int
) -> list[Problem]:
    """The problems whose prompt leaves `max_tokens` of the model's `context` (tokens) free.

    An answer cut by the context would count as a wrong one. Raises ValueError when none fits.
    """
    room = context - max_tokens
    fitting = [p for p in problems if len(prompt_token_ids(tokenizer, p.prompt)) <= room]
    if not fitting:
        raise ValueError(
            f"pivotal: max_tokens is {max_tokens} and the model's context {context} tokens: "
            "no question fits beside the answer; lower max_tokens"
        )
    return fitting


def collect(found: Search, num_problems: int, tokenizer: PromptTokenizer, out: StageDir) -> Metrics:
    """Run the search to its end, write its outputs question by question, return the metrics."""
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(out.path / f"{name}.jsonl", "w", encoding="utf-8"))
            for name in ("tokens", "pairs", "paths")
        }
        rollouts = stack.enter_context(_deterministic_gzip(out.path / "rollouts.jsonl.gz"))
        bar = stack.enter_context(out.progress(num_problems, "questions"))
        for question in found.questions():
            _write(files["tokens"], token_rows(question, tokenizer))
            _write(files["pairs"], (asdict(pair) for pair in question.pairs))
            _write(files["paths"], path_rows(question, tokenizer))
            for row in rollout_rows(question):
                rollouts.write(_json(row).encode())
            counts += _count(question)
            bar.advance(1, pairs=found.num_pairs, tokens=found.num_tokens)
    if not found.num_pairs:
        out.note(
            f"no pair found: {counts['searched']} of {found.num_questions} questions lie in the "
            f"band ({counts['below band']} below, {counts['above band']} above); "
            "a wider band, a smaller gap or more questions may help"
        )
    return _metrics(found, counts, time.monotonic() - begin)


def _count(question: QuestionResult) -> Counter[str]:
    return Counter(
        {
            question.status: 1,
            "paths": len(question.paths),
            "tokens": len(question.tokens),
            "rising": sum(token.delta > 0 for token in question.tokens),
            "undecided": sum(len(path.undecided) for path in question.paths),
            "prefixes": len(question.ledger.rollouts),
            "rollouts": sum(len(drawn) for _, drawn in question.ledger.history),
        }
    )


def _metrics(found: Search, counts: Counter[str], seconds: float) -> Metrics:
    return {
        "questions_screened": found.num_questions,
        "questions_in_band": counts["searched"],
        "paths": counts["paths"],
        "pivotal_tokens": counts["tokens"],
        "pairs": found.num_pairs,
        "pivotal_tokens_rising": counts["rising"],
        "questions_below_band": counts["below band"],
        "questions_above_band": counts["above band"],
        "questions_unscored": counts["unscored"],
        "prefixes_estimated": counts["prefixes"],
        "rollouts": counts["rollouts"],
        "rollouts_unscored": found.num_unscored,
        "segments_undecided": counts["undecided"],
        "filter_tokens": found.num_filter_tokens,
        "search_tokens": found.num_search_tokens,
        "confirm_tokens": found.num_confirm_tokens,
        "pair_tokens": found.num_pair_tokens,
        "discarded_tokens": found.num_discarded_tokens,
        "seconds": round(seconds, 2),
    }


# ------------------------------------------------------------------------------- output rows


def token_rows(question: QuestionResult, tokenizer: PromptTokenizer) -> Iterator[dict[str, Any]]:
    """tokens.jsonl: each PivotalToken with its text and the other first tokens seen there."""
    for token in question.tokens:
        yield {
            **asdict(token),
            "token": tokenizer.decode([token.token_id], skip_special=False),
            "alternatives": _alternatives(question, token, tokenizer),
            "family": question.problem.metadata.get("family"),
        }


def _alternatives(
    question: QuestionResult, token: PivotalToken, tokenizer: PromptTokenizer
) -> list[dict[str, Any]]:
    prefix = tuple(token.prefix_token_ids[len(question.prompt_token_ids) :])
    groups = question.ledger.first_tokens(prefix)
    detours = question.ledger.detours.get((prefix, token.token_id), ())
    for other, counts in by_first_token(detours).items():
        groups[other] = groups.get(other, Estimate(0, 0)) + counts
    ranked = sorted(groups, key=lambda t: (-groups[t].n, t))[:NUM_ALTERNATIVES]
    return [
        {
            "token_id": other,
            "token": tokenizer.decode([other], skip_special=False),
            "n": groups[other].n,
            "successes": groups[other].successes,
        }
        for other in ranked
    ]


def path_rows(question: QuestionResult, tokenizer: PromptTokenizer) -> Iterator[dict[str, Any]]:
    """paths.jsonl: a path's tokens, their texts and log-probabilities, and p where it is known.

    `p`, `n`, `successes` have one entry more than the tokens: entry i is after i tokens, null where
    nothing was drawn. `pivotal` holds positions: token i moves p from entry i to entry i + 1.
    """
    start = len(question.prompt_token_ids)
    known: dict[tuple[int, ...], PivotalToken] = {
        (*t.prefix_token_ids[start:], t.token_id): t for t in question.tokens
    }
    for number, path in enumerate(question.paths):
        yield {
            "problem_id": question.problem.id,
            "family": question.problem.metadata.get("family"),
            "answer": question.problem.answer,
            "path": number,
            "success": path.success,
            "prompt": tokenizer.decode(question.prompt_token_ids, skip_special=False),
            "prompt_token_ids": question.prompt_token_ids,
            "token_ids": path.token_ids,
            "texts": token_texts(path.token_ids, tokenizer),
            "logprobs": path.logprobs,
            "p": path.p,
            **_along(path.estimates),
            "pivotal": path.pivotal,
            "tokens": [_effect(known[tuple(path.token_ids[: i + 1])], i) for i in path.pivotal],
        }


def _along(estimates: list[Estimate | None]) -> dict[str, list[Any]]:
    return {
        "n": [e.n if e else None for e in estimates],
        "successes": [e.successes if e else None for e in estimates],
        "exact": [bool(e and e.exact) for e in estimates],
    }


def _effect(token: PivotalToken, position: int) -> dict[str, float]:
    low, high = token.interval
    return {"position": position, "delta": token.delta, "low": low, "high": high}


def token_texts(token_ids: Iterable[int], tokenizer: PromptTokenizer) -> list[str]:
    """Each token's share of the text; a character split over tokens goes to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(token)) for token in token_ids]
    rest = decoder.decode(b"", final=True)
    return [*texts[:-1], texts[-1] + rest] if texts else []


def rollout_rows(question: QuestionResult) -> Iterator[dict[str, Any]]:
    """rollouts.jsonl.gz: every prefix with all its rollouts and outcomes, short prefixes first."""
    prompt = tuple(question.prompt_token_ids)
    ledger = question.ledger
    for prefix in ledger.prefixes:
        drawn = ledger.rollouts[prefix]
        request = Request(prefix, 0, len(drawn), "search" if prefix else "filter")
        yield row_of(question.problem.id, prompt, request, drawn)
    for (prefix, forbidden), drawn in sorted(ledger.detours.items()):
        request = Request(prefix, 0, len(drawn), "search", forbidden)
        yield row_of(question.problem.id, prompt, request, drawn)


@contextmanager
def _deterministic_gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without name and time, so that equal rollouts give equal bytes."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        yield file


def _write(file: IO[str], rows: Iterable[dict[str, Any]]) -> None:
    file.writelines(_json(row) for row in rows)


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
