"""`phiforge pivotal search | plan | pairs | report | import | export`: the commands.

`app` is added to the command line by cli.py; nothing heavy is imported until one is called. A
search writes its folder (--out) and goes on from there when it is called again.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Pivotal tokens: the single tokens that decide whether an answer ends right.",
    epilog="Example: `phiforge pivotal search runs/nano-s0 questions.jsonl --out found`",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder of a finished search.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Folder of the tokenizer, if not the searched model's.")
]


def search(
    model: Annotated[
        str, typer.Argument(help="A run or model folder, a hub name; or the served name.")
    ],
    questions: Annotated[str, typer.Argument(help="JSONL, Parquet, a folder, or a hub data set.")],
    out: Annotated[Path, typer.Option(help="Folder of the search.")],
    preset: Annotated[
        str | None, typer.Option(help="gsm8k, math, humaneval or mbpp: columns and oracle known.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Column of the question.")] = "prompt",
    answer: Annotated[str, typer.Option(help="Column of the gold answer.")] = "answer",
    id_: Annotated[str, typer.Option("--id", help="Column of the id.")] = "id",
    kind: Annotated[
        str | None, typer.Option(help="How answers are compared: number, unit, choice, text, code.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            help="exact, math, number, choice, code, judge, module:function or command:PROGRAM; "
            "the last two run with your rights. Default: the preset's, else exact."
        ),
    ] = None,
    oracle_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the oracle.")
    ] = None,
    prompt_format: Annotated[
        str, typer.Option("--format", help="chat (the model's template) or text.")
    ] = "chat",
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    template: Annotated[str | None, typer.Option(help="Text around {prompt}.")] = None,
    think: Annotated[
        str | None, typer.Option(help="open: answers begin inside <think>; closed: without.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="fast, balanced, thorough, or paper (the report's bisection).")
    ] = "balanced",
    gap: Annotated[float, typer.Option(help="Least change of p(success).")] = 0.2,
    band: Annotated[
        tuple[float, float], typer.Option(help="Questions are kept with p(success) in it.")
    ] = (0.2, 0.8),
    n_filter: Annotated[int, typer.Option(min=2, help="Answers a question for the band.")] = 32,
    n_rollouts: Annotated[int, typer.Option(min=2, help="Rollouts a prefix (paper only).")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of all rollouts.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    paths: Annotated[int, typer.Option(min=1, help="Answers searched a question.")] = 2,
    path_choice: Annotated[
        str, typer.Option(help="balanced: success, failure, ...; natural: as sampled.")
    ] = "balanced",
    pair_gap: Annotated[float | None, typer.Option(help="Least difference of a pair.")] = None,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="Stop at so many pairs.")] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generated tokens, spent in question order.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, engine (ours), transformers or endpoint.")
    ] = "auto",
    endpoint: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server, e.g. .../v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable of its key.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, for an endpoint.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="Most samples at a time.")] = 256,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = one per core.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Search the model's own answers; a killed search goes on where it was."""
    _search(dict(locals()))


def _search(given: dict[str, Any]) -> None:
    from phiforge.posttrain.pivotal.plan import Expected, compare
    from phiforge.posttrain.pivotal.runs import run_search

    options, where = _options(given)
    metrics = run_search(options, where, given["out"])
    rows = []
    planned = given["out"] / "plan.json"
    if planned.is_file():
        forecast = json.loads(planned.read_text())["forecast"]
        rows = compare({name: Expected(**row) for name, row in forecast.items()}, metrics)
    if given["json_output"]:
        typer.echo(json.dumps({**metrics, "plan": rows}, indent=1))
        return
    for name, value in metrics.items():
        typer.echo(f"{name:24} {value:,}" if isinstance(value, int) else f"{name:24} {value}")
    for row in rows:
        verdict = "as planned" if row["inside"] else "OUTSIDE the plan"
        bounds = f"[{row['low']:,.0f}, {row['high']:,.0f}]"
        typer.echo(f"plan: {row['quantity']:18} {row['came']:>12,.0f} of {bounds} {verdict}")
    typer.echo(f"next: phiforge pivotal report {given['out']}")


PilotOption = Annotated[int, typer.Option(min=2, help="Questions that are really searched.")]


def plan(pilot: int, **given: Any) -> None:
    """Forecast tokens, time and yield from a pilot, whose rollouts the search then uses."""
    from phiforge.posttrain.pivotal.runs import run_plan

    options, where = _options(given)
    expected = run_plan(options, where, given["out"], pilot)
    if given["json_output"]:
        rows = {name: vars(value) for name, value in expected.items()}
        typer.echo(json.dumps(rows, indent=1))
        return
    for name, value in expected.items():
        typer.echo(f"{name:20} {value.total:>14,.0f}  [{value.low:,.0f}, {value.high:,.0f}]")


def _with_pilot(function: Callable[..., None]) -> Callable[..., None]:
    """`plan` takes what `search` takes, and the size of the pilot."""
    pilot = inspect.Parameter(
        "pilot", inspect.Parameter.KEYWORD_ONLY, default=16, annotation=PilotOption
    )
    parameters = [*inspect.signature(search).parameters.values(), pilot]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


app.command(epilog="Example: `phiforge pivotal search runs/nano-s0 q.jsonl --out found`")(search)
app.command(epilog="Example: `phiforge pivotal plan runs/nano-s0 q.jsonl --out found --pilot 16`")(
    _with_pilot(plan)
)


def _options(given: dict[str, Any]) -> tuple[Any, Any]:
    from phiforge.core.usage import UsageError
    from phiforge.posttrain.pivotal.results import Settings
    from phiforge.posttrain.pivotal.runs import SearchOptions, Where

    settings = ("method", "gap", "n_filter", "n_rollouts", "temperature", "max_tokens", "seed")
    same = ("path_choice", "pair_gap")
    options = (
        "model", "questions", "preset", "prompt", "answer", "kind", "split", "limit", "oracle",
        "system", "template", "think", "dtype", "max_pairs", "budget_tokens",
    )  # fmt: skip
    where = ("backend", "endpoint", "api_key_env", "tokenizer", "device", "rows", "threads")
    try:
        search_options = SearchOptions(
            settings=Settings(
                **{name: given[name] for name in (*settings, *same)},
                band=tuple(given["band"]),
                paths_per_question=given["paths"],
            ),
            id=given["id_"],
            format=given["prompt_format"],
            oracle_options=dict(_pair_of(text) for text in given["oracle_option"] or ()),
            **{name: given[name] for name in options},
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return search_options, Where(**{name: given[name] for name in where})


def _pair_of(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--oracle-option {text}: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@app.command(epilog="Example: `phiforge pivotal pairs found --gap 0.3 --out pairs.jsonl`")
def pairs(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option(help="File of the pairs (JSONL or Parquet).")],
    gap: Annotated[float | None, typer.Option(help="Another gap than the search's.")] = None,
    pair_gap: Annotated[float | None, typer.Option(help="Least difference of a pair.")] = None,
    tokenizer: TokenizerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make pairs from a finished search's rollouts, at another gap: nothing is sampled."""
    from phiforge.core.records import write_records
    from phiforge.posttrain.pivotal.offline import Reanalysis
    from phiforge.posttrain.pivotal.runs import settings_of, tokenizer_of

    changed = {"gap": gap, "pair_gap": pair_gap}
    settings = settings_of(folder, **{k: v for k, v in changed.items() if v is not None})
    again = Reanalysis(folder, settings, tokenizer_of(folder, tokenizer))
    questions = list(again)
    found = [pair for question in questions for pair in question.pairs]
    write_records(out, found)
    result = {
        "pairs": len(found),
        "pivotal_tokens": sum(len(question.tokens) for question in questions),
        "unconfirmed": again.num_unconfirmed,
    }
    if json_output:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['pairs']} pairs of {result['pivotal_tokens']} pivotal tokens: {out}")
    if again.num_unconfirmed:
        typer.echo(
            f"{again.num_unconfirmed} more tokens look pivotal but have no fresh rollouts: "
            "search again with this gap in the same folder"
        )


@app.command(epilog="Example: `phiforge pivotal report found`")
def report(
    folder: FolderArgument,
    out: Annotated[
        Path | None, typer.Option(help="The page; FOLDER/report.html by default.")
    ] = None,
) -> None:
    """One HTML page: solutions coloured by p, pivotal tokens with intervals, yield and cost."""
    from phiforge.posttrain.pivotal.page import write_report

    target = out or folder / "report.html"
    write_report(folder, target)
    typer.echo(str(target))


@app.command(
    "import", epilog="Example: `phiforge pivotal import tokens.jsonl --tokenizer M --out f`"
)
def import_(
    file: Annotated[Path, typer.Argument(help="JSONL of codelion/pts: tokens, events or pairs.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the model it is about.")],
    out: Annotated[Path, typer.Option(help="Folder for tokens.jsonl and pairs.jsonl.")],
) -> None:
    """Read what codelion/pts wrote; rows that cannot be placed exactly are listed, not guessed."""
    from phiforge.core.records import write_records
    from phiforge.model.huggingface import resolve_folder
    from phiforge.model.tokenizer import Tokenizer
    from phiforge.posttrain.pivotal.exchange import import_codelion

    tokens, found, told = import_codelion(file, Tokenizer.load(resolve_folder(tokenizer)))
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "tokens.jsonl", tokens)
    write_records(out / "pairs.jsonl", found)
    typer.echo(f"{len(tokens)} tokens and {len(found)} pairs in {out}")
    for refusal in told.refused[:10]:
        typer.echo(f"left out {refusal}", err=True)
    typer.echo(f"{told.num_duplicates} rows came twice, {len(told.refused)} are left out", err=True)


@app.command(epilog="Example: `phiforge pivotal export found --to trl --out pairs.parquet`")
def export(
    folder: FolderArgument,
    to: Annotated[str, typer.Option(help="token-ids, text, trl or codelion.")],
    out: Annotated[Path, typer.Option(help="The file.")],
    tokenizer: TokenizerOption = None,
    keep_inexact: Annotated[
        bool, typer.Option(help="Keep text rows that come back as other tokens.")
    ] = False,
) -> None:
    """Write a search's pairs for other tools; text that would change its tokens is left out."""
    from phiforge.posttrain.pivotal.exchange import export as export_pairs
    from phiforge.posttrain.pivotal.runs import tokenizer_of

    told = export_pairs(
        folder / "pairs.jsonl",
        to,  # type: ignore[arg-type]
        out,
        tokenizer_of(folder, tokenizer),
        keep_inexact=keep_inexact,
    )
    typer.echo(f"{told.num_written} of {told.num_pairs} pairs in {out}")
    for refusal in told.inexact[:10]:
        typer.echo(f"not exact as text: {refusal}", err=True)
