"""What `bench train` measures: the real training step, on the nano recipe's shape and at ~100M.

`groups(sizes, quick, setting)` yields a Group per model, its files written when it is reached.
Written into the setting's folder: model folders and batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phiforge.bench.engine_plan import MOST_LAYERS, Setting, small_100m_config, tiny_config
from phiforge.bench.models import tokenizer_of, write_batches, write_model
from phiforge.bench.plan import LIMIT, OURS, PEAK, Comparison, Entrant, Group, Work
from phiforge.bench.roofline import step_shapes
from phiforge.model.config import PhiConfig
from phiforge.recipe import load_recipe

# The optimizer's settings, the same for everyone; a rate so small that rounding does not part runs.
OPTIMIZER: dict[str, Any] = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
}
H200_FLOPS = 989e12  # dense bf16 of an H100 or H200, as their data sheets state it


@dataclass(frozen=True)
class Step:
    """What one optimizer step eats: rows of `context` tokens, `micro_rows` at a time."""

    rows: int
    context: int
    micro_rows: int
    steps_per_run: int
    document_tokens: tuple[int, int] | None = None  # None: one document a row

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.context


def groups(sizes: Sequence[str], quick: bool, setting: Setting) -> Iterator[Group]:
    """The groups of the sizes asked for, one after the other."""
    if quick:
        yield _tiny(setting)
        return
    makers = {"nano": _nano, "small-100m": _small_100m, "phi-4-layers": _phi_4_layers}
    for size in sizes:
        yield makers[size](setting)


def nano_step() -> tuple[PhiConfig, Step, int]:
    """The nano recipe's model, its step, and the tokens it plans."""
    pretrain = load_recipe("nano").configs["pretrain"]
    tokens, context = pretrain.tokens_per_step, pretrain.context  # type: ignore[attr-defined]
    vocab_size = load_recipe("nano").configs["tokenizer"].vocab_size  # type: ignore[attr-defined]
    config = pretrain.model.build(tokenizer_of(vocab_size), context)  # type: ignore[attr-defined]
    rows = tokens // context
    step = Step(rows, context, rows, steps_per_run=10, document_tokens=(24, 104))
    return config, step, pretrain.steps * tokens  # type: ignore[attr-defined]


def _nano(setting: Setting) -> Group:
    config, step, planned = nano_step()
    prepared = _Prepared(setting, "nano", config, step, planned)
    entrants = [*prepared.ours("bf16"), *prepared.ours("fp32"), *prepared.peers(fp32=True)]
    comparisons = [
        comparison
        for kernels in setting.kernels
        for comparison in (
            Comparison("step", f"{OURS} {kernels} bf16", "transformers bf16", 2.0),
            Comparison("step", f"{OURS} {kernels} bf16", "transformers bf16 compiled"),
            Comparison("step", f"{OURS} {kernels} fp32", "transformers fp32"),
            Comparison("step", f"{OURS} {kernels} bf16", "litgpt bf16"),
        )
    ]
    return prepared.group(entrants, comparisons, "its documents are packed; litgpt has no masks")


def _small_100m(setting: Setting) -> Group:
    # All contestants stay in memory: 4,096 tokens a step took 21 GB together, half as many fit.
    step = Step(rows=4, context=512, micro_rows=4, steps_per_run=1)
    prepared = _Prepared(setting, "small-100m", small_100m_config(), step, planned=10**9)
    entrants = [*prepared.ours("bf16"), *prepared.peers(fp32=True)]
    comparisons = [
        comparison
        for kernels in setting.kernels
        for comparison in (
            Comparison("step", f"{OURS} {kernels} bf16", "transformers bf16", 1.35),
            Comparison("step", f"{OURS} {kernels} bf16", "transformers bf16 compiled", 1.1),
            Comparison("step", f"{OURS} {kernels} bf16", "litgpt bf16", 1.0),
            Comparison("step", f"{OURS} {kernels} bf16", LIMIT, 0.75),
        )
    ]
    return prepared.group(entrants, comparisons, "one document a row")


def _phi_4_layers(setting: Setting) -> Group:
    """As many of phi-4's layers as fit when all contestants share the GPU."""
    step = Step(rows=4, context=4096, micro_rows=1, steps_per_run=2)
    config = PhiConfig.preset("phi-4-4k")
    layer = config.num_parameters - config.replace(num_layers=config.num_layers - 1).num_parameters
    tables = config.num_parameters - config.num_layers * layer
    contestants = 1 + 2 * ("transformers" in setting.peers) + ("litgpt" in setting.peers)
    # 16 bytes a parameter (fp32 values, gradients, AdamW's two), a quarter for activations.
    room = 0.75 * setting.gpu_bytes / contestants / 16
    config = config.replace(num_layers=max(1, min(MOST_LAYERS, int((room - tables) / layer))))
    prepared = _Prepared(setting, "phi-4-layers", config, step, 10**12, device="cuda")
    entrants = [*prepared.ours("bf16", compile="on"), *prepared.peers(fp32=False)]
    ours = f"{OURS} torch bf16 compiled"
    comparisons = (
        Comparison("step", ours, "transformers bf16"),
        Comparison("step", ours, "transformers bf16 compiled"),
        Comparison("step", ours, "litgpt bf16"),
        Comparison("step", ours, LIMIT),
        Comparison("step", ours, PEAK, 0.5),
    )
    return prepared.group(entrants, comparisons, f"{config.num_layers} layers")


def _tiny(setting: Setting) -> Group:
    step = Step(rows=2, context=32, micro_rows=2, steps_per_run=2, document_tokens=(6, 14))
    prepared = _Prepared(setting, "tiny", tiny_config(), step, planned=10**6)
    entrants = [*prepared.ours("fp32"), *prepared.peers(fp32=True, bf16=False)]
    comparisons = (Comparison("step", entrants[0].label, "transformers fp32"),)
    return prepared.group(entrants, comparisons, "to see that the benchmark works")


class _Prepared:
    """A model and its batches on disk, and the contestants on them."""

    def __init__(
        self,
        setting: Setting,
        name: str,
        config: PhiConfig,
        step: Step,
        planned: int,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.setting, self.name, self.config, self.step = setting, name, config, step
        self.device: Literal["cpu", "cuda"] = device
        self.folder = setting.folder / f"train-{name}"
        self.batches = setting.folder / f"train-{name}.npz"
        write_model(config, self.folder, "bfloat16" if device == "cuda" else "float32")
        num = max(4, 4 * step.steps_per_run)
        write_batches(
            self.batches, config.vocab_size, num, step.rows, step.context, step.document_tokens
        )
        self.planned = planned

    def ours(self, dtype: Literal["fp32", "bf16"], compile: str = "auto") -> list[Entrant]:
        """The loop of phiforge.train, with each kind of kernels; `compile` as in a recipe's exec
        block, where compiled layers leave no place for own kernels."""
        kinds = self.setting.kernels if self.device == "cpu" and compile != "on" else ("torch",)
        return [self._ours(dtype, kernels, compile) for kernels in kinds]

    def _ours(self, dtype: Literal["fp32", "bf16"], kernels: str, compile: str) -> Entrant:
        label = f"{OURS} {kernels} {dtype}" + (" compiled" if compile == "on" else "")
        scratch = str(self.setting.folder / f"scratch-{self.name}-{kernels}-{dtype}-{compile}")
        own = {"compile": compile, "kernels": kernels, "planned_tokens": self.planned}
        return Entrant(label, OURS, {**self._settings(dtype), **own, "scratch": scratch}, dtype)

    def peers(self, fp32: bool, bf16: bool = True) -> list[Entrant]:
        """The peers there are: transformers eager and compiled, litgpt."""
        found = []
        if "transformers" in self.setting.peers:
            if fp32:
                found.append(self._peer("transformers", "fp32"))
            if bf16:
                found.append(self._peer("transformers", "bf16"))
                found.append(self._peer("transformers", "bf16", compile=True))
        if "litgpt" in self.setting.peers and bf16:
            found.append(self._peer("litgpt", "bf16"))
        return found

    def group(
        self, entrants: Sequence[Entrant], comparisons: Sequence[Comparison], note: str
    ) -> Group:
        """The group, with one work: some steps."""
        step = self.step
        title = f"{self.config.num_parameters:,} parameters, {step.tokens:,} tokens a step"
        work = Work(
            "step",
            f"training steps of {step.rows} rows x {step.context} tokens, {note}",
            lambda round: {"steps": step.steps_per_run},
            rows=step.rows,
            context=step.context,
        )
        fp32 = [e.label for e in entrants if e.dtype == "fp32" and e.program == OURS]
        return Group(
            name=self.name,
            title=f"{self.name}: {title}, {self.setting.threads} threads",
            task="train",
            device=self.device,
            config=self.config,
            entrants=tuple(entrants),
            works=(work,),
            limits={
                "dtypes": sorted({entrant.dtype for entrant in entrants}),
                "shapes": step_shapes(self.config, step.micro_rows * step.context),
            },
            comparisons=tuple(comparisons),
            reference=fp32[0] if fp32 else entrants[0].label,
            must_equal=tuple(e.label for e in entrants if e.program != "litgpt"),
            peak_flops=H200_FLOPS if self.device == "cuda" else None,
        )

    def _peer(self, name: str, dtype: Literal["fp32", "bf16"], compile: bool = False) -> Entrant:
        label = f"{name} {dtype}" + (" compiled" if compile else "")
        return Entrant(label, name, {**self._settings(dtype), "compile": compile}, dtype)

    def _settings(self, dtype: str) -> dict[str, Any]:
        return {
            "model": str(self.folder),
            "batches": str(self.batches),
            "dtype": dtype,
            "threads": self.setting.threads,
            "device": self.device,
            "context": self.step.context,
            "micro_rows": self.step.micro_rows,
            **OPTIMIZER,
        }
