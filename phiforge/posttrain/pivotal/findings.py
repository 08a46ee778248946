"""What a pivotal search left in its folder, as the report pages want it.

Call `read(folder)`; paths.jsonl must be there; tokens.jsonl, pairs.jsonl, rollouts.jsonl.gz and
search.json (settings, metrics), options.json or a stage's manifest.json may be. Writes nothing.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Pages show examples and shares; past so many answers neither changes, and memory stays small.
MAX_PATHS = 4000
MAX_ROLLOUT_BYTES = 64 << 20
# Of a command's options, what says which search this is.
_NAMED = ("model", "questions", "preset", "oracle", "format", "think", "dtype", "num_questions")
_UNUSED = ("prompt_token_ids", "logprobs", "n", "successes", "exact")


@dataclass(frozen=True)
class Findings:
    """Rows of a search's files, its settings and metrics, and p of every screened question."""

    paths: list[Row]
    tokens: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    settings: Row = field(default_factory=dict)
    metrics: Row = field(default_factory=dict)
    question_ps: list[float] = field(default_factory=list)

    @cached_property
    def token_at(self) -> dict[tuple[Any, ...], Row]:
        """tokens.jsonl by (problem id, the answer's token ids up to and with the token)."""
        found = {}
        for token in self.tokens:
            before = token["prefix_token_ids"][len(token["prompt_token_ids"]) :]
            found[token["problem_id"], *before, token["token_id"]] = token
        return found

    @cached_property
    def pairs_at(self) -> dict[tuple[Any, ...], list[Row]]:
        """pairs.jsonl by (problem id, the token ids of prompt and answer before the pair)."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for pair in self.pairs:
            key = (pair["metadata"].get("problem_id"), *(pair.get("prompt_token_ids") or ()))
            found.setdefault(key, []).append(pair)
        return found

    @cached_property
    def numbers(self) -> Row:
        """The metrics, what is missing of them counted from the files."""
        rising = sum(token["delta"] > 0 for token in self.tokens)
        counted = {
            "questions_in_band": len({path["problem_id"] for path in self.paths}),
            "paths": len(self.paths),
            "pivotal_tokens": len(self.tokens),
            "pivotal_tokens_rising": rising,
            "pairs": len(self.pairs),
        }
        return counted | self.metrics


def read(folder: str | Path) -> Findings:
    """The files of a finished or running search; answers past MAX_PATHS are left out.

    Raises ValueError when there is no paths.jsonl, and FILE:LINE for a line that is not JSON.
    """
    folder = Path(folder)
    if not (folder / "paths.jsonl").is_file():
        raise ValueError(
            f"{folder}: no paths.jsonl; give the folder that a pivotal search wrote "
            "(tokens.jsonl, pairs.jsonl, paths.jsonl)"
        )
    paths = [_slim(row) for row in islice(_rows(folder / "paths.jsonl"), MAX_PATHS)]
    shown = {path["problem_id"] for path in paths}
    settings, metrics = _settings(folder)
    return Findings(
        paths=paths,
        tokens=[t for t in _rows(folder / "tokens.jsonl") if t["problem_id"] in shown],
        pairs=[
            p for p in _rows(folder / "pairs.jsonl") if p["metadata"].get("problem_id") in shown
        ],
        settings=settings,
        metrics=metrics,
        question_ps=screened(folder / "rollouts.jsonl.gz"),
    )


def _slim(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in _UNUSED}


def _rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    return  # cut by a kill, or still being written
                raise ValueError(
                    f"{path}:{number}: not valid JSON ({error.msg}); restore the file or search "
                    "anew"
                ) from None


def _settings(folder: Path) -> tuple[Row, Row]:
    """(settings, metrics): the later files know better, and each may be missing."""
    manifest, options, search = (
        _json(folder / name) for name in ("manifest.json", "options.json", "search.json")
    )
    named = {name: options[name] for name in _NAMED if options.get(name) is not None}
    model = {"model": search["model"]} if search.get("model") else {}
    settings = named | (manifest.get("config") or {}) | model | (search.get("settings") or {})
    return settings, (manifest.get("metrics") or {}) | (search.get("metrics") or {})


def _json(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg}); restore the file") from None


def screened(path: Path) -> list[float]:
    """p of every question that was screened, from the filter's rollouts; empty where unknown."""
    if not path.is_file() or path.stat().st_size > MAX_ROLLOUT_BYTES:
        return []
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        try:
            for line in lines:
                if '"purpose":"filter"' not in line:
                    continue
                outcomes = [o for o in json.loads(line)["outcomes"] if o is not None]
                if outcomes:
                    found.append(sum(outcomes) / len(outcomes))
        except (EOFError, zlib.error, json.JSONDecodeError):
            pass  # the end of a file that is still being written
    return found


# ------------------------------------------------------------------------------- of one answer


def effects(path: Row) -> dict[int, Row]:
    """What each pivotal token of an answer does, by position: delta, low, high where known."""
    found = {effect["position"]: effect for effect in path.get("tokens") or ()}
    p = path.get("p") or []
    for i in path.get("pivotal") or ():
        if i not in found:  # files of earlier versions have p alone
            found[i] = {"position": i, "delta": (p[i + 1] or 0.0) - (p[i] or 0.0)}
    return found


def largest(path: Row) -> float:
    """The largest |delta| of an answer's tokens; 0 without pivotal tokens."""
    return max((abs(effect["delta"]) for effect in effects(path).values()), default=0.0)


def by_question(paths: Iterable[Row]) -> dict[str, list[Row]]:
    """The answers of each question, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for path in paths:
        found.setdefault(path["problem_id"], []).append(path)
    return found


def distinct(paths: Iterable[Row]) -> Iterator[tuple[Row, int, Row | None]]:
    """(path, position, effect) of every token searched; a shared beginning counts once."""
    for answers in by_question(paths).values():
        owners = [_owners(answers, number) for number in range(len(answers))]
        found: dict[tuple[int, int], Row] = {}
        for number, path in enumerate(answers):
            for i, effect in effects(path).items():
                owner = next((o for o, end in owners[number] if i < end), number)
                found.setdefault((owner, i), effect)
        for number, path in enumerate(answers):
            first = max((end for _, end in owners[number]), default=0)
            for i in range(first, len(path["texts"])):
                yield path, i, found.get((number, i))


def _owners(answers: list[Row], number: int) -> list[tuple[int, int]]:
    """(earlier answer, how many tokens it shares with this one), the earliest first."""
    ids = answers[number].get("token_ids") or []
    return [(k, _shared(ids, answers[k].get("token_ids") or [])) for k in range(number)]


def _shared(ids: list[int], others: list[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def in_turns(groups: Iterable[list[Any]]) -> Iterator[Any]:
    """The first of each list, then the second of each, ..."""
    rest = [iter(group) for group in groups]
    while rest:
        taken = [list(islice(one, 1)) for one in rest]
        yield from chain.from_iterable(taken)
        rest = [one for one, got in zip(rest, taken, strict=True) if got]


def counted(rows: Iterable[Row], name: str) -> Counter[str]:
    """How many rows have each value of a field."""
    return Counter(row.get(name) or "" for row in rows)
