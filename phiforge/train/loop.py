"""The one training loop: pretraining, midtraining, SFT and DPO differ in batches and loss alone.

`train(model, config, steps, batch, loss, out)` trains in place, returns metrics; `batch(step)` is a
pure function of the step, so resuming needs the step alone. Writes out.state/checkpoints and one
line per step to metrics.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from phiforge.core.distributed import resolve_device, resolve_dtype, set_threads
from phiforge.core.progress import Bar
from phiforge.core.store import Metrics, StageDir, differences
from phiforge.model.fused import fused
from phiforge.model.kernels import Kernels
from phiforge.model.phi import Phi
from phiforge.train import checkpoint
from phiforge.train.batch import StepBatch
from phiforge.train.cost import FLOPS_FORMULA, choose_compile, choose_kernels, flops_per_token
from phiforge.train.guard import Guard
from phiforge.train.losses import LossSum
from phiforge.train.optim import OptimConfig, lr_at, make_optimizer
from phiforge.train.update import FusedUpdate, TorchUpdate, Update

Validate = Callable[[Phi], Mapping[str, float]]


class LoopConfig(OptimConfig):
    """Settings of the loop; stages that count epochs add what decides the number of steps."""

    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="What matrices multiply in; parameters stay fp32."
    )
    save_dtype: Literal["bf16", "fp32"] = Field(
        default="fp32",
        description="What the weights are saved in; bf16 halves the files, and rounds away what a "
        "short stage at a small learning rate has changed.",
    )
    checkpoint_every: int = Field(default=200, ge=1, description="Steps between checkpoints.")
    validate_every: int = Field(
        default=0, ge=0, description="Steps between validations; 0 = only at the end."
    )
    spike_sigma: float = Field(
        default=6.0,
        ge=0,
        description="Skip a step whose loss or gradient norm is this many standard deviations "
        "above the rolling mean; 0 = never.",
    )
    spike_window: int = Field(default=128, ge=2, description="Accepted steps the band looks at.")
    max_skipped: int = Field(default=20, ge=0, description="Skips in a row that stop the run.")


class TrainConfig(LoopConfig):
    """Settings of a stage with a planned number of steps of a planned size."""

    steps: int = Field(gt=0, description="Optimizer steps.")
    tokens_per_step: int = Field(gt=0, description="Tokens per optimizer step, over all ranks.")

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be below steps ({self.steps})"
            )
        return self


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors; every number is a total since step 0."""

    guard: Guard
    compiled: bool = False
    kernels: Kernels | None = None
    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    exec: dict[str, Any] = field(default_factory=dict)


def train(
    model: Phi,
    config: LoopConfig,
    steps: int,
    batch: Callable[[int], StepBatch],
    loss: Callable[[Phi, Any], LossSum],
    out: StageDir,
    *,
    context: int,
    planned_tokens: int,
    fixed_shapes: bool = True,
    validate: Validate | None = None,
) -> Metrics:
    """Train `model` in place from wherever `out.state` says, and return the run's metrics.

    `context` (tokens of a row) and `planned_tokens` (in all) serve the FLOP count and the decision
    to compile. Raises TrainingError for a loss that is not finite and for lasting divergence,
    ValueError for checkpoints that are damaged or belong to other settings.
    """
    set_threads(out.exec)
    device = resolve_device(out.exec.device)
    model.to(device)
    model.compute_dtype = resolve_dtype(config.dtype)
    optimizer = make_optimizer(model, config)
    token_flops = flops_per_token(model.config, context)
    state = _start(
        model, config, optimizer, out, device, token_flops * planned_tokens, fixed_shapes
    )

    with (
        _deterministic(device),
        _prepared(model, optimizer, state) as update,
        out.progress(steps, "step") as bar,
    ):
        bar.start_at(state.step)
        for step in range(state.step, steps):
            started = time.perf_counter()
            step_batch = batch(step)
            total, sums = _forward_backward(model, loss, step_batch, device)
            grad_norm = update.clip(config.clip)
            mean_loss, norm = (total / step_batch.num_units).item(), grad_norm.item()
            last = checkpoint.describe_last(_folder(out))
            taken = state.guard.check(step, mean_loss, norm, last)
            lr = lr_at(step, steps, config)
            if taken:
                update.step(lr)
            update.clear()

            _count(state, step_batch, token_flops, time.perf_counter() - started)
            fields = {name: (s / step_batch.num_units).item() for name, s in sums.items()}
            _log(out, bar, state, step_batch, started, mean_loss, lr, norm, taken, fields)
            if validate and config.validate_every and state.step % config.validate_every == 0:
                out.log(step=state.step, **_validate(model, validate))
            if state.step % config.checkpoint_every == 0 or state.step == steps:
                _save(out, model, optimizer, state, config)
        final = _validate(model, validate) if validate else {}
    if final:
        out.log(step=state.step, **final)
    return {**_metrics(state), **final}


def _forward_backward(
    model: Phi, loss: Callable[[Phi, Any], LossSum], step_batch: StepBatch, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradients of sum(loss) / num_units; returns the summed loss and the sums to log."""
    total = torch.zeros((), device=device)
    sums: dict[str, Tensor] = {}
    for part in step_batch.parts:
        part_loss = loss(model, part.to(device))
        (part_loss.total / step_batch.num_units).backward()
        total += part_loss.total.detach()
        for name, value in part_loss.sums.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
    return total, sums


def _start(
    model: Phi,
    config: LoopConfig,
    optimizer: torch.optim.AdamW,
    out: StageDir,
    device: torch.device,
    planned_flops: float,
    fixed_shapes: bool,
) -> Progress:
    """Progress at the first step to run: fresh, or as the newest checkpoint has it."""
    guard = Guard(config.spike_sigma, config.spike_window, config.max_skipped)
    state = Progress(guard, exec=_exec_fields(out))
    saved = checkpoint.restore(_folder(out), model, optimizer, out.note)
    out.metrics_log.rewind("step", saved["step"] if saved else 0)
    if saved is None:
        state.compiled, why = choose_compile(out.exec, device, planned_flops, fixed_shapes)
        out.note(f"{'compiled' if state.compiled else 'not compiled'}: {why}")
        _choose_kernels(state, out, device, None)
        return state
    changed = differences(saved["config"], config.model_dump(mode="json"))
    if changed:
        raise ValueError(
            f"{_folder(out)} was written with other settings:\n  " + "\n  ".join(changed) + "\nSet "
            "them back, or delete that folder to train from the beginning."
        )
    guard.restore(saved["guard"])
    for name in ("compiled", "step", "tokens", "flops", "seconds"):
        setattr(state, name, saved[name])
    out.note(f"resumed at step {state.step}{', compiled' if state.compiled else ''}")
    _choose_kernels(state, out, device, saved["exec"].setdefault("kernels", "torch"))
    for line in differences(saved["exec"], state.exec):
        out.note(f"exec changed since the checkpoint, so bits may differ: {line}")
    return state


def _choose_kernels(
    state: Progress, out: StageDir, device: torch.device, saved: str | None
) -> None:
    """Own kernels or torch; with auto, a run that began with torch goes on with it."""
    if saved == "torch" and out.exec.kernels == "auto":
        state.kernels, why = None, "as before the checkpoint"
    else:
        state.kernels, why = choose_kernels(out.exec, device, state.compiled)
    state.exec["kernels"] = state.kernels.name if state.kernels else "torch"
    out.note(f"kernels: {state.exec['kernels']} ({why})")


def _save(
    out: StageDir, model: Phi, optimizer: torch.optim.AdamW, state: Progress, config: LoopConfig
) -> None:
    loop = {
        "step": state.step,
        "tokens": state.tokens,
        "flops": state.flops,
        "seconds": state.seconds,
        "compiled": state.compiled,
        "guard": state.guard.state(),
        "config": config.model_dump(mode="json"),
        "exec": state.exec,
    }
    checkpoint.save(_folder(out), model, optimizer, loop, state.step)


def _count(state: Progress, step_batch: StepBatch, token_flops: float, seconds: float) -> None:
    state.step += 1
    state.tokens += step_batch.num_tokens
    state.flops += token_flops * step_batch.num_tokens
    state.seconds += seconds


def _log(
    out: StageDir,
    bar: Bar,
    state: Progress,
    step_batch: StepBatch,
    started: float,
    loss: float,
    lr: float,
    grad_norm: float,
    taken: bool,
    fields: Mapping[str, float],
) -> None:
    rate = step_batch.num_tokens / (time.perf_counter() - started)
    row = {"step": state.step, "loss": loss, "lr": lr, "grad_norm": grad_norm, **fields}
    row |= {"tokens": state.tokens, "tokens_per_second": round(rate, 1)}
    if not taken:
        row["skipped"] = state.guard.skipped
        out.note(f"step {state.step} skipped: loss {loss:.4g}, gradient norm {grad_norm:.4g}")
    out.log(**row)
    bar.advance(1, loss=loss, lr=lr, tok_per_s=rate, **fields)


def _validate(model: Phi, validate: Validate) -> dict[str, float]:
    """Validation without gradients, and never compiled: shapes there differ."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return dict(validate(model))


def _metrics(state: Progress) -> Metrics:
    recent = list(state.guard.losses)[-20:]
    return {
        "loss": sum(recent) / len(recent) if recent else None,
        "steps": state.step,
        "tokens": state.tokens,
        "train_seconds": round(state.seconds, 2),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        "flops": state.flops,
        "flops_formula": FLOPS_FORMULA,
        "skipped_steps": state.guard.skipped,
        "compiled": state.compiled,
        "kernels": state.exec["kernels"],
    }


def _folder(out: StageDir) -> Path:
    return out.state / "checkpoints"


def _exec_fields(out: StageDir) -> dict[str, Any]:
    """What decides bits besides the config: the same numbers need the same threads and cuts."""
    return {
        "device": str(resolve_device(out.exec.device)),
        "threads": torch.get_num_threads(),
        "micro_tokens": out.exec.micro_tokens,
    }


@contextmanager
def _prepared(model: Phi, optimizer: torch.optim.AdamW, state: Progress) -> Iterator[Update]:
    """For the block the decoder (all but the head, whose loss is chunked) runs as was chosen."""
    if state.kernels is not None:
        with fused(model, state.kernels) as decoder:
            yield FusedUpdate(optimizer, decoder)
        return
    if state.compiled:
        model.hidden = torch.compile(model.hidden, dynamic=False)  # shadows the method
    try:
        yield TorchUpdate(optimizer)
    finally:
        if state.compiled:
            del model.hidden


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on CPU, where they cost nothing; on CUDA they would need an
    environment variable set before start, so there runs repeat to rounding only."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
