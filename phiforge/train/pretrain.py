"""Pretraining from packed text, and midtraining to a longer context (arXiv 2412.08905 §3, §3.3).

`run_pretrain(PretrainConfig(...), inputs, out)` reads pack and tokenizer; `run_midtrain` reads
pretrain/model too. Each writes out/model, a Hugging Face folder, and returns its metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from phiforge.core.config import Exec
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.data.loader import Loader
from phiforge.data.mixture import MixturePart, combine
from phiforge.model import huggingface
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer
from phiforge.train.batch import Rows, StepBatch, rows_step
from phiforge.train.loop import TrainConfig, train
from phiforge.train.losses import LossSum, cross_entropy_sum, head_weight
from phiforge.train.validate import make_validation

VERSION = 1


class ModelShape(BaseModel):
    """Which decoder to train: a preset, and what differs from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field(default="nano", description="Name of a PhiConfig preset.")
    hidden_size: int | None = Field(default=None, description="Width; None = the preset's.")
    intermediate_size: int | None = Field(default=None, description="SwiGLU width.")
    num_layers: int | None = Field(default=None, description="Layers.")
    num_heads: int | None = Field(default=None, description="Query heads.")
    num_kv_heads: int | None = Field(default=None, description="Key and value heads.")
    head_dim: int | None = Field(default=None, description="Dimensions of a head.")
    rope_theta: float | None = Field(default=None, description="RoPE base.")
    initializer_range: float | None = Field(
        default=None, gt=0, description="Standard deviation of new matrices."
    )
    tie_word_embeddings: bool | None = Field(
        default=None, description="Whether the output matrix is the embedding."
    )

    def build(self, tokenizer: Tokenizer, context: int) -> PhiConfig:
        """The configuration, with the tokenizer's vocabulary and a context in tokens."""
        changes = {k: v for k, v in self.model_dump(exclude={"preset"}).items() if v is not None}
        return PhiConfig.preset(
            self.preset,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=context,
            original_max_position_embeddings=None,
            bos_token_id=tokenizer.eod_id,
            eos_token_ids=(tokenizer.eos_id, tokenizer.eod_id),
            pad_token_id=tokenizer.pad_id,
            **changes,
        )


class TextConfig(TrainConfig):
    """What training on packed text adds to the loop's settings."""

    context: int = Field(ge=2, description="Tokens of a row; documents are packed into it.")
    mixture: tuple[MixturePart, ...] = Field(
        min_length=1, description="Packed sources and their shares of the tokens."
    )
    validation_tokens: int = Field(
        default=65_536, ge=0, description="Held-out tokens per source in a validation; 0 = none."
    )

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        if self.tokens_per_step % self.context:
            raise ValueError(
                f"tokens_per_step is {self.tokens_per_step}; it must be a multiple of context "
                f"({self.context})"
            )
        return self


class PretrainConfig(TextConfig):
    """Settings of pretraining."""

    model: ModelShape = Field(default=ModelShape(), description="The decoder's shape.")


class MidtrainConfig(TextConfig):
    """Settings of midtraining; `derive_midtrain` fills them from pretraining's.

    `mixture` is the recall part: pretraining's own mixture.
    """

    rope_theta_factor: float = Field(
        default=25.0, gt=0, description="The RoPE base is multiplied by this (10,000 to 250,000)."
    )
    long: tuple[MixturePart, ...] = Field(
        min_length=1, description="Packed sources of long documents."
    )
    long_share: float = Field(
        default=0.3, ge=0, le=1, description="Share of the tokens that long documents give."
    )


def derive_midtrain(pretrain: Mapping[str, Any], midtrain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's midtrain block completed from its pretrain block; what is written there stays.

    Context x 4, peak learning rate / 10, warm-up in proportion, long documents of over 2x the
    pretraining context with those from 4x twice as often; everything else as in pretraining.
    """
    derived = {k: v for k, v in pretrain.items() if k not in ("model", "steps", "seed")}
    context, lr = pretrain.get("context"), pretrain.get("lr")
    if isinstance(context, int):
        derived["context"] = 4 * context
        part = {"source": "long_documents", "share": 1.0, "min_tokens": 2 * context + 1}
        derived["long"] = [{**part, "upweight_from_tokens": 4 * context}]
    if isinstance(lr, int | float):
        derived["lr"] = lr / 10
    steps, mid_steps = pretrain.get("steps"), midtrain.get("steps")
    if isinstance(steps, int) and isinstance(mid_steps, int) and steps > 0:
        derived["warmup_steps"] = pretrain.get("warmup_steps", 0) * mid_steps // steps
    return {**derived, **midtrain}


def run_pretrain(config: PretrainConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Train a new model on the pack's mixture; writes out/model.

    Reads inputs["pack"] and inputs["tokenizer"]. Raises ValueError for unknown sources and shapes.
    """
    tokenizer = Tokenizer.load(inputs["tokenizer"])
    model = Phi(config.model.build(tokenizer, config.context))
    model.initialize(torch.Generator().manual_seed(config.seed))
    out.note(f"{model.config.num_parameters:,} parameters, context {config.context}")
    return _run(model, tokenizer, config, list(config.mixture), inputs["pack"], out)


def run_midtrain(config: MidtrainConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Go on from pretrain/model with a longer context and a larger RoPE base; writes out/model.

    Reads inputs["pack"] and inputs["pretrain"].
    """
    before, tokenizer = huggingface.load(model_folder(inputs, "pretrain"), dtype="float32")
    model = longer_context(before, config.context, config.rope_theta_factor)
    tokenizer.context = config.context
    mixture = combine([(config.long_share, config.long), (1 - config.long_share, config.mixture)])
    out.note(f"context {config.context}, RoPE base {model.config.rope_theta:g}")
    return _run(model, tokenizer, config, mixture, inputs["pack"], out)


def longer_context(model: Phi, context: int, rope_theta_factor: float) -> Phi:
    """The same weights with another context and RoPE base. ValueError for LongRoPE models."""
    if model.config.rope_scaling is not None:
        raise ValueError(
            "midtraining raises rope_theta, but this model uses LongRoPE (rope_scaling), whose "
            "factors fix its context; start from a model without it"
        )
    config = model.config.replace(
        rope_theta=model.config.rope_theta * rope_theta_factor,
        max_position_embeddings=context,
        original_max_position_embeddings=None,
    )
    longer = Phi(config)
    longer.load_state_dict(model.state_dict())
    return longer


def model_folder(inputs: Inputs, *stages: str) -> Path:
    """The weights of the first of `stages` among the inputs: its model/ folder, or itself.

    An adopted folder may be a plain Hugging Face folder. Raises ValueError when there is none.
    """
    for stage in stages:
        if stage in inputs:
            folder = inputs[stage] / "model"
            folder = folder if folder.is_dir() else inputs[stage]
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"{folder / 'config.json'}: no such file, so {folder} holds no model; run "
                    f"stage {stage} again (--rebuild {stage}) or adopt a Hugging Face folder"
                )
            return folder
    raise ValueError(f"no weights to start from: the inputs hold none of {', '.join(stages)}")


def language_model_loss(model: Phi, rows: Rows) -> LossSum:
    """Summed next-token cross-entropy of packed rows, attention kept inside documents."""
    x_btd = model.hidden(
        rows.token_ids_bt, positions_bt=rows.positions_bt, documents_bt=rows.documents_bt
    )
    x_nd, targets_n = x_btd.flatten(0, 1), rows.targets_bt.flatten()
    return LossSum(cross_entropy_sum(x_nd, head_weight(model), targets_n, model.kernels))


def loader_step(loader: Loader, exec: Exec, step: int) -> StepBatch:
    """A step of the loader, cut into micro-batches."""
    return rows_step(loader.batch(step), exec.micro_tokens)


def _run(
    model: Phi,
    tokenizer: Tokenizer,
    config: TextConfig,
    mixture: list[MixturePart],
    pack: Path,
    out: StageDir,
) -> Metrics:
    loader = Loader(
        pack, config.context, config.tokens_per_step, config.steps, mixture, config.seed
    )
    validate = make_validation(
        pack,
        [part.source for part in mixture],
        tokenizer,
        config.context,
        config.validation_tokens,
        out.exec,
    )
    metrics = train(
        model,
        config,
        config.steps,
        lambda step: loader_step(loader, out.exec, step),
        language_model_loss,
        out,
        context=config.context,
        planned_tokens=config.steps * config.tokens_per_step,
        validate=validate,
    )
    huggingface.save(model, tokenizer, out.path / "model", dtype=config.save_dtype)
    return {**metrics, "parameters": model.config.num_parameters, "mixture": loader.drawn()}
