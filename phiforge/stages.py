"""The stage table: what runs, in which order, what each stage reads and writes.

`STAGES` is the architecture on one screen; `phiforge run RECIPE` walks it from top to bottom and
runs the stages that the recipe names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from phiforge.core.config import StageConfig


@dataclass(frozen=True)
class Stage:
    """One row: `module` holds `config` (a StageConfig), `function` and VERSION.

    `reads` names earlier stages; "midtrain|pretrain" takes the first of them that the recipe has,
    and a trailing "?" makes an input optional.
    """

    name: str
    module: str
    config: str
    reads: tuple[str, ...]
    writes: str
    function: str = "run"

    def config_class(self) -> type[StageConfig]:
        """The pydantic model of this stage's block in a recipe."""
        return getattr(import_module(self.module), self.config)

    def load(self) -> tuple[Callable[..., dict[str, Any]], int]:
        """The stage's function and version."""
        module = import_module(self.module)
        return getattr(module, self.function), module.VERSION


BASE = "midtrain|pretrain"
CHECKPOINTS = ("pretrain?", "midtrain?", "sft?", "dpo-pivotal?")

STAGES: tuple[Stage, ...] = (
    Stage("curate", "phiforge.data.curate", "CurateConfig", (), "clean organic documents"),
    Stage(
        "synthesize",
        "phiforge.synth.synthesize",
        "SynthesizeConfig",
        (),
        "worked and terse problems, recall documents, chats, test problems",
    ),
    Stage(
        "tokenizer",
        "phiforge.data.vocabulary",
        "TokenizerConfig",
        ("curate?", "synthesize?"),
        "a byte-level BPE tokenizer",
    ),
    Stage(
        "pack",
        "phiforge.data.pack",
        "PackConfig",
        ("curate?", "synthesize?", "tokenizer"),
        "token shards, one folder per source",
    ),
    Stage(
        "pretrain",
        "phiforge.train.pretrain",
        "PretrainConfig",
        ("pack", "tokenizer"),
        "weights",
        "run_pretrain",
    ),
    Stage(
        "midtrain",
        "phiforge.train.pretrain",
        "MidtrainConfig",
        ("pack", "tokenizer", "pretrain"),
        "weights with four times the context",
        "run_midtrain",
    ),
    Stage("sft", "phiforge.train.sft", "SFTConfig", ("pack", "tokenizer", BASE), "a chat model"),
    Stage(
        "pivotal",
        "phiforge.posttrain.pivotal.stage",
        "PivotalConfig",
        ("sft", "synthesize"),
        "pivotal tokens and preference pairs",
    ),
    Stage(
        "dpo-pivotal",
        "phiforge.train.dpo",
        "DPOConfig",
        ("sft", "pivotal"),
        "a chat model that decides better",
    ),
    Stage(
        "evaluate",
        "phiforge.evals.run",
        "EvaluateConfig",
        ("synthesize", "pack?", "tokenizer?", *CHECKPOINTS),
        "scores with intervals, every transcript",
    ),
    Stage(
        "report",
        "phiforge.report",
        "ReportConfig",
        ("evaluate?", "pivotal?", "pack?", "synthesize?", *CHECKPOINTS),
        "one self-contained HTML page",
    ),
)

BY_NAME = {stage.name: stage for stage in STAGES}
