"""The pivotal stage: search the SFT model's own answers for pivotal tokens, and make pairs of them.

A recipe runs it as `pivotal`; from Python: `run(PivotalConfig(), inputs, StageDir.scratch(path))`.
Writes tokens.jsonl, pairs.jsonl, paths.jsonl (for the report) and rollouts.jsonl.gz (re-analysis).
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from phiforge.core.config import StageConfig
from phiforge.core.distributed import resolve_device, resolve_dtype, set_threads
from phiforge.core.records import Problem, read_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.inference.interface import PromptTokenizer, prompt_token_ids
from phiforge.posttrain.pivotal.outputs import collect
from phiforge.posttrain.pivotal.results import (
    PairsFrom,
    PathChoice,
    Settings,
)
from phiforge.posttrain.pivotal.search import search

VERSION = 2


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
        paper = self.method == "paper"
        others = {"n_pair"} if paper else {"n_rollouts", "pairs_from"}
        for name in sorted(others):  # a resolved recipe names every field: defaults are no wish
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with method {self.method!r}; leave it out")
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
