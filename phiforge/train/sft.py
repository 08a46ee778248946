"""Supervised fine-tuning on chats: loss on what the assistant says, prompts masked (§4.1).

`run(SFTConfig(...), inputs, out)` reads the chats of the pack stage and the newest base weights;
writes out/model, a Hugging Face folder, and returns its metrics.
"""

from __future__ import annotations

from pydantic import Field

from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.data.loader import Loader, steps_per_epoch
from phiforge.data.mixture import MixturePart
from phiforge.model import huggingface
from phiforge.train.loop import LoopConfig, train
from phiforge.train.pretrain import language_model_loss, loader_step, model_folder
from phiforge.train.validate import make_validation

VERSION = 1


class SFTConfig(LoopConfig):
    """Settings of supervised fine-tuning."""

    lr: float = Field(default=1e-6, gt=0, description="Peak learning rate; the report's is 1e-6.")
    source: str = Field(default="chats", description="Packed source of chats.")
    epochs: int = Field(default=1, gt=0, description="Times every chat comes.")
    tokens_per_step: int = Field(gt=0, description="Tokens per optimizer step, masked ones too.")
    context: int = Field(
        ge=2, description="Tokens of a row; whole chats are packed into it, longer ones left out."
    )
    validation_tokens: int = Field(
        default=65_536, ge=0, description="Held-out tokens of chats in a validation; 0 = none."
    )


def run(config: SFTConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Fine-tune midtrain's (or else pretrain's) weights on packed chats; writes out/model.

    Reads inputs["pack"] and inputs["midtrain"] or inputs["pretrain"]. Chats longer than `context`
    are left out, counted in metrics["dropped_chats"]. Raises ValueError when none is left.
    """
    model, tokenizer = huggingface.load(
        model_folder(inputs, "midtrain", "pretrain"), dtype="float32"
    )
    pack = inputs["pack"]
    if config.context > model.config.max_position_embeddings:
        raise ValueError(
            f"sft.context is {config.context}; the model was made for at most "
            f"{model.config.max_position_embeddings} tokens"
        )
    size = (pack, config.source, config.context, config.tokens_per_step)
    steps = config.epochs * steps_per_epoch(*size, config.seed)
    mixture = [MixturePart(config.source, 1.0)]
    loader = Loader(pack, config.context, config.tokens_per_step, steps, mixture, config.seed)
    dropped = loader.parts[0].dropped_documents
    if dropped:
        out.note(f"{dropped} chats are longer than {config.context} tokens and left out")
    validate = make_validation(
        pack, [config.source], tokenizer, config.context, config.validation_tokens, out.exec
    )
    metrics = train(
        model,
        config,
        steps,
        lambda step: loader_step(loader, out.exec, step),
        language_model_loss,
        out,
        context=config.context,
        planned_tokens=steps * config.tokens_per_step,
        validate=validate,
    )
    huggingface.save(model, tokenizer, out.path / "model", dtype=config.save_dtype)
    return {**metrics, "dropped_chats": dropped, "mixture": loader.drawn()}
