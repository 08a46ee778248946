"""Base classes of every stage's settings: what shapes a result, and where it runs.

`StageConfig` is what a stage is asked to do; it enters the stage's fingerprint.
`Exec` is where it runs (devices, threads, micro-batch, compile); it never does.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class StageConfig(BaseModel):
    """What shapes a stage's result. Unknown keys are errors; instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    seed: int = Field(default=0, description="Seed of every random choice; set once per recipe.")


class Exec(BaseModel):
    """Where and how a stage runs. Changing it changes speed, not what is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of models; auto takes a GPU when torch sees one."
    )
    threads: int = Field(default=0, ge=0, description="Torch CPU threads; 0 = one per core.")
    workers: int = Field(default=0, ge=0, description="Data processes; 0 = one per core.")
    micro_tokens: int = Field(
        default=4096, ge=1, description="Tokens per forward pass in training; bounds memory."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile in training; auto decides from planned steps."
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="Own C++ kernels in training on a CPU; auto takes them where they compile.",
    )
    rows: int = Field(default=256, ge=1, description="Most rows the sampling engine runs at once.")
