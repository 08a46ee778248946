"""What tokens truly do to p(success) on a real model: paths to search, and p by brute force.

`Measured(engine, oracle, file, ...)` draws thousands of rollouts before and after every token that
can be pivotal. All is appended to a JSONL file as it is drawn; a killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from phiforge.bench.pivotal_score import Effect
from phiforge.core.progress import Bar
from phiforge.core.records import Problem
from phiforge.inference.interface import prompt_token_ids
from phiforge.posttrain.pivotal import Estimate, Rollout, difference_interval
from phiforge.posttrain.pivotal.question import choose_paths
from phiforge.posttrain.pivotal.search import Oracle
from phiforge.verify.answers import OracleError

if TYPE_CHECKING:
    from phiforge.inference.interface import Generator as Engine

Ids = tuple[int, ...]
# Sample i is a function of (seed, prompt, i): seeds that no search is given keep rollouts apart.
PATH_SEED, TRUTH_SEED = 2_000_003, 2_000_029
CHUNK = 250  # rollouts of a prefix per call, so that a kill costs little
ROLLOUTS_PER_CALL = 4000
SCREEN = 32  # rollouts that say whether a question lies in the band
BAND = (0.2, 0.8)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which paths are looked at: `paths` answers each of `questions` questions with p in BAND."""

    questions: int
    paths: int
    path_choice: Literal["balanced", "natural"]
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer and the sampler's log-probabilities of its tokens."""

    token_ids: Ids
    logprobs: tuple[float, ...]
    success: bool


class Log:
    """The file: a header, selections of paths, counts per prefix. Opened for appending.

    Raises ValueError for a file that is something else or was begun with another `header`.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self.selections: dict[str, dict[str, Any]] = {}
        self.counts: dict[Ids, dict[str, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            self._read(dict(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take rows in and wait until they are on disk."""
        for row in rows:
            self._take(row)
            self._file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, row: dict[str, Any]) -> None:
        if "selection" in row:
            self.selections[row["selection"]] = row["problems"]
            return
        known = self.counts.setdefault(tuple(row["prefix"]), dict.fromkeys(_COUNTS, 0))
        for name in _COUNTS:
            known[name] += row[name]

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # cut by a kill in the middle of a write
            try:
                row = json.loads(line)
                if number == 1:
                    self._check(row["header"], header)
                else:
                    self._take(row)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not a line of brute-force counts ({error!r}); "
                    "name another file"
                ) from None
            good += len(line)
        self._file.truncate(good)
        if good == 0:
            self._file.write(json.dumps({"header": header}).encode() + b"\n")
            self._file.flush()

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.path}: these counts are of another {name} ({found.get(name)!r}, now "
                    f"{wanted.get(name)!r}); name another file"
                )


_COUNTS = ("n", "successes", "unscored", "tokens")


class Measured:
    """The truth of one model on one set of problems, by problem id; draws what the file lacks.

    `problems` is what was selected and `paths` their answers; `effect(prefix, token)` is known once
    `measure` has run.
    """

    def __init__(
        self, engine: Engine, oracle: Oracle, problems: Sequence[Problem], log: Log, choice: Choice
    ):
        self.engine, self.oracle, self.log, self.choice = engine, oracle, log, choice
        self._prompts = {p.id: prompt_token_ids(engine.tokenizer, p.prompt) for p in problems}
        self._measured: set[tuple[Ids, int]] = set()
        self._finished: dict[Ids, Estimate] = {}
        selected = self._select(problems)
        self.problems = [p for p in problems if p.id in selected]
        self.paths: dict[str, list[Answer]] = {
            name: [Answer(tuple(a), tuple(b), c) for a, b, c in rows]
            for name, rows in selected.items()
        }

    @property
    def num_positions(self) -> int:
        """Tokens whose effect is measured, those of several paths once; see `measure`."""
        return len(self._measured)

    # --------------------------------------------------------------------------------- the paths

    def _select(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """The first questions in the band with their answers: from the file, else drawn now."""
        name = json.dumps([asdict(self.choice), [p.id for p in problems]], sort_keys=True)
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        if key not in self.log.selections:
            chosen: dict[str, Any] = {}
            waiting = iter(problems)
            while len(chosen) < self.choice.questions and (part := list(islice(waiting, 16))):
                chosen |= self._screen(part)
            if not chosen:
                raise ValueError(
                    f"none of {len(problems)} problems has p(success) in {BAND[0]}..{BAND[1]}: "
                    "nothing to search"
                )
            kept = dict(islice(chosen.items(), self.choice.questions))
            self.log.append([{"selection": key, "problems": kept}])
        return self.log.selections[key]

    def _screen(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """{id: paths} of the problems in the band."""
        answers = self.engine.generate(
            [self._prompts[p.id] for p in problems],
            n=SCREEN,
            max_tokens=self.choice.max_tokens,
            temperature=self.choice.temperature,
            seed=PATH_SEED,
            logprobs=True,
        )
        found = {}
        for problem, samples in zip(problems, answers, strict=True):
            drawn = [
                Rollout(s.token_ids, self._judge(problem, s.token_ids), s.logprobs) for s in samples
            ]
            scored = [r.success for r in drawn if r.success is not None]
            if scored and BAND[0] <= sum(scored) / len(scored) <= BAND[1]:
                paths = choose_paths(drawn, self.choice.paths, self.choice.path_choice)
                found[problem.id] = [
                    [r.token_ids, self._sampler_logprobs(problem, r), r.success] for r in paths
                ]
        return found

    def _sampler_logprobs(self, problem: Problem, path: Rollout) -> list[float]:
        if self.choice.temperature == 1.0 and path.logprobs is not None:
            return list(path.logprobs)
        prompt = self._prompts[problem.id]
        arguments: dict[str, Any] = {"temperature": self.choice.temperature}
        return self.engine.score([prompt], [path.token_ids], **arguments)[0]

    def _judge(self, problem: Problem, answer: Sequence[int]) -> bool | None:
        text = self.engine.tokenizer.decode(answer, skip_special=True)
        try:
            return bool(self.oracle(problem, text))
        except OracleError:
            return None

    # -------------------------------------------------------------------------------- the truth

    def candidates(self, gap: float) -> Iterator[tuple[Problem, Answer, int]]:
        """Every token of at most 1 - gap: |delta| <= 1 - probability, so no other is pivotal."""
        for problem in self.problems:
            for path in self.paths[problem.id]:
                for position, logprob in enumerate(path.logprobs):
                    if math.exp(logprob) <= 1 - gap:
                        yield problem, path, position

    def measure(self, gap: float, num_rollouts: int, bar: Bar) -> None:
        """Draw `num_rollouts` before and after each candidate, less what the file has."""
        nodes: dict[Ids, tuple[Problem, Ids]] = {}
        for problem, path, position in self.candidates(gap):
            prompt = self._prompts[problem.id]
            self._measured.add(((*prompt, *path.token_ids[:position]), path.token_ids[position]))
            for end in (position, position + 1):
                prefix = path.token_ids[:end]
                if end == len(path.token_ids):
                    self._finished[(*prompt, *prefix)] = Estimate(1, int(path.success), exact=True)
                else:
                    nodes[(*prompt, *prefix)] = (problem, prefix)
        bar.total = len(nodes) * num_rollouts
        bar.start_at(sum(min(self._have(node), num_rollouts) for node in nodes))
        while waiting := [node for node in nodes if self._have(node) < num_rollouts]:
            have = min(self._have(node) for node in waiting)
            n = min(CHUNK, num_rollouts - have)
            level = (node for node in waiting if self._have(node) == have)
            while part := list(islice(level, max(1, ROLLOUTS_PER_CALL // n))):
                self._draw({node: nodes[node] for node in part}, have, n)
                bar.advance(len(part) * n)

    def _have(self, node: Ids) -> int:
        known = self.log.counts.get(node)
        return known["n"] if known else 0

    def _draw(self, nodes: Mapping[Ids, tuple[Problem, Ids]], first: int, n: int) -> None:
        rooms = [self.choice.max_tokens - len(prefix) for _, prefix in nodes.values()]
        answers = self.engine.generate(
            list(nodes),
            n=n,
            max_tokens=max(rooms),
            temperature=self.choice.temperature,
            seed=TRUTH_SEED,
            first_index=first,
        )
        rows = []
        for (node, (problem, prefix)), room, samples in zip(
            nodes.items(), rooms, answers, strict=True
        ):
            drawn = [s.token_ids[:room] for s in samples]
            outcomes = [self._judge(problem, [*prefix, *ids]) for ids in drawn]
            rows.append(
                {
                    "prefix": list(node),
                    "first_index": first,
                    "n": n,
                    "successes": sum(outcome is True for outcome in outcomes),
                    "unscored": sum(outcome is None for outcome in outcomes),
                    "tokens": sum(map(len, drawn)),
                }
            )
        self.log.append(rows)

    def effect(self, prefix: Sequence[int], token_id: int) -> Effect | None:
        """Delta with Newcombe's 95% interval; None where the token is too probable to be pivotal.

        Raises ValueError when the oracle failed on all rollouts of a side.
        """
        if (tuple(prefix), token_id) not in self._measured:
            return None
        before, after = self._estimate(tuple(prefix)), self._estimate((*prefix, token_id))
        low, high = difference_interval(before, after)
        return Effect(after.p - before.p, low, high)

    def _estimate(self, node: Ids) -> Estimate:
        if node in self._finished:
            return self._finished[node]
        known = self.log.counts[node]
        if known["n"] == known["unscored"]:
            raise ValueError(f"{self.log.path}: the oracle failed on every rollout of a prefix")
        return Estimate(known["n"] - known["unscored"], known["successes"])
