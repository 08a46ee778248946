"""Direct preference optimisation on pivotal-token pairs or whole responses (arXiv 2412.08905 §4).

`run(DPOConfig(...), inputs, out)` reads pairs (JSONL) and the weights they came from; writes
out/model and out/reference.safetensors (the starting weights' log-probabilities, with a hash).

Shapes: b rows, t row length, n completion tokens, p pairs, d model dim, v vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phiforge.core.distributed import resolve_device, resolve_dtype, set_threads
from phiforge.core.files import atomic_path, content_hash
from phiforge.core.records import Pair, read_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.model import huggingface
from phiforge.model.fused import fused
from phiforge.model.phi import Phi
from phiforge.train.cost import choose_kernels
from phiforge.train.loop import LoopConfig, train
from phiforge.train.losses import (
    MARGIN_LOSSES,
    PREFERENCE_LOSSES,
    SMOOTHED_LOSSES,
    LossSum,
    PairScores,
    head_weight,
    token_losses,
)
from phiforge.train.pairs import (
    PairBatch,
    PairSteps,
    Reference,
    TokenPair,
    separate_tokens,
    tokenize,
)
from phiforge.train.pretrain import model_folder

VERSION = 1


class DPOConfig(LoopConfig):
    """Settings of DPO; the report publishes none of them (defaults: phi4-spec §9)."""

    lr: float = Field(default=5e-7, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    start: str = Field(default="sft", description="Stage whose weights are trained; the reference.")
    pairs: str = Field(
        default="pivotal/pairs.jsonl", description="STAGE/FILE of the pairs, among the inputs."
    )
    epochs: int = Field(default=1, gt=0, description="Times every pair comes.")
    pairs_per_step: int = Field(default=32, gt=0, description="Pairs per optimizer step.")
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"] = Field(
        default="sigmoid", description="Preference loss."
    )
    beta: float = Field(
        default=0.1, gt=0, description="Strength of the pull to the reference; larger stays closer."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of pairs taken as mislabelled."
    )

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but loss {self.loss!r} does not read "
                f"it; use one of {', '.join(sorted(SMOOTHED_LOSSES))}"
            )
        return self


def run(config: DPOConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Train inputs[config.start]'s weights on the pairs; writes out/model.

    Without a single pair the weights pass unchanged, and a line says so. Raises ValueError for a
    pair that is longer than the model's context.
    """
    folder = model_folder(inputs, config.start)
    model, tokenizer = huggingface.load(folder, dtype="float32")
    pairs = [tokenize(pair, tokenizer) for pair in read_records(_pairs_file(config, inputs), Pair)]
    _check_lengths(pairs, model.config.max_position_embeddings)
    if not pairs:
        out.note("no pairs to train on: the weights pass unchanged")
        huggingface.save(model, tokenizer, out.path / "model", dtype=config.save_dtype)
        return {"pairs": 0, "steps": 0}
    set_threads(out.exec)
    model.to(resolve_device(out.exec.device))
    model.compute_dtype = resolve_dtype(config.dtype)
    zeros = torch.zeros(len(pairs))
    steps = PairSteps(
        pairs,
        Reference(zeros, zeros),
        config.pairs_per_step,
        out.exec.micro_tokens,
        tokenizer.pad_id,
        config.seed,
    )
    key = _reference_key(pairs, folder, config.dtype)
    with _kernels(model, out):
        reference = cached_reference(out, key, model, steps)
    steps = steps.with_reference(reference)
    policy_tokens = sum(steps.batch(i).num_tokens for i in range(steps.steps_per_epoch))
    metrics = train(
        model,
        config,
        config.epochs * steps.steps_per_epoch,
        steps.batch,
        lambda model, part: preference_loss(
            model, part, config.loss, config.beta, config.label_smoothing
        ),
        out,
        context=max(len(ids) for pair in pairs for ids in pair.inputs),
        planned_tokens=config.epochs * policy_tokens,
        fixed_shapes=False,
    )
    huggingface.save(model, tokenizer, out.path / "model", dtype=config.save_dtype)
    single = sum(pair.single_token for pair in pairs)
    with _kernels(model, out):
        statistics = preference_statistics(model, steps, config.beta)
    return {
        **metrics,
        "pairs": len(pairs),
        "single_token_pairs": single,
        "policy_tokens_per_epoch": policy_tokens,
        "policy_tokens_separately": separate_tokens(pairs),
        **statistics,
    }


def _kernels(model: Phi, out: StageDir) -> AbstractContextManager[Any]:
    """Compute as the training loop will, so that at its start the margins are 0."""
    device = model.embedding.weight.device
    kernels, _ = choose_kernels(out.exec, device, compiled=out.exec.compile == "on")
    return nullcontext() if kernels is None else fused(model, kernels)


def preference_loss(
    model: Phi, batch: PairBatch, loss: str, beta: float, label_smoothing: float = 0.0
) -> LossSum:
    """A preference loss summed over the pairs of a micro-batch, with margin and accuracy to log.

    For one-token sides and losses of the margin the softmax normaliser cancels: only two rows of
    the head are read per pair. The head multiplies in fp32: margins are small differences.
    """
    value_n = _token_values(model, batch, margin_only=loss in MARGIN_LOSSES)
    sums_s = _by_side(value_n, batch)
    lengths_s = _by_side(torch.ones_like(value_n), batch)
    p = batch.num_pairs
    scores = PairScores(
        sums_s[:p] - batch.reference_chosen_p,
        sums_s[p:] - batch.reference_rejected_p,
        lengths_s[:p],
        lengths_s[p:],
    )
    loss_p = PREFERENCE_LOSSES[loss](scores, beta, label_smoothing)
    margin_p = beta * (scores.chosen_p - scores.rejected_p).detach()
    sums = {"margin": margin_p.sum(), "accuracy": (margin_p > 0).float().sum()}
    return LossSum(loss_p.sum(), sums)


@torch.no_grad()
def completion_logprobs(model: Phi, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the chosen and of the rejected sides, each [p] in fp32."""
    sums_s = _by_side(_token_values(model, batch, margin_only=False), batch)
    return sums_s[: batch.num_pairs], sums_s[batch.num_pairs :]


def _token_values(model: Phi, batch: PairBatch, margin_only: bool) -> Tensor:
    """log p of each completion token, [n] in fp32; `margin_only`: up to what both sides share.

    One-token sides are predicted at one place: one softmax serves both, or none for the margin.
    """
    weight_vd = head_weight(model)
    x_nd = _completion_states(model, batch)
    if not batch.single_token:
        return -token_losses(x_nd, weight_vd, batch.target_n, model.kernels)
    rows_nd = torch.nn.functional.embedding(batch.target_n, weight_vd).float()
    logit_n = (x_nd * rows_nd).sum(dim=-1)
    if margin_only:
        return logit_n
    p = batch.num_pairs
    loss_p = token_losses(x_nd[:p], weight_vd, batch.target_n[:p], model.kernels)
    return torch.cat([-loss_p, logit_n[p:] - logit_n[:p] - loss_p])


def _completion_states(model: Phi, batch: PairBatch) -> Tensor:
    """What enters the head where completion tokens are predicted, [n, d] in fp32."""
    x_btd = model.hidden(
        batch.token_ids_bt, positions_bt=batch.positions_bt, documents_bt=batch.documents_bt
    )
    return x_btd.flatten(0, 1).index_select(0, batch.place_n).float()


def _by_side(value_n: Tensor, batch: PairBatch) -> Tensor:
    """Sums over the tokens of each side, [2 p]: chosen sides, then rejected ones."""
    sums = torch.zeros(2 * batch.num_pairs, dtype=value_n.dtype, device=value_n.device)
    return sums.index_add(0, batch.side_n, value_n)


def cached_reference(out: StageDir, key: str, model: Phi, steps: PairSteps) -> Reference:
    """The reference values in out/reference.safetensors, computed when absent or of another key."""
    path = out.path / "reference.safetensors"
    if path.exists():
        found = _read_reference(path, key)
        if found is not None:
            return found
        out.note(f"{path.name} is damaged or of other pairs or weights: computed again")
    reference = compute_reference(model, steps, out)
    tensors = {"chosen": reference.chosen_p, "rejected": reference.rejected_p}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"sha256_of_pairs_and_weights": key})
    return reference


def compute_reference(model: Phi, steps: PairSteps, out: StageDir) -> Reference:
    """One pass over all pairs with the weights as they are."""
    chosen, rejected = [], []
    device = model.embedding.weight.device
    with out.progress(len(steps.pairs), "pair", f"{out.name} ref") as bar:
        for part in steps.everything():
            sums = completion_logprobs(model, part.to(device))
            chosen.append(sums[0].cpu())
            rejected.append(sums[1].cpu())
            bar.advance(part.num_pairs)
    return Reference(torch.cat(chosen), torch.cat(rejected))


def _read_reference(path: Path, key: str) -> Reference | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sha256_of_pairs_and_weights") != key:
                return None
            return Reference(file.get_tensor("chosen"), file.get_tensor("rejected"))
    except SafetensorError:
        return None


def _reference_key(pairs: Sequence[TokenPair], folder: Path, dtype: str) -> str:
    """A hash of everything the reference values depend on."""
    digest = hashlib.sha256(f"{content_hash(folder)} {dtype}\n".encode())
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode())
    return digest.hexdigest()


def preference_statistics(model: Phi, steps: PairSteps, beta: float) -> dict[str, float]:
    """Means over all pairs after training: margin, accuracy, and how far log-probabilities moved.

    `chosen_change` and `rejected_change` are log p(trained) - log p(start), in nats per side: both
    falling means that probability leaves for tokens no pair names.
    """
    chosen, rejected = [], []
    for part in steps.everything():
        sums = completion_logprobs(model, part.to(model.embedding.weight.device))
        chosen.append(sums[0].cpu() - part.reference_chosen_p)
        rejected.append(sums[1].cpu() - part.reference_rejected_p)
    chosen_p, rejected_p = torch.cat(chosen), torch.cat(rejected)
    margin_p = beta * (chosen_p - rejected_p)
    return {
        "margin": margin_p.mean().item(),
        "accuracy": (margin_p > 0).float().mean().item(),
        "chosen_change": chosen_p.mean().item(),
        "rejected_change": rejected_p.mean().item(),
    }


def _pairs_file(config: DPOConfig, inputs: Inputs) -> Path:
    stage, _, name = config.pairs.partition("/")
    if stage not in inputs or not name:
        raise ValueError(
            f"pairs is {config.pairs!r}; it must be STAGE/FILE with STAGE one of "
            f"{', '.join(inputs)}"
        )
    return inputs[stage] / name


def _check_lengths(pairs: Sequence[TokenPair], limit: int) -> None:
    for pair in pairs:
        longest = max(map(len, pair.inputs))
        if longest > limit:
            raise ValueError(
                f"pair {pair.id} has {longest} tokens; the model was made for {limit}. Drop or "
                "shorten the pair: cutting it here would train on something else"
            )
