"""A search as a folder: model, questions and oracle by name; resumed, planned, reported from there.

`run_search(options, out)` writes the files of outputs.py and `options.json` into the folder;
`open_generator(options)` is what samples. A killed search goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from phiforge.core.files import write_json
from phiforge.core.records import Problem
from phiforge.core.store import Metrics, StageDir
from phiforge.data.benchmarks import BENCHMARKS
from phiforge.inference.interface import prompt_token_ids
from phiforge.posttrain.pivotal.inputs import as_prompts, preset_instruction, read_problems
from phiforge.posttrain.pivotal.oracles import Oracle, open_oracle
from phiforge.posttrain.pivotal.outputs import collect
from phiforge.posttrain.pivotal.plan import Expected, forecast, observe
from phiforge.posttrain.pivotal.results import Settings
from phiforge.posttrain.pivotal.search import Search, search

Backend = Literal["auto", "engine", "transformers", "endpoint"]
BACKENDS = ("auto", "engine", "transformers", "endpoint")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Everything that shapes a search of a folder; `where` it runs is apart."""

    model: str
    questions: str
    settings: Settings
    preset: str | None = None
    prompt: str = "prompt"
    answer: str = "answer"
    id: str = "id"
    kind: str | None = None
    split: str | None = None
    limit: int | None = None
    oracle: str | None = None  # None: the preset's, else "exact"
    oracle_options: dict[str, Any] = field(default_factory=dict)
    format: Literal["chat", "text"] = "chat"
    system: str | None = None
    template: str | None = None
    think: Literal["open", "closed"] | None = None
    dtype: str = "auto"
    max_pairs: int | None = None
    budget_tokens: int | None = None

    @property
    def oracle_name(self) -> str:
        """The oracle asked for, or the one that belongs to the preset."""
        if self.oracle is not None:
            return self.oracle
        return BENCHMARKS[self.preset].oracle if self.preset else "exact"


@dataclass(frozen=True, kw_only=True)
class Where:
    """What computes, and how much at once: speed alone, as far as the backend is exact."""

    backend: Backend = "auto"
    endpoint: str | None = None
    api_key_env: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    rows: int = 256
    threads: int = 0


def open_generator(options: SearchOptions, where: Where, cache: Path | None = None) -> Any:
    """The generator of a model's name: our engine, transformers, or a server.

    "auto" takes the endpoint if one is given, our engine for the layouts it knows, else
    transformers, and says so. Raises ValueError for what does not go together.
    """
    from phiforge.core.config import Exec
    from phiforge.core.distributed import set_threads
    from phiforge.model.folders import find_model

    if where.backend not in BACKENDS:
        raise ValueError(f"backend is {where.backend!r}; allowed: {', '.join(BACKENDS)}")
    if where.endpoint is not None:
        return _endpoint(options, where, cache)
    if where.backend == "endpoint":
        raise ValueError("backend endpoint needs the server's address: --endpoint URL")
    set_threads(Exec(threads=where.threads))
    folder = find_model(options.model)
    if where.backend == "transformers":
        return _transformers(folder, options, where)
    try:
        return _engine(folder, options, where)
    except ValueError as error:
        if where.backend == "engine" or "model_type" not in str(error):
            raise
        print(f"engine: not this model ({error}); transformers instead", flush=True)
        return _transformers(folder, options, where)


def _engine(folder: str | Path, options: SearchOptions, where: Where) -> Any:
    from phiforge.core.distributed import resolve_device, resolve_dtype
    from phiforge.inference.engine import Engine
    from phiforge.model.huggingface import load

    dtype = str(resolve_dtype("fp32" if options.dtype == "auto" else options.dtype))
    device = str(resolve_device(where.device))
    model, tokenizer = load(folder, dtype=dtype.removeprefix("torch."), device=device)
    return Engine(model, tokenizer, rows=where.rows, mode="exact")


def _transformers(folder: str | Path, options: SearchOptions, where: Where) -> Any:
    from phiforge.core.distributed import resolve_device
    from phiforge.inference.transformers import TransformersModel

    device = resolve_device(where.device)
    names = {"fp32": "float32", "bf16": "bfloat16"}
    dtype = names.get(options.dtype, options.dtype)
    return TransformersModel.from_folder(folder, dtype, device, rows=where.rows)


def _endpoint(options: SearchOptions, where: Where, cache: Path | None) -> Any:
    from phiforge.inference.endpoint import Endpoint
    from phiforge.model.tokenizer import Tokenizer

    if where.tokenizer is None:
        raise ValueError("an endpoint needs the model's tokenizer: --tokenizer FOLDER")
    return Endpoint(
        str(where.endpoint),
        options.model,
        tokenizer=Tokenizer.load(Path(where.tokenizer)),
        api_key_env=where.api_key_env,
        returns_token_ids=True,
        concurrency=where.rows,
        cache=cache,
    )


def questions_of(options: SearchOptions, tokenizer: Any) -> list[Problem]:
    """The problems as the model is asked them."""
    problems = read_problems(
        options.questions,
        preset=options.preset,
        prompt=options.prompt,
        answer=options.answer,
        id=options.id,
        kind=options.kind,
        split=options.split,
        limit=options.limit,
    )
    instruction = preset_instruction(options.preset, options.format) if options.preset else None
    return as_prompts(
        problems,
        format=options.format,
        system=options.system,
        template=options.template,
        instruction=instruction,
        think=options.think,
        tokenizer=tokenizer,
    )


def usable(
    problems: list[Problem], oracle: Oracle, generator: Any, max_tokens: int, out: StageDir
) -> list[Problem]:
    """The problems that can be asked and judged; says which are not, and why.

    Raises ValueError when none is left.
    """
    context = getattr(generator, "context", None)
    kept, reasons = [], {}
    for problem in problems:
        why = oracle.refuses(problem)
        if why is None and context is not None:
            length = len(prompt_token_ids(generator.tokenizer, problem.prompt))
            if length + max_tokens > context:
                why = f"{length} tokens leave no room for {max_tokens} in a context of {context}"
        if why is None:
            kept.append(problem)
        else:
            reasons[problem.id] = why
    for name, why in list(reasons.items())[:3]:
        out.note(f"left out {name}: {why}")
    if reasons:
        out.note(f"{len(reasons)} of {len(problems)} questions are left out")
    if not kept:
        raise ValueError(f"no question can be searched: {next(iter(reasons.values()))}")
    return kept


def run_search(options: SearchOptions, where: Where, folder: Path) -> Metrics:
    """Search every question; the folder then has tokens, pairs, paths, rollouts and search.json.

    The same options in the same folder go on after a kill; other ones are refused by the log.
    """
    return _with_search(options, where, folder, None, _collect)


def run_plan(options: SearchOptions, where: Where, folder: Path, pilot: int) -> dict[str, Expected]:
    """Search the first `pilot` questions, forecast the rest; `plan.json` keeps the forecast.

    A search of the same folder uses the pilot's rollouts: nothing is drawn twice.
    """

    def measure(found: Search, count: int, total: int, out: StageDir) -> dict[str, Expected]:
        observed, begin = [], time.monotonic()
        with out.progress(count, "questions", "plan") as bar:
            for question in found.questions():
                observed.append(observe(question))
                bar.advance(1)
        seconds = (time.monotonic() - begin) / max(1, len(observed))
        expected = forecast([{**row, "seconds": seconds} for row in observed], total)
        rows = {name: asdict(value) for name, value in expected.items()}
        write_json(out.path / "plan.json", {"pilot": len(observed), "forecast": rows})
        return expected

    return _with_search(options, where, folder, pilot, measure)


def _collect(found: Search, count: int, total: int, out: StageDir) -> Metrics:
    return collect(found, count, found.tokenizer, out)


def _with_search(
    options: SearchOptions,
    where: Where,
    folder: Path,
    pilot: int | None,
    work: Callable[[Search, int, int, StageDir], Any],
) -> Any:
    out = StageDir.scratch(folder)
    with ExitStack() as stack:
        generator = open_generator(options, where, out.state / "answers.sqlite")
        thinking = "opened" if options.think == "open" else "strip"
        oracle = stack.enter_context(
            open_oracle(options.oracle_name, thinking=thinking, **options.oracle_options)
        )
        problems = questions_of(options, generator.tokenizer)
        problems = usable(problems, oracle, generator, options.settings.max_tokens, out)
        oracle.check(problems[0])
        tokenizer = where.tokenizer or options.model
        record = {**asdict(options), "tokenizer": tokenizer, "num_questions": len(problems)}
        write_json(folder / "options.json", record)
        chosen = problems if pilot is None else problems[:pilot]
        found = search(
            generator,
            chosen,
            oracle,
            **asdict(options.settings),
            max_pairs=options.max_pairs,
            budget_tokens=options.budget_tokens,
            log=out.state / "rollouts.jsonl",
            questions_in_flight=max(16, where.rows // 4),
            rollouts_per_call=16 * where.rows,
        )
        return work(found, len(chosen), len(problems), out)


def options_of(folder: Path) -> dict[str, Any]:
    """What a search's folder was made with. Raises ValueError for another folder."""
    file = folder / "options.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no options.json; give a folder of `phiforge pivotal search`")
    return json.loads(file.read_text(encoding="utf-8"))


def tokenizer_of(folder: Path, given: str | None = None) -> Any:
    """The tokenizer that a search's token ids belong to."""
    from phiforge.model.folders import find_model
    from phiforge.model.huggingface import resolve_folder
    from phiforge.model.tokenizer import Tokenizer

    name = given or options_of(folder)["tokenizer"]
    return Tokenizer.load(resolve_folder(find_model(name)))


def settings_of(folder: Path, **changed: Any) -> Settings:
    """A search's settings, some of them changed."""
    known = options_of(folder)["settings"]
    known["band"] = tuple(known["band"])
    return replace(Settings(**known), **changed)
