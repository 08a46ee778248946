"""What a search is told and what it gives: Settings, PivotalToken, SearchedPath, QuestionResult.

Plain frozen dataclasses; `Settings(...)` checks its values. Nothing is computed or written here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from phiforge.core.records import Pair, Problem
from phiforge.posttrain.pivotal.estimates import Estimate, Ledger
from phiforge.posttrain.pivotal.walk import EFFORTS

METHODS = ("paper", *EFFORTS)
PathChoice = Literal["balanced", "natural"]
PairsFrom = Literal["pivotal", "all_prefixes"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes the result of a search. Raises ValueError for a value out of its range."""

    method: str = "paper"
    gap: float = 0.2
    band: tuple[float, float] = (0.2, 0.8)
    n_filter: int = 32
    n_rollouts: int = 64
    temperature: float = 1.0
    max_tokens: int = 512
    paths_per_question: int = 2
    path_choice: PathChoice = "balanced"
    pairs_from: PairsFrom = "pivotal"
    pair_gap: float | None = None
    min_count: int = 3
    n_pair: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.band
        checks: list[tuple[str, Any, bool, str]] = [
            ("method", self.method, self.method in METHODS, ", ".join(METHODS)),
            ("gap", self.gap, 0 < self.gap <= 1, "above 0, at most 1"),
            ("band", self.band, 0 <= low <= high <= 1, "two values, 0 <= low <= high <= 1"),
            ("n_filter", self.n_filter, self.n_filter >= 2, "at least 2"),
            ("n_rollouts", self.n_rollouts, self.n_rollouts >= 2, "at least 2"),
            ("temperature", self.temperature, self.temperature > 0, "above 0 (p is a share)"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("paths_per_question", self.paths_per_question, self.paths_per_question >= 1, "≥ 1"),
            ("min_count", self.min_count, self.min_count >= 1, "at least 1"),
            ("n_pair", self.n_pair, self.n_pair >= 2, "at least 2"),
            (
                "pair_gap",
                self.pair_gap,
                self.pair_gap is None or 0 < self.pair_gap <= 1,
                "above 0, at most 1, or none for the gap",
            ),
            ("path_choice", self.path_choice, self.path_choice in ("balanced", "natural"), ""),
            ("pairs_from", self.pairs_from, self.pairs_from in ("pivotal", "all_prefixes"), ""),
        ]
        words = {"path_choice": "balanced or natural", "pairs_from": "pivotal or all_prefixes"}
        for name, value, good, allowed in checks:
            if not good:
                raise ValueError(f"pivotal: {name} is {value!r}; allowed: {allowed or words[name]}")


@dataclass(frozen=True, kw_only=True)
class PivotalToken:
    """A token that moves p(success) by at least the gap.

    `prefix_token_ids` is the prompt and the path before the token; `interval` the 95% interval of
    `delta` = p_after - p_before. Adaptive methods measure it on rollouts that did not find the
    token: n_after continue after it, n_off leave the path at it (p_off), delta is
    (1 - probability of the token) (p_after - p_off), and `p_value` tests that it is 0 (Fisher).
    The paper's method has n_before in place of n_off, and measures on the samples that also found
    the token, so its |delta| runs high (winner's curse).
    """

    problem_id: str
    path: int
    position: int
    prompt_token_ids: list[int]
    prefix_token_ids: list[int]
    token_id: int
    logprob: float
    p_before: float
    p_after: float
    delta: float
    interval: tuple[float, float]
    n_after: int
    successes_after: int
    n_before: int | None = None
    successes_before: int | None = None
    n_off: int | None = None
    successes_off: int | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchedPath:
    """A sampled answer and p along it: p[i] is after i tokens, None where unknown.

    `estimates` are the counts of the rollouts drawn at a prefix itself, None where there are none;
    adaptive methods know p everywhere, from all rollouts of the question.
    """

    token_ids: list[int]
    logprobs: list[float]
    success: bool
    p: list[float | None]
    estimates: list[Estimate | None]
    pivotal: list[int]
    undecided: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class QuestionResult:
    """Everything one question gave.

    `status`: "searched", "below band", "above band" or "unscored" (no rollout could be scored).
    """

    problem: Problem
    prompt_token_ids: list[int]
    status: str
    root: Estimate | None
    paths: list[SearchedPath] = field(default_factory=list)
    tokens: list[PivotalToken] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    ledger: Ledger
