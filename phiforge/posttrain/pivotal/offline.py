"""A finished search looked at again: another gap, without drawing a single token.

`reanalyse(folder, gap)` yields QuestionResults from the folder's rollouts and paths. A token is
reported when fresh rollouts were drawn for it then; `num_unconfirmed` counts those that now look
pivotal but have none: draw them by searching again with this gap (the log keeps what there is).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from phiforge.core.records import Problem
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.estimates import Ledger, Prefix, Request, Rollout
from phiforge.posttrain.pivotal.question import investigate
from phiforge.posttrain.pivotal.results import QuestionResult, Settings

Place = tuple[Prefix, int | None]


class Reanalysis:
    """An iterable of QuestionResults of one folder under other settings, in the old order."""

    def __init__(self, folder: Path, settings: Settings, tokenizer: PromptTokenizer) -> None:
        """Raises ValueError when the folder is not that of a finished search."""
        self.folder, self.settings, self.tokenizer = folder, settings, tokenizer
        self.num_unconfirmed = 0
        for name in ("paths.jsonl", "rollouts.jsonl.gz"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no {name} in it; give the folder of a finished search")
        self._paths: dict[str, list[dict[str, Any]]] = {}
        with open(folder / "paths.jsonl", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                self._paths.setdefault(row["problem_id"], []).append(row)

    def __iter__(self) -> Iterator[QuestionResult]:
        with gzip.open(self.folder / "rollouts.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = map(json.loads, file)
            for name, group in groupby(rows, key=lambda row: row["problem_id"]):
                if name in self._paths:  # others were out of the band
                    yield self._question(self._paths[name], list(group))

    def _question(self, paths: list[dict[str, Any]], rows: list[dict[str, Any]]) -> QuestionResult:
        first = paths[0]
        prompt = tuple(first["prompt_token_ids"])
        family = {"family": first["family"]} if first.get("family") else {}
        problem = Problem(
            id=first["problem_id"], prompt=list(prompt), answer=first["answer"], metadata=family
        )
        given = [
            Rollout(tuple(row["token_ids"]), bool(row["success"]), tuple(row["logprobs"]))
            for row in paths
        ]
        ledger = Ledger()
        coroutine = investigate(problem, prompt, ledger, self.settings, self.tokenizer, given)
        return self._replay(coroutine, ledger, [_parse(row) for row in rows])

    def _replay(
        self,
        coroutine: Generator[list[Request], None, QuestionResult],
        ledger: Ledger,
        recorded: list[tuple[Request, list[Rollout]]],
    ) -> QuestionResult:
        """Answer the search from the record: all of the old search at once, then what it confirms.

        Fresh rollouts stay fresh: those that confirmed a token then are held back until the same
        token is to be confirmed now.
        """
        fresh: dict[tuple[str, Place], list[Rollout]] = {}
        old = []
        for request, rollouts in recorded:
            if request.purpose in ("confirm", "pair"):
                place = (request.prefix, request.forbidden)
                fresh.setdefault((request.purpose, place), []).extend(rollouts)
            else:
                old.append((request, rollouts))
        wanted = next(coroutine)  # the filter
        for request, rollouts in old:
            _add(ledger, request, rollouts)
        confirming: set[Place] = set()
        try:
            while True:
                wanted = next(coroutine)
                for request in wanted:
                    place = (request.prefix, request.forbidden)
                    given = fresh.pop((request.purpose, place), [])
                    if request.purpose == "confirm" and place not in confirming and not given:
                        self.num_unconfirmed += request.forbidden is not None
                    confirming.add(place)
                    _add(ledger, request, given)
        except StopIteration as stop:
            return stop.value


def _add(ledger: Ledger, request: Request, rollouts: list[Rollout]) -> None:
    first = ledger.num_drawn(request.prefix, request.forbidden)
    ledger.add(replace(request, first_index=first, n=len(rollouts)), rollouts)


def _parse(row: dict[str, Any]) -> tuple[Request, list[Rollout]]:
    logprobs = row.get("logprobs") or [None] * len(row["token_ids"])
    rollouts = [
        Rollout(tuple(ids), None if won is None else bool(won), tuple(lp) if lp else None)
        for ids, won, lp in zip(row["token_ids"], row["outcomes"], logprobs, strict=True)
    ]
    prefix = tuple(row["prefix"])
    request = Request(
        prefix, row["first_index"], len(rollouts), row["purpose"], row.get("forbidden")
    )
    return request, rollouts


def reanalyse(
    folder: str | Path, tokenizer: PromptTokenizer, gap: float, **settings: Any
) -> Reanalysis:
    """Look at a finished search with another gap (and other settings of `search`)."""
    return Reanalysis(Path(folder), Settings(gap=gap, **settings), tokenizer)
