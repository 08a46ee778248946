"""Measures pivotal-token search against the truth: on exact worlds, or on a model by brute force.

`run(Options(methods=("paper:50", "balanced")))` returns everything as one dictionary,
`text(result)` prints it. Worlds go to a temporary folder, brute-force counts to the file named.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phiforge.bench.pivotal_score import PURPOSES, Effect, Truth, figures, judge
from phiforge.bench.pivotal_truth import BAND, PATH_SEED, TRUTH_SEED, Choice, Log, Measured
from phiforge.core.environment import code_version, environment
from phiforge.core.files import content_hash
from phiforge.core.progress import Bar, progress
from phiforge.core.records import Problem, read_records
from phiforge.core.usage import UsageError
from phiforge.posttrain.pivotal import METHODS, exact, search
from phiforge.posttrain.pivotal.exact import ExactWorld

ROWS = 256  # the engine's; moves time, never results


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. `methods` are names, or `paper:N` for N rollouts a prefix.

    Without `model` the exact worlds of `seeds` are searched; with it `problems` are, once per seed
    of the search, against p by `brute_force` rollouts kept in the file `truth`.
    """

    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 18, 42, 45)
    gap: float = 0.2
    paths: int = 4
    path_choice: Literal["balanced", "natural"] = "balanced"
    questions: int | None = None  # 16 in each world, 4 of a model's problems
    quick: bool = False
    model: Path | None = None
    problems: Path | None = None
    truth: Path | None = None
    brute_force: int = 2000
    temperature: float = 1.0
    max_tokens: int = 256
    prompt_format: Literal["chat", "text"] = "chat"
    device: str = "auto"


@dataclass(frozen=True)
class _Method:
    """A method as it was asked for, and what `search` takes for it."""

    label: str
    arguments: Mapping[str, Any]


def run(options: Options) -> dict[str, Any]:
    """Search and score. Raises UsageError for options that contradict each other."""
    _check(options)
    if options.quick:
        options = _shortened(options)
    methods = [_method(name) for name in options.methods or _all_methods()]
    rows: dict[str, list[dict[str, Any]]] = {method.label: [] for method in methods}
    notes: list[str] = []
    if options.model is None:
        about = _on_worlds(options, methods, rows, notes)
    else:
        about = _on_model(options, methods, rows, notes)
    return {
        "task": "pivotal",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": environment(),
        "code": code_version(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "about": about,
        "notes": notes,
        "methods": [_summary(label, found, options) for label, found in rows.items()],
    }


def _summary(label: str, rows: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    summary = {"method": label, "figures": figures(rows, options.gap)}
    if options.model is not None:
        summary["clear"] = figures(rows, options.gap, clear=True)
    return {**summary, "seconds": sum(row["seconds"] for row in rows), "rows": rows}


def parse_seeds(listed: str) -> tuple[int, ...]:
    """Whole numbers between commas. Raises UsageError for anything else."""
    try:
        seeds = tuple(int(part) for part in listed.split(","))
    except ValueError:
        raise UsageError(f"--seeds {listed!r}: whole numbers between commas, as 0,18") from None
    if min(seeds) < 0:
        raise UsageError(f"--seeds {listed!r}: a seed is 0 or more")
    return seeds


def one_of(name: str, value: str, allowed: Sequence[str]) -> Any:
    """`value` if it is allowed; UsageError if not."""
    if value not in allowed:
        raise UsageError(f"{name} {value!r}: choose one of {', '.join(allowed)}")
    return value


def _check(options: Options) -> None:
    given = {"--problems": options.problems, "--truth": options.truth}
    for name, value in given.items():
        if options.model is None and value is not None:
            raise UsageError(f"{name} needs --model; exact worlds bring their own problems")
        if options.model is not None and value is None:
            raise UsageError(f"--model needs {name} FILE.jsonl")
    if set(options.seeds) & {PATH_SEED, TRUTH_SEED}:
        raise UsageError(f"--seeds: {PATH_SEED} and {TRUTH_SEED} draw the truth; take another")
    if len(set(options.seeds)) < len(options.seeds) or not options.seeds:
        raise UsageError(f"--seeds is {list(options.seeds)}; give at least one, each once")
    if len(set(options.methods)) < len(options.methods):
        raise UsageError(f"--method is {list(options.methods)}; give each once")
    least = {"--paths": options.paths, "--questions": options.questions or 1}
    for name, value in (least | {"--brute-force": options.brute_force}).items():
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


def _all_methods() -> tuple[str, ...]:
    return ("paper:50", "paper:100", *(name for name in METHODS if name != "paper"))


def _method(name: str) -> _Method:
    base, separator, number = name.partition(":")
    if base not in METHODS:
        raise UsageError(f"--method {name!r}: choose one of {', '.join(METHODS)}, or paper:N")
    if not separator:
        return _Method(name, {"method": base})
    if base != "paper":
        raise UsageError(f"--method {name!r}: only paper takes a number; {base} sets its own")
    if not number.isdecimal() or int(number) < 2:
        raise UsageError(f"--method {name!r}: rollouts a prefix are a whole number from 2")
    return _Method(name, {"method": base, "n_rollouts": int(number)})


def _shortened(options: Options) -> Options:
    return replace(
        options,
        methods=options.methods or ("paper:20",),
        seeds=options.seeds[:1],
        questions=min(options.questions or 2, 2),
        paths=min(options.paths, 2),
        brute_force=min(options.brute_force, 100),
    )


# --------------------------------------------------------------------------------- exact worlds


def _on_worlds(
    options: Options, methods: Sequence[_Method], rows: dict[str, list], notes: list[str]
) -> dict[str, Any]:
    """Every method on every world; a seed makes a world and its searches."""
    from phiforge.inference.engine import Engine

    count = options.questions or 16
    total = count * len(options.seeds) * len(methods)
    with (
        tempfile.TemporaryDirectory(prefix="phiforge-") as folder,
        progress(total, "questions", "pivotal") as bar,
    ):
        for seed in options.seeds:
            world = exact.build(Path(folder) / f"world-{seed}", seed)
            problems = _questions(world, count)
            if not problems:
                notes.append(f"world {seed} has no question with p in 0.25..0.75: left out")
                continue
            engine = Engine.from_folder(world.folder, rows=ROWS, device=_device(options))
            shared = {
                "paths_per_question": options.paths,
                "path_choice": options.path_choice,
                "max_tokens": world.max_tokens,
            }
            for method in methods:
                arguments = shared | dict(method.arguments)
                rows[method.label] += _searched(
                    engine,
                    problems,
                    world.oracle,
                    _exactly(world),
                    options.gap,
                    seed,
                    arguments,
                    bar,
                )
    return {"worlds": list(options.seeds), "questions": count}


def _questions(world: ExactWorld, count: int) -> list[Problem]:
    """`count` questions of a world: all that lie in 0.25..0.75, again and again."""
    alone = len(world.problems())
    return world.problems(copies=-(-count // alone))[:count] if alone else []


def _exactly(world: ExactWorld) -> Truth:
    def truth(prefix: Sequence[int], token_id: int) -> Effect:
        delta = world.delta(prefix, token_id)
        return Effect(delta, delta, delta)

    return truth


def _searched(
    engine: Any,
    problems: Sequence[Problem],
    oracle: Any,
    truth: Truth,
    gap: float,
    seed: int,
    arguments: Mapping[str, Any],
    bar: Bar,
) -> Iterator[dict[str, Any]]:
    """One row per question: its tokens judged, and what they cost."""
    run = search(engine, problems, oracle, gap=gap, seed=seed, **arguments)
    spent, since = _spent(run), time.monotonic()
    for question in run.questions():
        before, spent = spent, _spent(run)
        start, since = since, time.monotonic()
        bar.advance(1, method=arguments["method"], tokens=run.num_tokens)
        yield {
            "question": question.problem.id,
            "seed": seed,
            "status": question.status,
            "paths": len(question.paths),
            "tokens": judge(question, truth, gap),
            "tokens_drawn": {name: spent[name] - before[name] for name in PURPOSES},
            "seconds": since - start,
        }


def _spent(run: Any) -> dict[str, int]:
    return {name: getattr(run, f"num_{name}_tokens") for name in PURPOSES}


# ---------------------------------------------------------------------------------- a real model


def _on_model(
    options: Options, methods: Sequence[_Method], rows: dict[str, list], notes: list[str]
) -> dict[str, Any]:
    """Every method on the same paths of a model, once per seed."""
    from phiforge.inference.engine import Engine
    from phiforge.verify.answers import is_correct

    assert options.model is not None
    assert options.problems is not None
    assert options.truth is not None
    engine = Engine.from_folder(options.model, rows=ROWS, device=_device(options))
    problems = _asked(options)
    sampler = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    header = {"format": 1, "model": content_hash(options.model), **sampler}
    choice = Choice(
        questions=options.questions or 4,
        paths=options.paths,
        path_choice=options.path_choice,
        **sampler,
    )
    with Log(options.truth, header) as log:
        measured = Measured(engine, is_correct, problems, log, choice)
        with progress(1, "rollouts", "brute force") as bar:
            measured.measure(options.gap, options.brute_force, bar)
        if len(measured.problems) < choice.questions:
            notes.append(f"only {len(measured.problems)} questions lie in {BAND[0]}..{BAND[1]}")
        total = len(measured.problems) * len(methods) * len(options.seeds)
        given = {name: [a.token_ids for a in found] for name, found in measured.paths.items()}
        with progress(total, "questions", "pivotal") as bar:
            for method in methods:
                for seed in options.seeds:
                    arguments = {**sampler, "paths": given, **method.arguments}
                    rows[method.label] += _searched(
                        engine,
                        measured.problems,
                        is_correct,
                        measured.effect,
                        options.gap,
                        seed,
                        arguments,
                        bar,
                    )
        return {
            "questions": len(measured.problems),
            "paths": sum(map(len, measured.paths.values())),
            "positions": measured.num_positions,
            "brute_force": options.brute_force,
        }


def _asked(options: Options) -> list[Problem]:
    """The problems with an answer, text prompts as a user's message unless told otherwise."""
    assert options.problems is not None
    found = [p for p in read_records(options.problems, Problem) if p.answer is not None]
    if not found:
        raise UsageError(f"--problems {options.problems}: no problem has an answer to check")
    if options.prompt_format == "text":
        return found
    return [
        replace(p, prompt=[{"role": "user", "content": p.prompt}])
        if isinstance(p.prompt, str)
        else p
        for p in found
    ]


def _device(options: Options) -> str:
    from phiforge.core.distributed import resolve_device

    return str(resolve_device(options.device))


# -------------------------------------------------------------------------------------- the table


def text(result: dict[str, Any]) -> str:
    """The figures as aligned tables, and what they are of."""
    options, about = result["options"], result["about"]
    machine = result["machine"]
    lines = [f"{result['date']}  {machine['processor']}, {machine['cores']} cores", ""]
    seeds = ", ".join(map(str, options["seeds"]))
    if options["model"] is None:
        lines.append(f"exact worlds {seeds}: {about['questions']} questions each, p in closed form")
    else:
        lines.append(
            f"{options['model']}: {about['paths']} paths of {about['questions']} questions, "
            f"searched with seeds {seeds}; p by {about['brute_force']:,} rollouts before and after "
            f"{about['positions']} tokens"
        )
    lines += [f"gap {options['gap']:g}; 95% intervals in brackets, over questions", ""]
    lines += _table(
        [_QUALITY_HEAD, *(_quality(m["method"], m["figures"]) for m in result["methods"])]
    )
    lines += ["", "generated tokens"]
    lines += _table([_COST_HEAD, *(_cost(m) for m in result["methods"])])
    if options["model"] is not None:
        lines += ["", "without tokens whose true delta may lie on either side of the gap"]
        rows = [_quality(m["method"], m["clear"]) for m in result["methods"]]
        lines += _table([_QUALITY_HEAD, *rows])
    lines += [f"! {note}" for note in result["notes"]]
    if options["quick"]:
        lines += ["", "--quick shows that the benchmark works; its figures mean nothing."]
    return "\n".join(lines)


_QUALITY_HEAD = ["", *("true found right precision recall".split()), "|delta| bias", "coverage"]
_COST_HEAD = ["", *PURPOSES, "search + confirm / right", "all / right", "seconds"]


def _quality(label: str, found: dict[str, Any]) -> list[str]:
    counts = [f"{found[name]:,}" for name in ("true", "found", "right")]
    shares = [_between(found, name, ".2f") for name in ("precision", "recall")]
    return [
        label,
        *counts,
        *shares,
        _between(found, "bias", "+.3f"),
        _between(found, "coverage", ".2f"),
    ]


def _cost(summary: dict[str, Any]) -> list[str]:
    found = summary["figures"]
    return [
        summary["method"],
        *(f"{found[f'{name}_tokens']:,}" for name in PURPOSES),
        _between(found, "tokens_per_right", ",.0f"),
        _between(found, "all_tokens_per_right", ",.0f"),
        f"{summary['seconds']:,.0f}",
    ]


def _between(found: dict[str, Any], name: str, style: str) -> str:
    """A value with its interval; - where there is none, … where a bound is open."""
    if found[name] is None:
        return "-"
    low, high = ("…" if x is None else f"{x:{style}}" for x in found[f"{name}_interval"])
    return f"{found[name]:{style}} [{low}, {high}]"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
