"""Single-token preference pairs from rollouts that were already drawn (arXiv 2412.08905 §4.3).

`make_pair(...)` groups a prefix's rollouts by first token and sets the best against the worst.
Prompt = question + path before the token; both sides are one token id, with no end-of-text added.
"""

from collections.abc import Collection, Mapping
from typing import Any

from phiforge.core.records import Pair, Problem
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.estimates import Estimate, Ledger, Prefix, difference_interval
from phiforge.posttrain.pivotal.subdivide import reaches


def best_against_worst(
    groups: Mapping[int, Estimate],
    p_before: float,
    gap: float,
    min_count: int,
    stop_ids: Collection[int] = (),
) -> tuple[int, int] | None:
    """The (chosen, rejected) token ids, or None when no two tokens differ by `gap`.

    Tokens seen fewer than `min_count` times and stop tokens are left out; the chosen one must raise
    p and the rejected one lower it. Equal rates go to the larger group, then to the smaller id.
    """
    usable = {t: e for t, e in groups.items() if e.n >= min_count and t not in stop_ids}
    if len(usable) < 2:
        return None
    chosen = min(usable, key=lambda t: (-usable[t].p, -usable[t].n, t))
    rejected = min(usable, key=lambda t: (usable[t].p, -usable[t].n, t))
    if not usable[chosen].p > p_before > usable[rejected].p:
        return None
    if not reaches(usable[chosen].p - usable[rejected].p, gap):
        return None
    return chosen, rejected


def make_pair(
    problem: Problem,
    prompt_token_ids: Prefix,
    prefix: Prefix,
    ledger: Ledger,
    tokenizer: PromptTokenizer,
    *,
    gap: float,
    min_count: int,
    stop_ids: Collection[int],
    source: str,
    number: int,
) -> Pair | None:
    """The pair at one prefix (the question's `number`th), or None when its rollouts give none.

    `metadata` holds counts and p of the prefix and of both tokens, and Newcombe's 95% interval of
    p(chosen) - p(rejected). The two tokens were picked for their difference, so the interval is
    descriptive, not a test.
    """
    before = ledger.estimate(prefix)
    if before is None:
        return None
    groups = ledger.first_tokens(prefix)
    picked = best_against_worst(groups, before.p, gap, min_count, stop_ids)
    if picked is None:
        return None
    return build_pair(
        problem,
        prompt_token_ids,
        prefix,
        {token: groups[token] for token in picked},
        tokenizer,
        {"source": source, **_counts("before", before), "num_first_tokens": len(groups)},
        number,
    )


def build_pair(
    problem: Problem,
    prompt_token_ids: Prefix,
    prefix: Prefix,
    sides: Mapping[int, Estimate],
    tokenizer: PromptTokenizer,
    metadata: Mapping[str, Any],
    number: int,
) -> Pair:
    """A Pair of two next tokens (`sides`: chosen, then rejected) with their counts."""
    (chosen, chosen_counts), (rejected, rejected_counts) = sides.items()
    ids = [*prompt_token_ids, *prefix]
    low, high = difference_interval(rejected_counts, chosen_counts)
    details: dict[str, Any] = {
        "problem_id": problem.id,
        "position": len(prefix),
        "num_prompt_tokens": len(prompt_token_ids),
        **metadata,
        **_counts("chosen", chosen_counts),
        **_counts("rejected", rejected_counts),
        "delta": chosen_counts.p - rejected_counts.p,
        "interval": [low, high],
    }
    details |= {k: problem.metadata[k] for k in ("family", "licence") if k in problem.metadata}
    return Pair(
        id=f"{problem.id}/{number}",
        prompt=tokenizer.decode(ids, skip_special=False),
        chosen=tokenizer.decode([chosen], skip_special=False),
        rejected=tokenizer.decode([rejected], skip_special=False),
        prompt_token_ids=ids,
        chosen_token_ids=[chosen],
        rejected_token_ids=[rejected],
        metadata=details,
    )


def _counts(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        f"p_{name}": estimate.p,
        f"n_{name}": estimate.n,
        f"successes_{name}": estimate.successes,
    }
