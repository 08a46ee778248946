"""The report's own search (arXiv 2412.08905 §4.3, Fig. 4): `Subdivide` on every path of a question.

`bisect_paths(...)` is a coroutine like `question.investigate`: it yields the requests of a round
and returns paths, tokens and pairs. It draws the same number of rollouts at every prefix.
"""

from collections.abc import Generator, Sequence

from phiforge.core.records import Pair, Problem
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.estimates import (
    Ledger,
    Prefix,
    Request,
    Rollout,
    difference_interval,
)
from phiforge.posttrain.pivotal.pairs import make_pair
from phiforge.posttrain.pivotal.results import PivotalToken, SearchedPath, Settings
from phiforge.posttrain.pivotal.subdivide import Found, subdivide

Results = tuple[list[SearchedPath], list[PivotalToken], list[Pair]]


def bisect_paths(
    problem: Problem,
    prompt_token_ids: Prefix,
    chosen: Sequence[Rollout],
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
) -> Generator[list[Request], None, Results]:
    """Search all paths of a question together, level by level.

    Every prefix is asked for once: what the ledger has is never drawn again, and samples that top
    up the filter's own start at the next sample index.
    """
    found = yield from _bisect_together(chosen, ledger, settings)
    paths = [_searched(r, f, ledger) for r, f in zip(chosen, found, strict=True)]
    tokens = _tokens(problem, prompt_token_ids, paths)
    pairs = _pairs(problem, prompt_token_ids, paths, ledger, settings, tokenizer)
    return paths, tokens, pairs


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
        p=[ledger.p(ids[:k]) for k in range(len(ids) + 1)],
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
