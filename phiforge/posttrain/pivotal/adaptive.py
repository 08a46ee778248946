"""The adaptive search of one question: all its paths share their rollouts; tokens are confirmed.

`investigate_paths(...)` is a coroutine like `question.investigate`: it yields the requests of a
round and returns paths, tokens and pairs. What a token does is measured on fresh rollouts only.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from phiforge.core.records import Pair, Problem
from phiforge.core.stats import fisher
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.estimates import (
    Estimate,
    Ledger,
    Prefix,
    Request,
    Rollout,
    difference_interval,
)
from phiforge.posttrain.pivotal.pairs import build_pair
from phiforge.posttrain.pivotal.results import PivotalToken, SearchedPath, Settings
from phiforge.posttrain.pivotal.subdivide import reaches
from phiforge.posttrain.pivotal.walk import EFFORTS, Effort, Rounds, Walk, together


@dataclass(frozen=True)
class Confirmed:
    """A token's effect, measured on rollouts that did not find it."""

    position: int
    pi: float
    after: Estimate
    off: Estimate
    num_before: int  # detours of the search: those from here on are fresh

    @property
    def delta(self) -> float:
        """p after the token minus p before it."""
        return (1 - self.pi) * (self.after.p - self.off.p)

    @property
    def p_before(self) -> float:
        return self.after.p - self.delta

    @property
    def p_value(self) -> float:
        """Two-sided, of "the token changes nothing": Fisher's exact test of both sides' counts."""
        if self.after.exact:  # then every detour would have to end as the path does
            return float(self.off.p == self.after.p)
        return fisher(self.after.successes, self.after.n, self.off.successes, self.off.n)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `delta`: Newcombe's of p(after) - p(off the path), times 1 - pi."""
        low, high = difference_interval(self.off, self.after)
        return (1 - self.pi) * low, (1 - self.pi) * high


Results = tuple[list[SearchedPath], list[PivotalToken], list[Pair]]


def investigate_paths(
    problem: Problem,
    prompt_token_ids: Prefix,
    chosen: Sequence[Rollout],
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
) -> Generator[list[Request], None, Results]:
    """Search all paths of a question, confirm what is found, and find each token's counterpart."""
    drawn = ledger.rollouts[()]
    walks = [
        Walk(rollout, drawn.index(rollout) if rollout in drawn else None, settings.gap)
        for rollout in chosen
    ]
    found = yield from search_paths(walks, ledger, settings, EFFORTS[settings.method])
    places = _distinct(walks, found)
    pairs: dict[Prefix, Pair] = {}
    yield from together(
        [
            _pair(walks[w], c, problem, prompt_token_ids, ledger, settings, tokenizer, pairs)
            for w, c in places
        ]
    )
    for walk in walks:
        walk.learn(ledger)
    paths = [_searched(w, cs, ledger) for w, cs in zip(walks, found, strict=True)]
    tokens = [_token(problem, prompt_token_ids, w, walks[w], c) for w, c in places]
    ordered = [
        pairs[key] for key in (walks[w].ids[: c.position + 1] for w, c in places) if key in pairs
    ]
    return paths, tokens, [replace(p, id=f"{problem.id}/{i}") for i, p in enumerate(ordered)]


def _distinct(
    walks: Sequence[Walk], found: Sequence[Sequence[Confirmed]]
) -> list[tuple[int, Confirmed]]:
    """(path number, token), in path order; a token that two paths share comes once."""
    places: dict[Prefix, tuple[int, Confirmed]] = {}
    for number, (walk, confirmed) in enumerate(zip(walks, found, strict=True)):
        for token in confirmed:
            places.setdefault(walk.ids[: token.position + 1], (number, token))
    return list(places.values())


def search_paths(
    walks: Sequence[Walk], ledger: Ledger, settings: Settings, effort: Effort
) -> Generator[list[Request], None, list[list[Confirmed]]]:
    """Find and confirm; the confirmed tokens of each path, in order."""
    for walk in walks:
        walk.learn(ledger)
    yield from together([walk.coarse(ledger, effort.num_coarse) for walk in walks])
    for walk in walks:
        walk.learn(ledger)
    yield from together([walk.refine(ledger, effort, settings.seed) for walk in walks])
    suspects = [(walk, position) for walk in walks for position in walk.flagged(effort)]
    firsts = {walk.ids[: position + 1]: (walk, position) for walk, position in reversed(suspects)}
    confirmed: dict[Prefix, Confirmed] = {}
    yield from together(
        [_confirm(w, i, ledger, effort, settings.gap, confirmed) for w, i in firsts.values()]
    )
    found = []
    for walk in walks:
        mine = [walk.ids[: i + 1] for i in walk.flagged(effort)]
        found.append([confirmed[prefix] for prefix in mine if prefix in confirmed])
    return found


def _confirm(
    walk: Walk,
    position: int,
    ledger: Ledger,
    effort: Effort,
    gap: float,
    confirmed: dict[Prefix, Confirmed],
) -> Rounds:
    """Fresh rollouts after the token and of detours; stops early when there is nothing to it."""
    before, after = walk.ids[:position], walk.ids[: position + 1]
    token = walk.ids[position]
    first_after = ledger.num_drawn(after)
    first_off = ledger.num_drawn(before, token)
    pi = float(walk.branches.pi[position])
    _, effects, _ = walk.branches.probabilities(effort.prior)
    places = [int(walk.branches.starts[c]) for c in walk.branches.candidates]
    suspected = effects[places.index(position)]
    for block, n in enumerate(effort.confirm):
        requests = [ledger.fresh(before, n, "confirm", forbidden=token)]
        if after not in ledger.finished:
            requests.append(ledger.fresh(after, n, "confirm"))
        yield requests
        result = Confirmed(
            position,
            pi,
            ledger.finished.get(after) or _count(ledger.rollouts[after][first_after:]),
            _count(ledger.detours[before, token][first_off:]),
            first_off,
        )
        if not result.after.n or not result.off.n:
            return  # nothing could be scored
        share = effort.futile if block + 1 < len(effort.confirm) else effort.keep
        if result.delta * suspected <= 0 or abs(result.delta) < share * gap:
            return
    confirmed[after] = result


def _count(rollouts: Sequence[Rollout]) -> Estimate:
    scored = [r.success for r in rollouts if r.success is not None]
    return Estimate(len(scored), sum(scored))


def partners(
    walk: Walk, found: Confirmed, ledger: Ledger, settings: Settings, stop_ids: Collection[int]
) -> Generator[list[Request], None, tuple[int, Estimate] | None]:
    """The other side of a pair: the next token with the most different p, and its fresh rollouts.

    It is picked by the search's rollouts and measured on the confirmation's detours that begin with
    it, topped up to `settings.n_pair`; None when too little is known of any.
    """
    before, token = walk.ids[: found.position], walk.ids[found.position]
    detours = ledger.detours[before, token]
    known = by_first_token([*detours[: found.num_before], *ledger.rollouts.get(before, ())])
    usable = {
        t: e
        for t, e in known.items()
        if t != token and t not in stop_ids and e.n >= settings.min_count
    }
    if not usable:
        return None
    sign = 1 if found.delta > 0 else -1
    other = min(usable, key=lambda t: (sign * (usable[t].successes + 1) / (usable[t].n + 2), t))
    fresh = by_first_token(detours[found.num_before :]).get(other, Estimate(0, 0))
    prefix = (*before, other)
    if prefix in ledger.finished:
        return other, ledger.finished[prefix]
    if len(prefix) >= settings.max_tokens:  # nothing can follow: its detours all ended alike
        return other, Estimate(1, int(usable[other].successes > 0), exact=True)
    if fresh.n < settings.n_pair:
        drawn = ledger.num_drawn(prefix)
        yield [ledger.fresh(prefix, settings.n_pair - fresh.n, "pair")]
        fresh += _count(ledger.rollouts[prefix][drawn:])
    return (other, fresh) if fresh.n else None


def by_first_token(rollouts: Iterable[Rollout]) -> dict[int, Estimate]:
    """Counts of scored rollouts by the token they begin with."""
    groups: dict[int, Estimate] = {}
    for rollout in rollouts:
        if rollout.success is not None and rollout.token_ids:
            first = rollout.token_ids[0]
            groups[first] = groups.get(first, Estimate(0, 0)) + Estimate(1, int(rollout.success))
    return groups


def _pair(
    walk: Walk,
    found: Confirmed,
    problem: Problem,
    prompt_token_ids: Prefix,
    ledger: Ledger,
    settings: Settings,
    tokenizer: PromptTokenizer,
    pairs: dict[Prefix, Pair],
) -> Rounds:
    """The token against its counterpart, if both are measured and differ by more than noise."""
    token = walk.ids[found.position]
    other = yield from partners(walk, found, ledger, settings, tokenizer.stop_ids)
    if other is None or token in tokenizer.stop_ids:
        return
    sides = [(token, found.after), other]
    if found.delta < 0:
        sides.reverse()
    difference = sides[0][1].p - sides[1][1].p
    low, _ = difference_interval(sides[1][1], sides[0][1])
    gap = settings.gap if settings.pair_gap is None else settings.pair_gap
    if low <= 0 or not reaches(difference, gap):
        return
    details = {"source": "pivotal", "p_before": found.p_before}
    prefix = walk.ids[: found.position]
    pairs[walk.ids[: found.position + 1]] = build_pair(
        problem, prompt_token_ids, prefix, dict(sides), tokenizer, details, 0
    )


def _searched(walk: Walk, found: Sequence[Confirmed], ledger: Ledger) -> SearchedPath:
    return SearchedPath(
        token_ids=list(walk.ids),
        logprobs=list(walk.logprobs),
        success=bool(walk.branches.success),
        p=list(walk.branches.p_along()),
        estimates=[ledger.estimate(walk.ids[:k]) for k in range(len(walk.ids) + 1)],
        pivotal=[token.position for token in found],
        undecided=[],
    )


def _token(
    problem: Problem, prompt_token_ids: Prefix, number: int, walk: Walk, found: Confirmed
) -> PivotalToken:
    return PivotalToken(
        problem_id=problem.id,
        path=number,
        position=found.position,
        prompt_token_ids=list(prompt_token_ids),
        prefix_token_ids=[*prompt_token_ids, *walk.ids[: found.position]],
        token_id=walk.ids[found.position],
        logprob=walk.logprobs[found.position],
        p_before=found.p_before,
        p_after=found.after.p,
        delta=found.delta,
        interval=found.interval,
        n_after=found.after.n,
        successes_after=found.after.successes,
        n_off=found.off.n,
        successes_off=found.off.successes,
        p_value=found.p_value,
    )
