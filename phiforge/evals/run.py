"""The evaluate stage: asks every checkpoint of a run the same questions, and compares them.

`run(EvaluateConfig(), inputs, out)`, or the `evaluate:` block of a recipe. Writes scores.json (k, n
and interval of every cell, paired tests) and transcripts/CHECKPOINT.jsonl (every response).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiforge.core.config import StageConfig
from phiforge.core.distributed import resolve_device, resolve_dtype, set_threads
from phiforge.core.files import write_json
from phiforge.core.progress import Bar
from phiforge.core.records import Problem
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.evals import ask, scores
from phiforge.evals.bits import bits_per_byte, held_out
from phiforge.evals.longcontext import STOP as CONTEXT_STOP
from phiforge.evals.longcontext import TASKS, context_questions, longest_answer
from phiforge.evals.prompts import (
    Shot,
    chat_questions,
    choose_problems,
    few_shot_questions,
    read_shots,
)
from phiforge.synth.worksheets import STOP

VERSION = 1
Style = Literal["base", "chat", "probe"]
Row = dict[str, Any]
# The checkpoints a run may have, in the order they are made.
DEFAULT_STYLES: dict[str, Style] = {
    "pretrain": "probe",
    "midtrain": "base",
    "sft": "chat",
    "dpo-pivotal": "chat",
    "dpo-judge": "chat",
}


class RecallConfig(BaseModel):
    """Key-value recall and copying."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num: int = Field(default=50, ge=0, description="Questions per task and length; 0 = none.")
    lengths: tuple[float, ...] = Field(
        default=(1.0, 2.0, 4.0), description="Prompt lengths, as multiples of the context."
    )
    tasks: tuple[Literal["needle", "recall", "copy"], ...] = Field(
        default=TASKS, description="What to ask."
    )
    checkpoints: tuple[str, ...] = Field(
        default=("pretrain", "midtrain"),
        description="Checkpoints that are asked; those a run lacks are left out.",
    )


class BitsConfig(BaseModel):
    """Bits per byte on the packed held-out documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(default=16_384, ge=0, description="Tokens per source; 0 = none.")
    document_tokens: int = Field(default=1024, ge=2, description="Most tokens of one document.")


class EvaluateConfig(StageConfig):
    """Settings of the evaluate stage."""

    checkpoints: dict[str, Style] = Field(
        default={},
        description="Stage → how it is asked. base: worked examples and the question as text; "
        "chat: a message; probe: no problems, only recall and bits per byte. Empty = all of a run.",
    )
    problems_per_family: int = Field(default=100, ge=1, description="Answerable test problems.")
    bogus_per_family: int = Field(default=50, ge=0, description="Unanswerable test problems.")
    temperatures: tuple[float, ...] = Field(
        default=(0.0, 1.0), min_length=1, description="Temperatures of answers; 0 = greedy."
    )
    samples: int = Field(default=1, ge=1, description="Answers per problem above temperature 0.")
    few_shot: int = Field(default=3, ge=0, description="Most worked examples before a question.")
    max_tokens: int = Field(default=96, ge=1, description="Longest answer to a problem.")
    context: int | None = Field(
        default=None, ge=2, description="Pretraining context in tokens; none = the first model's."
    )
    recall: RecallConfig = RecallConfig()
    bits_per_byte: BitsConfig = BitsConfig()
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="Weights of the models.")


@dataclass(frozen=True)
class Plan:
    """What every checkpoint is asked, read once: problems, worked examples, held-out text."""

    problems: list[Problem]
    shots: dict[str, list[Shot]]
    texts: dict[str, list[list[int]]]
    context: int


def run(config: EvaluateConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Evaluate each checkpoint (finished ones are kept when resumed), then score them together.

    Raises ValueError when a checkpoint is named that the inputs lack, or there is none.
    """
    styles = checkpoint_styles(config, inputs)
    set_threads(out.exec)
    plan = _plan(config, inputs, styles)
    parts = [_checkpoint(name, style, config, plan, inputs, out) for name, style in styles.items()]
    transcripts = [t for name in styles for t in ask.read(_transcripts(out, name))]
    result = {
        "checkpoints": [part["checkpoint"] for part in parts],
        "context": plan.context,
        "accuracy": scores.accuracy(transcripts),
        "refusals": scores.refusals(transcripts),
        "recall": scores.context_recall(transcripts),
        "bits_per_byte": [row for part in parts for row in part["bits_per_byte"]],
        "comparisons": scores.comparisons(transcripts, list(styles), config.seed),
    }
    write_json(out.path / "scores.json", result)
    return _metrics(result, transcripts, parts)


def checkpoint_styles(config: EvaluateConfig, inputs: Inputs) -> dict[str, Style]:
    """Which checkpoints are asked and how, in training order.

    By default those among the inputs; without midtraining the pretrained model is the base.
    """
    found: dict[str, Style] = dict(config.checkpoints)
    if not found:
        found = {name: style for name, style in DEFAULT_STYLES.items() if name in inputs}
        if "midtrain" not in found and "pretrain" in found:
            found["pretrain"] = "base"
    missing = [name for name in found if name not in inputs]
    if missing or not found:
        raise ValueError(
            f"evaluate.checkpoints: {', '.join(missing) or 'none'} not among the stages it reads "
            f"({', '.join(inputs) or 'none'}); add the stage to the recipe or adopt its folder"
        )
    order = list(DEFAULT_STYLES)
    known = sorted((n for n in found if n in order), key=order.index)
    return {name: found[name] for name in (*known, *(n for n in found if n not in order))}


def model_folder(folder: Path) -> Path:
    """Where a stage's weights lie: its model/ folder, or the folder itself when it is a model."""
    return folder / "model" if (folder / "model").is_dir() else folder


# ----------------------------------------------------------------------------- one checkpoint


def _plan(config: EvaluateConfig, inputs: Inputs, styles: dict[str, Style]) -> Plan:
    from phiforge.model.huggingface import load_config

    problems: list[Problem] = []
    shots: dict[str, list[Shot]] = {}
    if any(style != "probe" for style in styles.values()):
        folder = inputs["synthesize"]
        problems = choose_problems(
            folder / "problems_test.jsonl", config.problems_per_family, config.bogus_per_family
        )
        if "base" in styles.values():
            shots = read_shots(folder / "problems_train.jsonl", config.few_shot)
    texts: dict[str, list[list[int]]] = {}
    if config.bits_per_byte.max_tokens and "pack" in inputs:
        texts = held_out(
            inputs["pack"],
            max_tokens=config.bits_per_byte.max_tokens,
            document_tokens=config.bits_per_byte.document_tokens,
            seed=config.seed,
        )
    context = config.context
    if context is None:
        first = load_config(model_folder(inputs[next(iter(styles))]))
        context = first.original_max_position_embeddings or first.max_position_embeddings
    return Plan(problems, shots, texts, context)


def _checkpoint(
    name: str, style: Style, config: EvaluateConfig, plan: Plan, inputs: Inputs, out: StageDir
) -> Row:
    """Ask one checkpoint everything, unless a run before did; what is not in its transcripts."""
    part_file = out.state / f"{name}.json"
    request = config.model_dump(mode="json")
    if part_file.exists() and _transcripts(out, name).exists():
        part = json.loads(part_file.read_text())
        if part["request"] == request:
            out.note(f"{name}: kept from the run before")
            return part
    model, tokenizer = _load(model_folder(inputs[name]), config, plan, out)
    facts = {"name": name, "style": style, "parameters": model.config.num_parameters}
    asking = _Asking(name, style, config, plan, model, tokenizer, out)
    transcripts = asking.problems(facts) + asking.long_context()
    part = {
        "request": request,
        "checkpoint": facts,
        "bits_per_byte": asking.bits(),
        "flops_per_token": _forward_flops(model, plan.context),
    }
    ask.write(_transcripts(out, name), transcripts)
    write_json(part_file, part)
    return part


class _Asking:
    """One loaded checkpoint and its engine, while it answers."""

    def __init__(
        self, name: str, style: Style, config: EvaluateConfig, plan: Plan, model: Any,
        tokenizer: Any, out: StageDir,
    ) -> None:  # fmt: skip
        from phiforge.inference.engine import Engine

        self.name, self.style, self.config, self.plan = name, style, config, plan
        self.model, self.tokenizer, self.out = model, tokenizer, out
        self.engine = Engine(model, tokenizer, rows=out.exec.rows, mode="exact")

    def problems(self, facts: Row) -> list[ask.Transcript]:
        """Answers to test problems at every temperature; bogus ones at the lowest alone."""
        if self.style == "probe":
            return []
        questions, stop = chat_questions(self.plan.problems), ()
        if self.style == "base":
            room = self.model.config.max_position_embeddings - self.config.max_tokens
            questions, shots = few_shot_questions(
                self.plan.problems, self.plan.shots, self.tokenizer, room
            )
            facts["few_shot"], stop = shots, (STOP,)
            if shots < self.config.few_shot:
                self.out.note(f"{self.name}: {shots} worked examples fit its context")
        transcripts = []
        lowest = min(self.config.temperatures)
        for temperature in self.config.temperatures:
            asked = [q for q in questions if q.suite == "problems" or temperature == lowest]
            samples = self.config.samples if temperature > 0 else 1
            with self.out.progress(len(asked) * samples, "answers", self.name) as bar:
                transcripts += self._ask(
                    asked, temperature, self.config.max_tokens, stop, bar, samples
                )
        return transcripts

    def long_context(self) -> list[ask.Transcript]:
        """Recall and copying at each length, greedy."""
        recall = self.config.recall
        if self.name not in recall.checkpoints or not recall.num:
            return []
        questions = context_questions(
            self.tokenizer,
            context=self.plan.context,
            lengths=recall.lengths,
            num=recall.num,
            seed=self.config.seed,
            tasks=recall.tasks,
            chat=self.style == "chat",
        )
        transcripts = []
        with self.out.progress(len(questions), "tasks", f"{self.name} long") as bar:
            for task in dict.fromkeys(q.suite for q in questions):
                asked = [q for q in questions if q.suite == task]
                most = longest_answer(self.tokenizer, asked)
                transcripts += self._ask(asked, 0.0, most, CONTEXT_STOP, bar)
        return transcripts

    def bits(self) -> list[Row]:
        """Bits per byte on each source's held-out text, in windows of the pretraining context."""
        rows = []
        for source, documents in self.plan.texts.items():
            found = bits_per_byte(
                self.model,
                self.tokenizer,
                documents,
                context=self.plan.context,
                micro_tokens=self.out.exec.micro_tokens,
            )
            rows.append({"checkpoint": self.name, "source": source, **found.to_dict()})
        return rows

    def _ask(
        self, questions: Sequence[ask.Question], temperature: float, max_tokens: int,
        stop: Sequence[str], bar: Bar, samples: int = 1,
    ) -> list[ask.Transcript]:  # fmt: skip
        return ask.ask(
            self.engine,
            questions,
            checkpoint=self.name,
            temperature=temperature,
            max_tokens=max_tokens,
            samples=samples,
            seed=self.config.seed,
            stop=stop,
            progress=bar.advance,
        )


def _load(folder: Path, config: EvaluateConfig, plan: Plan, out: StageDir) -> tuple[Any, Any]:
    """A checkpoint whose context reaches the longest question, trained for it or not."""
    from phiforge.model.huggingface import load

    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    model, tokenizer = load(folder, dtype=dtype, device=str(resolve_device(out.exec.device)))
    longest = int(plan.context * max(config.recall.lengths, default=1.0))
    if longest > model.config.max_position_embeddings and model.config.rope_scaling is None:
        # What a model does beyond its context is the measurement; plain RoPE has a value there.
        model.config = model.config.replace(max_position_embeddings=longest)
        model.set_max_length(longest)
    return model, tokenizer


def _forward_flops(model: Any, context: int) -> float:
    from phiforge.train.cost import flops_per_token

    return flops_per_token(model.config, context) / 3


def _transcripts(out: StageDir, name: str) -> Path:
    return out.path / "transcripts" / f"{name}.jsonl"


def _metrics(result: Row, transcripts: Sequence[ask.Transcript], parts: Sequence[Row]) -> Metrics:
    generated = sum(t.response_tokens for t in transcripts)
    read = {part["checkpoint"]["name"]: 0 for part in parts}
    for transcript in transcripts:
        read[transcript.checkpoint] += transcript.prompt_tokens + transcript.response_tokens
    for row in result["bits_per_byte"]:
        read[row["checkpoint"]] += row["forward_tokens"]
    flops = sum(read[p["checkpoint"]["name"]] * p["flops_per_token"] for p in parts)
    lowest = min((row["temperature"] for row in result["accuracy"]), default=0.0)
    right = {
        row["checkpoint"]: round(row["share"], 4)
        for row in result["accuracy"]
        if row["family"] == scores.ALL and row["temperature"] == lowest
    }
    return {
        **{f"accuracy {name}": share for name, share in right.items()},
        "transcripts": len(transcripts),
        "generated_tokens": generated,
        "read_tokens": sum(read.values()) - generated,
        "flops": flops,
    }
