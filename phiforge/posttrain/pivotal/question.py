"""One question's search as a coroutine: question filter, paths, `Subdivide` on each, pairs.

`investigate(...)` yields the rollouts it needs (lists of `Request`) and is resumed once they are in
its ledger; it returns a `QuestionResult`. It never calls an engine, so many run at once.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phiforge.core.records import Pair, Problem
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.estimates import (
    Estimate,
    Ledger,
    Prefix,
    Request,
    Rollout,
    difference_interval,
)
from phiforge.posttrain.pivotal.pairs import make_pair
from phiforge.posttrain.pivotal.subdivide import TOLERANCE, Found, subdivide

PathChoice = Literal["balanced", "natural"]
PairsFrom = Literal["pivotal", "all_prefixes"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes the result of a search. Raises ValueError for a value out of its range."""

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
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.band
        checks: list[tuple[str, Any, bool, str]] = [
            ("gap", self.gap, 0 < self.gap <= 1, "above 0, at most 1"),
            ("band", self.band, 0 <= low <= high <= 1, "two values, 0 <= low <= high <= 1"),
            ("n_filter", self.n_filter, self.n_filter >= 2, "at least 2"),
            ("n_rollouts", self.n_rollouts, self.n_rollouts >= 2, "at least 2"),
            ("temperature", self.temperature, self.temperature > 0, "above 0 (p is a share)"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("paths_per_question", self.paths_per_question, self.paths_per_question >= 1, "≥ 1"),
            ("min_count", self.min_count, self.min_count >= 1, "at least 1"),
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

    `prefix_token_ids` is the prompt and the path before the token. `interval` is Newcombe's 95%
    interval of `delta` = p_after - p_before on the samples that also found it, so |delta| runs high
    (winner's curse) until a confirm pass draws fresh ones.
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
    n_before: int
    successes_before: int
    n_after: int
    successes_after: int


@dataclass(frozen=True, kw_only=True)
class SearchedPath:
    """A sampled answer and p along it: estimate i is after i tokens, None where unknown."""

    token_ids: list[int]
    logprobs: list[float]
    success: bool
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


def investigate(
    problem: Problem,
    prompt_token_ids: Prefix,
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
) -> Generator[list[Request], None, QuestionResult]:
    """Run the report's algorithm on one question.

    Yields the requests of a round; whoever drives it adds their rollouts to `ledger` before
    resuming. Every prefix is asked for once: what the ledger has is never drawn again, and samples
    that top up the filter's own start at the next sample index.
    """
    request = ledger.missing((), settings.n_filter, "filter")
    assert request is not None
    yield [request]
    root = ledger.estimate(())
    status = _screen(root, settings.band)
    if status != "searched":
        return QuestionResult(
            problem=problem,
            prompt_token_ids=list(prompt_token_ids),
            status=status,
            root=root,
            ledger=ledger,
        )
    chosen = choose_paths(ledger.rollouts[()], settings.paths_per_question, settings.path_choice)
    for rollout in chosen:
        ledger.finish(rollout.token_ids, bool(rollout.success))
    found = yield from _bisect_together(chosen, ledger, settings)
    paths = [_searched(r, f, ledger) for r, f in zip(chosen, found, strict=True)]
    return QuestionResult(
        problem=problem,
        prompt_token_ids=list(prompt_token_ids),
        status=status,
        root=ledger.estimate(()),
        paths=paths,
        tokens=_tokens(problem, prompt_token_ids, paths),
        pairs=_pairs(problem, prompt_token_ids, paths, ledger, settings, tokenizer),
        ledger=ledger,
    )


def _screen(root: Estimate | None, band: tuple[float, float]) -> str:
    if root is None:
        return "unscored"
    if root.p < band[0] - TOLERANCE:
        return "below band"
    return "above band" if root.p > band[1] + TOLERANCE else "searched"


def choose_paths(rollouts: Sequence[Rollout], count: int, choice: PathChoice) -> list[Rollout]:
    """Pick up to `count` different scored rollouts, in sample order, as paths to search.

    "balanced" alternates success, failure, success, ... (one kind runs out: the other goes on);
    "natural" takes them as they came, so that paths follow the sampler's own law.
    """
    different: dict[Prefix, Rollout] = {}
    for rollout in rollouts:
        if rollout.success is not None and rollout.token_ids:
            different.setdefault(rollout.token_ids, rollout)
    if choice == "natural":
        return list(different.values())[:count]
    wins = [r for r in different.values() if r.success]
    losses = [r for r in different.values() if not r.success]
    picked: list[Rollout] = []
    while len(picked) < count and (wins or losses):
        side = wins if (len(picked) % 2 == 0 and wins) or not losses else losses
        picked.append(side.pop(0))
    return picked


def _bisect_together(
    paths: Sequence[Rollout], ledger: Ledger, settings: Settings
) -> Generator[list[Request], None, list[Found]]:
    """Advance the bisections of all paths level by level, one shared round of requests a level."""
    searches = [subdivide(path.logprobs or (), settings.gap) for path in paths]
    found: dict[int, Found] = {}
    wanted: dict[int, list[int]] = {}
    for i, search in enumerate(searches):
        wanted[i] = next(search)
    while wanted:
        prefixes = dict.fromkeys(paths[i].token_ids[:k] for i, ks in wanted.items() for k in ks)
        requests = [ledger.missing(prefix, settings.n_rollouts) for prefix in prefixes]
        needed = [request for request in requests if request]
        if needed:
            yield needed
        for i, lengths in list(wanted.items()):
            values = {k: ledger.p(paths[i].token_ids[:k]) for k in lengths}
            try:
                wanted[i] = searches[i].send(values)
            except StopIteration as stop:
                found[i] = stop.value
                del wanted[i]
    return [found[i] for i in range(len(paths))]


def _searched(rollout: Rollout, found: Found, ledger: Ledger) -> SearchedPath:
    ids = rollout.token_ids
    assert rollout.logprobs is not None, "paths are chosen from rollouts drawn with logprobs"
    assert len(rollout.logprobs) == len(ids)
    return SearchedPath(
        token_ids=list(ids),
        logprobs=list(rollout.logprobs),
        success=bool(rollout.success),
        estimates=[ledger.estimate(ids[:k]) for k in range(len(ids) + 1)],
        pivotal=list(found.pivotal),
        undecided=list(found.undecided),
    )


def _tokens(
    problem: Problem, prompt_token_ids: Prefix, paths: Sequence[SearchedPath]
) -> list[PivotalToken]:
    """Pivotal tokens in path order; one that two paths share is reported once."""
    tokens: dict[tuple[int, ...], PivotalToken] = {}
    for number, path in enumerate(paths):
        for i in path.pivotal:
            before, after = path.estimates[i], path.estimates[i + 1]
            assert before is not None
            assert after is not None
            token = PivotalToken(
                problem_id=problem.id,
                path=number,
                position=i,
                prompt_token_ids=list(prompt_token_ids),
                prefix_token_ids=[*prompt_token_ids, *path.token_ids[:i]],
                token_id=path.token_ids[i],
                logprob=path.logprobs[i],
                p_before=before.p,
                p_after=after.p,
                delta=after.p - before.p,
                interval=difference_interval(before, after),
                n_before=before.n,
                successes_before=before.successes,
                n_after=after.n,
                successes_after=after.successes,
            )
            tokens.setdefault(tuple(path.token_ids[: i + 1]), token)
    return list(tokens.values())


def _pairs(
    problem: Problem,
    prompt_token_ids: Prefix,
    paths: Sequence[SearchedPath],
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
) -> list[Pair]:
    """One pair at most per prefix: before each pivotal token, or at every prefix with rollouts."""
    pivotal = dict.fromkeys(tuple(path.token_ids[:i]) for path in paths for i in path.pivotal)
    prefixes = pivotal if settings.pairs_from == "pivotal" else ledger.prefixes
    pairs: list[Pair] = []
    for prefix in prefixes:
        pair = make_pair(
            problem,
            prompt_token_ids,
            prefix,
            ledger,
            tokenizer,
            gap=settings.gap if settings.pair_gap is None else settings.pair_gap,
            min_count=settings.min_count,
            stop_ids=tokenizer.stop_ids,
            source="pivotal" if prefix in pivotal else "prefix",
            number=len(pairs),
        )
        if pair is not None:
            pairs.append(pair)
    return pairs
