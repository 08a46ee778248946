"""Rounds: every contestant once per round, in turn, one at a time; who fails is out, others go on.

`play(group, start, repeat, timeout_seconds, say)` returns samples, failures and limits. Nothing is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from phiforge.bench.contestant import ContestantFailed
from phiforge.bench.figures import Sample
from phiforge.bench.plan import Entrant, Group, Work
from phiforge.bench.processor import Watch

WARM_UP = -1
LIMITS = "limits"
Say = Callable[[str], None]


class Player(Protocol):
    """What a round needs of a contestant."""

    label: str

    def ask(self, request: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass
class Played:
    """Everything a group's rounds gave."""

    samples: list[Sample] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # label -> what happened
    about: dict[str, Any] = field(default_factory=dict)  # label -> versions
    limits: list[dict[str, Any]] = field(default_factory=list)


def order(entrants: Sequence[Entrant], round: int) -> list[Entrant]:
    """Who comes when: each round another one begins, so that no one is always behind the same."""
    first = max(round, 0) % len(entrants) if entrants else 0
    return [*entrants[first:], *entrants[:first]]


def play(
    group: Group,
    start: Callable[[Entrant | None], Player],
    repeat: int,
    timeout_seconds: float,
    say: Say,
) -> Played:
    """Prepare every contestant, then a warm-up and `repeat` rounds of each work.

    `start(entrant)` starts a contestant's process, `start(None)` the one that measures limits.
    """
    played = Played()
    with ExitStack() as stack:
        limits = start(None)
        stack.callback(limits.close)
        ready = limits.ask({"do": "prepare", "device": group.device}, timeout_seconds)
        played.about[LIMITS] = ready["about"]
        players: dict[str, Player] = {}
        for entrant in group.entrants:
            player = start(entrant)
            stack.callback(player.close)
            say(f"{group.name}: preparing {entrant.label}")
            settings = {**entrant.settings, "task": group.task, "device": group.device}
            if _prepare(player, settings, played, timeout_seconds):
                players[entrant.label] = player
        for work in group.works:
            for round in range(WARM_UP, repeat):
                say(f"{group.name}/{work.name}: {_round_name(round, repeat)}")
                if round != WARM_UP:
                    request = {"do": "run", **group.limits}
                    played.limits.append(limits.ask(request, timeout_seconds))
                for entrant in order([e for e in group.entrants if e.takes(work.name)], round):
                    if entrant.label not in played.failures:
                        player = players[entrant.label]
                        _run(player, work, round, played, timeout_seconds, say)
    return played


def _prepare(player: Player, settings: Mapping[str, Any], played: Played, timeout: float) -> bool:
    try:
        reply = player.ask({"do": "prepare", **settings}, timeout)
    except ContestantFailed as error:
        played.failures[player.label] = f"while preparing: {error}"
        return False
    played.about[player.label] = reply.get("about", {})
    return True


def _run(player: Player, work: Work, round: int, played: Played, timeout: float, say: Say) -> None:
    watch = Watch()
    try:
        reply = player.ask({"do": "run", **work.request(round)}, timeout)
    except ContestantFailed as error:
        played.failures[player.label] = f"in {work.name}, {_round_name(round, 0)}: {error}"
        say(f"{player.label} failed: {error}")
        return
    played.samples.append(
        Sample(
            work.name,
            round,
            player.label,
            seconds=reply["seconds"],
            tokens=reply["tokens"],
            cpu_seconds=reply["cpu_seconds"],
            foreign_share=watch.foreign_share(reply["cpu_seconds"]),
            peak_bytes=reply["peak_bytes"],
            token_ids=reply.get("token_ids"),
            losses=reply.get("losses"),
        )
    )


def _round_name(round: int, repeat: int) -> str:
    if round == WARM_UP:
        return "warm-up"
    return f"round {round + 1}" + (f" of {repeat}" if repeat else "")
