"""The command line: `phiforge run nano`, `phiforge chat runs/nano`, `phiforge --help`.

Every command exits with 0 (done), 1 (failed) or 2 (misused); results go to standard output (with
--json as JSON), progress and messages to standard error.
"""

import errno
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from phiforge import __version__
from phiforge.bench.command import app as bench_app
from phiforge.posttrain.command import app as pivotal_app
from phiforge.serve.command import serve
from phiforge.verify.command import app as sandbox_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="phiforge: everything that makes a small language model that reasons, in one recipe.",
    epilog="First: `phiforge doctor`, then `phiforge run nano`, then `phiforge chat runs/nano-s0`.",
)

app.add_typer(bench_app, name="bench")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(pivotal_app, name="pivotal")
app.command(epilog="Example: `phiforge serve runs/nano-s0 --port 8000`")(serve)

RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the run folders.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. pretrain.steps=10."),
]
RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]


def _version(value: bool) -> None:
    if value:
        print(f"phiforge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that belong to no command."""


@app.command(epilog="Example: `phiforge run nano --set seed=1`")
def run(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    set: SetOption = None,
    rebuild: Annotated[
        list[str] | None,
        typer.Option(help="Make this stage anew, and what follows from it; 'all' for every one."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Run a recipe; finished stages are skipped, an interrupted run goes on where it was."""
    from phiforge.recipe import run as run_recipe

    folder = run_recipe(recipe, runs, _overrides(set), rebuild or (), until)
    report = folder / "report" / "index.html"
    if json_output:
        _print_json({"run": str(folder), "stages": _stage_rows(folder)})
        return
    _print_table(_stage_rows(folder), ("stage", "state", "clock", "facts"))
    if report.exists():
        print(f"\nreport: {report}")
    if any(folder.glob("*/model/config.json")):
        print(f"chat:   phiforge chat {folder}")


@app.command(epilog="Example: `phiforge status runs/nano-s0`")
def status(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    verify: Annotated[bool, typer.Option(help="Also check every output's hash.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Show what a run folder holds, and what a running stage last said."""
    _check_run_folder(folder)
    rows = _stage_rows(folder, verify)
    if json_output:
        _print_json(rows)
    elif rows:
        _print_table(rows, ("stage", "state", "clock", "facts"))
    else:
        print(f"{folder}: no stage has begun here", file=sys.stderr)
    if any(row["state"] == "damaged" for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: `phiforge explain nano --set pretrain.lr=1e-3`")
def explain(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    set: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say for every stage whether it would run, and why; nothing is started."""
    from phiforge.recipe import explain as explain_recipe

    rows = explain_recipe(recipe, runs, _overrides(set))
    if json_output:
        _print_json(rows)
        return
    for row in rows:
        print(f"{row['stage']:<12} {row['action']:<8} {row['reasons'][0]}")
        for reason in row["reasons"][1:]:
            print(f"{'':<21} {reason}")
    if changed := [row["stage"] for row in rows if row["action"] == "changed"]:
        print(
            f"The run would stop at {changed[0]}, which is there with other settings: give "
            f"--rebuild {changed[0]} to make it anew, or --set name=… to keep both.",
            file=sys.stderr,
        )


@app.command(epilog="Example: `phiforge stages`")
def stages(json_output: JsonOption = False) -> None:
    """Print the stage table: what each stage reads and writes."""
    from phiforge.stages import STAGES

    rows = [
        {"stage": s.name, "reads": ", ".join(s.reads) or "-", "writes": s.writes} for s in STAGES
    ]
    if json_output:
        _print_json(rows)
    else:
        _print_table(rows, ("stage", "reads", "writes"))


@app.command(epilog="Example: `phiforge stage pivotal --run runs/mine --input sft=my-model`")
def stage(
    name: Annotated[str, typer.Argument(help="A stage of `phiforge stages`.")],
    run: Annotated[Path, typer.Option(help="Run folder; the result goes to RUN/NAME.")],
    input: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE=FOLDER", help="A folder that stands in for an earlier stage."),
    ] = None,
    set: SetOption = None,
    rebuild: Annotated[bool, typer.Option(help="Make it anew.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Run one stage alone, on folders of your own; resumes and skips like a run."""
    from phiforge.recipe import run_stage

    manifest = run_stage(name, run, _pairs(input, "--input"), _overrides(set), rebuild)
    if json_output:
        _print_json(manifest)
    else:
        print(run / name)


@app.command(epilog="Example: `phiforge report runs/nano-s0`")
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Build RUN/report.html from a run's files (of an unfinished run too)."""
    from phiforge.report import build

    _check_run_folder(folder)
    print(build(folder))


@app.command(epilog="Example: `phiforge compare runs/nano-s0 runs/nano-s1 --markdown`")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders with a finished evaluate.")],
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Put the headline figures of several runs side by side, with n and 95% intervals."""
    from phiforge.compare import compare as compare_runs

    rows = compare_runs(folders)
    if json_output:
        _print_json(rows)
    elif markdown:
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(row.values()) + " |")
    else:
        _print_table(rows, tuple(rows[0]))


@app.command(epilog="Example: `phiforge chat runs/nano-s0`")
def chat(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub name.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Talk to a model in the terminal; answers appear as they are made."""
    from phiforge.serve.terminal import chat as chat_loop

    chat_loop(model, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed)


@app.command(
    epilog="Example: `phiforge convert runs/nano-s0 --to gguf --type q8_0 --out nano.gguf`"
)
def convert(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub name.")],
    to: Annotated[str, typer.Option(help="gguf (for llama.cpp) or safetensors.")],
    out: Annotated[Path, typer.Option(help="File (gguf) or folder (safetensors) to make.")],
    type: Annotated[
        str | None, typer.Option(help="Of a gguf file's matrices: f32, bf16 (default) or q8_0.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of safetensors: bf16 (default), fp32 or fp16.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Tensor names of safetensors: phi3 (default) or llama.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Write a model in another format: GGUF with its tokenizer, or safetensors."""
    from phiforge.model.convert import convert as convert_model
    from phiforge.model.folders import find_model

    result = convert_model(find_model(model), to, out, type=type, dtype=dtype, layout=layout)
    if json_output:
        _print_json(result)
        return
    print(f"{result['path']}  {result['num_bytes'] / 1e6:,.1f} MB, {result['type']}")
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)


@app.command(epilog="Example: `phiforge ask questions.jsonl --model phi-4 --out answers.jsonl`")
def ask(
    file: Annotated[Path, typer.Argument(help="JSONL: each row a prompt or messages, and an id.")],
    model: Annotated[str, typer.Option(help="What the server calls the model.")],
    out: Annotated[Path, typer.Option(help="JSONL to write: one row per sample.")],
    base_url: Annotated[
        str, typer.Option(help="An OpenAI-compatible API.")
    ] = "http://127.0.0.1:8000/v1",
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Replay cache; OUT.cache if not given.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_tokens_per_answer: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    json_schema: Annotated[Path | None, typer.Option(help="Schema that answers must fit.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--complete", help="Which API; by the prompts' form.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most calls in flight.")] = 64,
    max_usd: Annotated[float | None, typer.Option(min=0.0, help="Most money to spend.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="Most tokens to spend.")] = None,
    max_calls: Annotated[int | None, typer.Option(min=0, help="Most calls to pay.")] = None,
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="PROMPT ANSWER", help="USD per million tokens."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Count and price the calls; send nothing.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Answer a file of prompts through an endpoint; run again, it pays only for what is missing."""
    from phiforge.inference.endpoint import EndpointConfig, Estimate
    from phiforge.inference.endpoint.ask import ask as ask_endpoint
    from phiforge.inference.endpoint.ask import read_schema
    from phiforge.inference.interface import Sampling

    config = EndpointConfig(
        model=model,
        base_url=base_url,
        api_key_env=api_key_env,
        cache=cache,
        chat=chat,
        concurrency=concurrency,
        max_usd=max_usd,
        max_tokens=max_tokens,
        max_calls=max_calls,
        prices={"prompt": price[0], "completion": price[1]} if price else None,  # type: ignore[arg-type]
    )
    found = ask_endpoint(
        file,
        out,
        config,
        n=n,
        seed=seed,
        sampling=Sampling(max_tokens=max_tokens_per_answer, temperature=temperature),
        schema=read_schema(json_schema),
        dry_run=dry_run,
    )
    if isinstance(found, Estimate):
        if json_output:
            _print_json(found.row())
        else:
            rows = [{"what": name, "value": value} for name, value in found.lines()]
            _print_table(rows, ("what", "value"))
        return
    if json_output:
        _print_json(found)
    else:
        print(f"{out}: {found['answered']} answers, {found['cached']} of them from the cache")
    if found["failed"]:
        kinds = ", ".join(f"{number} {kind}" for kind, number in found["failed"].items())
        print(f"failed: {kinds}; the rows say why, running again tries them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command(epilog="Example: `phiforge doctor --json`")
def doctor(json_output: JsonOption = False) -> None:
    """Check this machine: Python, torch, bf16, compiler, GPU, extras, memory, disk."""
    from phiforge.doctor import examine

    rows = examine()
    if json_output:
        _print_json(rows)
    else:
        _print_table(rows, ("check", "state", "detail"))
    if any(row["state"] == "missing" for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: `phiforge init my-model --from nano`")
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    source: Annotated[str, typer.Option("--from", help="A shipped recipe to start from.")] = "nano",
) -> None:
    """Start a project: a folder with a recipe of your own to edit."""
    from phiforge.recipe import find_recipe

    target = folder / "recipe.yaml"
    if target.exists():
        raise typer.BadParameter(f"{target} exists already; choose another folder")
    text = find_recipe(source).read_text(encoding="utf-8")
    # A run of its own: it must not meet the run folder of the recipe it came from.
    name = json.dumps(f"{folder.resolve().name}-s{{seed}}", ensure_ascii=False)
    text = re.sub(r"^name:.*$", lambda _: f"name: {name}", text, count=1, flags=re.M)
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"{target}\nEdit it, then: phiforge explain {target} && phiforge run {target}")


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    from phiforge.core.strict_yaml import parse_value

    given = _pairs(pairs, "--set")
    return {key: parse_value(value, f"--set {key}") for key, value in given.items()}


def _pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            form = "KEY=VALUE" if option == "--set" else "STAGE=FOLDER"
            raise typer.BadParameter(f"{option} {pair!r}: write it as {form}")
        if key in found:
            raise typer.BadParameter(f"{option} {key} is given twice")
        found[key] = value
    return found


def _check_run_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder}: no such run folder")


def _stage_rows(folder: Path, verify: bool = False) -> list[dict[str, Any]]:
    from phiforge.status import stage_rows

    return stage_rows(folder, verify)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Aligned columns; long texts fold inside theirs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for column in columns:
        longest = max(len(str(row.get(column, ""))) for row in rows)
        table.add_column(column, overflow="fold", no_wrap=longest <= 24)
    for row in rows:
        # Text, because strings would be read as markup: "[hub]" is a style there.
        table.add_row(*(Text(str(row.get(column, ""))) for column in columns))
    Console(width=None if sys.stdout.isatty() else 100, soft_wrap=False).print(table)


def _os_error(error: OSError) -> str:
    """What an operating-system error means here, and what to do."""
    if error.filename is None and error.strerror is None:
        return str(error)
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return f"{name}: {full}. Free some space, then run the same command: it goes on."
    if error.errno == errno.EFBIG:
        return (
            f"{name}: larger than this file system or `ulimit -f` allows. Raise the limit, then "
            "run the same command: it goes on."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{name}: no permission ({error.strerror}). Check its permissions; --runs names "
            "another folder for runs."
        )
    return f"{name}: {error.strerror or error}"


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    os.environ.setdefault("PYTHONUTF8", "1")
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        # Without standalone mode an Exit comes back as its code.
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_failed(error))
    sys.exit(code if isinstance(code, int) else 0)


# Typer's base class of messages about the command line, wherever it keeps it in this version.
_Misused: type[Exception] = typer.BadParameter.__mro__[1]


def _failed(error: Exception) -> int:
    """Print what went wrong; the exit code: 2 misused, 1 failed."""
    if isinstance(error, _Misused):
        error.show()  # type: ignore[attr-defined]
        return 2
    if os.environ.get("PHIFORGE_TRACEBACK"):
        raise error
    from phiforge.core.usage import UsageError

    if isinstance(error, UsageError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError):
        print(f"error: {_os_error(error)}", file=sys.stderr)
        return 1
    if isinstance(error, ValueError):
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(error, RuntimeError):
        print(f"error: {error}", file=sys.stderr)
        print("(PHIFORGE_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    raise error
