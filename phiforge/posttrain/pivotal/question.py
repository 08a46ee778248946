"""One question's search as a coroutine: question filter, choice of paths, then the method.

`investigate(...)` yields the rollouts it needs (lists of `Request`) and is resumed once they are in
its ledger; it returns a `QuestionResult`. It never calls an engine, so many run at once.
"""

from collections.abc import Generator, Sequence

from phiforge.core.records import Problem
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.adaptive import investigate_paths
from phiforge.posttrain.pivotal.estimates import Estimate, Ledger, Prefix, Request, Rollout
from phiforge.posttrain.pivotal.paper import bisect_paths
from phiforge.posttrain.pivotal.results import PathChoice, QuestionResult, Settings
from phiforge.posttrain.pivotal.subdivide import TOLERANCE


def investigate(
    problem: Problem,
    prompt_token_ids: Prefix,
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
    given: Sequence[Rollout] = (),
) -> Generator[list[Request], None, QuestionResult]:
    """Search one question by `settings.method`.

    Yields the requests of a round; whoever drives it adds their rollouts to `ledger` before
    resuming. `given` are paths to search in place of sampled ones.
    """
    request = ledger.missing((), settings.n_filter, "filter")
    assert request is not None
    yield [request]
    root = ledger.estimate(())
    status = _screen(root, settings.band)
    if status != "searched" and not given:
        return QuestionResult(
            problem=problem,
            prompt_token_ids=list(prompt_token_ids),
            status=status,
            root=root,
            ledger=ledger,
        )
    chosen = list(given) or choose_paths(
        ledger.rollouts[()], settings.paths_per_question, settings.path_choice
    )
    for rollout in chosen:
        ledger.finish(rollout.token_ids, bool(rollout.success))
    method = bisect_paths if settings.method == "paper" else investigate_paths
    paths, tokens, pairs = yield from method(
        problem, prompt_token_ids, chosen, ledger, settings, tokenizer
    )
    return QuestionResult(
        problem=problem,
        prompt_token_ids=list(prompt_token_ids),
        status=status,
        root=ledger.estimate(()),
        paths=paths,
        tokens=tokens,
        pairs=pairs,
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
