"""What a benchmark consists of: groups of contestants that do the same works on the same model.

`Group(name, title, entrants, works, comparisons, ...)`; `engine_plan.py` and `train_plan.py` make
them. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from phiforge.model.config import PhiConfig

Task = Literal["engine", "train"]
OURS = "phiforge"
# What a comparison may name in place of a peer: what this run measured, what a data sheet states.
LIMIT, PEAK = "the limit", "the chip's stated peak"


@dataclass(frozen=True)
class Entrant:
    """One contestant of a group: a row of the table.

    `program` is "phiforge" or a peer's name, `settings` go with its "prepare" request. Matrices
    multiply in `dtype`, whose measured rate limits it; weights are kept in `format`, which is what
    a decode step reads. `works` names the works it takes part in, None for all.
    """

    label: str
    program: str
    settings: Mapping[str, Any]
    dtype: Literal["fp32", "bf16"]
    format: str = "fp32"
    works: tuple[str, ...] | None = None

    def takes(self, work: str) -> bool:
        """Whether it takes part in a work."""
        return self.works is None or work in self.works


@dataclass(frozen=True)
class Work:
    """One thing to measure: `request(round)` is what every contestant is asked in a round.

    `rows` share one reading of the weights in a decode step; `context` tokens are in sight on
    average. `greedy` says that tokens can be compared.
    """

    name: str
    title: str
    request: Callable[[int], Mapping[str, Any]]
    rows: int
    context: int
    greedy: bool = False


@dataclass(frozen=True)
class Comparison:
    """A line below the table: ours over a peer, or ours as a share of LIMIT or PEAK."""

    work: str
    ours: str
    peer: str
    bar: float | None = None  # what the project set out to reach


@dataclass(frozen=True)
class Group:
    """Contestants on one model. `limits` is what the limits process is asked once a round.

    `reference` names the entrant whose greedy tokens (or losses) the others are held against, and
    `must_equal` those that must give the same. `peak_flops`: FLOP/s the chip's maker states.
    """

    name: str
    title: str
    task: Task
    device: Literal["cpu", "cuda"]
    config: PhiConfig
    entrants: tuple[Entrant, ...]
    works: tuple[Work, ...]
    limits: Mapping[str, Any]
    comparisons: tuple[Comparison, ...] = ()
    reference: str | None = None
    must_equal: tuple[str, ...] = ()
    peak_flops: float | None = None
