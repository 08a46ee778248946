"""From transcripts to scores: shares with intervals, and paired tests between checkpoints.

Call `accuracy(transcripts)`, `refusals(...)`, `recall(...)` and `comparisons(...)`: pure functions,
each giving rows (dictionaries) with k, n, share, low and high. Writes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from phiforge.core.stats import (
    PairedTest,
    cluster_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    wilson,
)
from phiforge.evals.ask import Transcript

Row = dict[str, Any]
ALL = "all"
CONTEXT_TASKS = ("needle", "recall", "copy")
# What each measure counts, and over which transcripts.
_COUNTS: dict[str, Callable[[Transcript], bool]] = {
    "accuracy": lambda t: t.correct,
    "refusals": lambda t: t.refused,
    "recall": lambda t: t.correct,
}


def accuracy(transcripts: Sequence[Transcript]) -> list[Row]:
    """Accuracy on answerable problems by checkpoint, temperature and family ("all" first)."""
    return [
        {"checkpoint": checkpoint, "temperature": temperature, "family": family, **cell}
        for (checkpoint, temperature, family), cell in _cells(
            (t for t in transcripts if t.suite == "problems"),
            lambda t: (t.checkpoint, t.temperature, t.metadata.get("family", "")),
            "accuracy",
        )
    ]


def refusals(transcripts: Sequence[Transcript]) -> list[Row]:
    """Share of refusals, greedy, on bogus and on answerable questions, by checkpoint and family."""
    return [
        {"checkpoint": checkpoint, "asked": asked, "family": family, **cell}
        for (checkpoint, asked, family), cell in _cells(
            _greedy(transcripts),
            lambda t: (
                t.checkpoint,
                "bogus" if t.suite == "bogus" else "answerable",
                t.metadata.get("family", ""),
            ),
            "refusals",
        )
    ]


def context_recall(transcripts: Sequence[Transcript]) -> list[Row]:
    """Share right in key-value recall and copying, by checkpoint and multiple of the context."""
    rows = []
    for (checkpoint, task, length), group in _groups(
        (t for t in transcripts if t.suite in CONTEXT_TASKS),
        lambda t: (t.checkpoint, t.suite, t.metadata["length"]),
    ):
        tokens = sum(t.prompt_tokens for t in group) / len(group)
        rows.append(
            {
                "checkpoint": checkpoint,
                "task": task,
                "length": length,
                "prompt_tokens": round(tokens, 1),
                **cell(group, "recall"),
            }
        )
    return rows


def comparisons(transcripts: Sequence[Transcript], order: Sequence[str], seed: int) -> list[Row]:
    """Paired tests between neighbouring checkpoints of `order` on the questions both answered.

    Holm's correction covers all overall rows together, and all rows by family together.
    """
    rows = [
        *_compare(
            (t for t in transcripts if t.suite == "problems"),
            order,
            "accuracy",
            lambda t: (("temperature", t.temperature),),
            seed,
        ),
        *_compare(
            _greedy(transcripts),
            order,
            "refusals",
            lambda t: (("asked", "bogus" if t.suite == "bogus" else "answerable"),),
            seed,
        ),
        *_compare(
            (t for t in transcripts if t.suite in CONTEXT_TASKS),
            order,
            "recall",
            lambda t: (("task", t.suite), ("length", t.metadata["length"])),
            seed,
            families=False,
        ),
    ]
    for overall in (True, False):
        family = [row for row in rows if (row["family"] == ALL) == overall]
        for row, adjusted in zip(family, holm([r["p_value"] for r in family]), strict=True):
            row["p_holm"] = adjusted
    return rows


def cell(group: Sequence[Transcript], measure: str) -> Row:
    """k of n with its interval: Wilson's, or one clustered by problem when it was sampled often."""
    counts = _COUNTS[measure]
    hits = [counts(t) for t in group]
    k, n = sum(hits), len(hits)
    problems = len({t.id for t in group})
    if problems == n:
        interval = wilson(k, n)
        low, high = interval.low, interval.high
    else:
        mean = cluster_interval(hits, [t.id for t in group])
        low, high = max(0.0, mean.low), min(1.0, mean.high)
    return {"k": k, "n": n, "problems": problems, "share": k / n, "low": low, "high": high}


def _compare(
    transcripts: Iterable[Transcript],
    order: Sequence[str],
    measure: str,
    keys: Callable[[Transcript], tuple[tuple[str, Any], ...]],
    seed: int,
    families: bool = True,
) -> Iterator[Row]:
    settings: dict[Any, dict[str, list[Transcript]]] = {}
    for transcript in transcripts:
        groups = settings.setdefault(keys(transcript), {})
        groups.setdefault(transcript.checkpoint, []).append(transcript)
    for setting, groups in settings.items():
        # Each checkpoint is set against the one before it that answered the same questions.
        present = [name for name in order if name in groups]
        for first, second in pairwise(present):
            names = {t.metadata.get("family", "") for t in groups[second]}
            chosen = [ALL, *sorted(names - {""})] if families and len(names) > 1 else [ALL]
            for family in chosen:
                test = _paired(groups[first], groups[second], family, measure, seed)
                if test is not None:
                    yield {
                        "measure": measure,
                        **dict(setting),
                        "family": family,
                        "first": first,
                        "second": second,
                        **test.to_dict(),
                    }


def _paired(
    first: Sequence[Transcript], second: Sequence[Transcript], family: str, measure: str, seed: int
) -> PairedTest | None:
    a, b = (_by_problem(group, family, measure) for group in (first, second))
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    if all(len(a[name]) == len(b[name]) == 1 for name in shared):
        return mcnemar([a[name][0] for name in shared], [b[name][0] for name in shared])
    means = [[sum(found[name]) / len(found[name]) for name in shared] for found in (a, b)]
    return paired_bootstrap(means[0], means[1], seed=seed)


def _by_problem(group: Sequence[Transcript], family: str, measure: str) -> dict[str, list[bool]]:
    counts = _COUNTS[measure]
    found: dict[str, list[bool]] = {}
    for transcript in group:
        if family in (ALL, transcript.metadata.get("family", "")):
            found.setdefault(transcript.id, []).append(counts(transcript))
    return found


def _cells(
    transcripts: Iterable[Transcript],
    key: Callable[[Transcript], tuple[Any, Any, Any]],
    measure: str,
) -> Iterator[tuple[tuple[Any, Any, Any], Row]]:
    """A cell per key, preceded by the "all" cell of its first two parts."""
    outer: dict[tuple[Any, Any], dict[Any, list[Transcript]]] = {}
    for transcript in transcripts:
        first, second, family = key(transcript)
        outer.setdefault((first, second), {}).setdefault(family, []).append(transcript)
    for (first, second), families in outer.items():
        together = [t for group in families.values() for t in group]
        yield (first, second, ALL), cell(together, measure)
        if len(families) > 1:
            for family, group in families.items():
                yield (first, second, family), cell(group, measure)


def _groups(
    transcripts: Iterable[Transcript], key: Callable[[Transcript], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Transcript]]]:
    found: dict[tuple[Any, ...], list[Transcript]] = {}
    for transcript in transcripts:
        found.setdefault(key(transcript), []).append(transcript)
    return list(found.items())


def _greedy(transcripts: Iterable[Transcript]) -> list[Transcript]:
    """Answers to problems and bogus questions at the lowest temperature that was asked for."""
    asked = [t for t in transcripts if t.suite in ("problems", "bogus")]
    lowest = min((t.temperature for t in asked), default=0.0)
    return [t for t in asked if t.temperature == lowest]
