"""`phiforge bench engine | train | sandbox | pivotal | setup`: the commands; --help needs no torch.

`app` is added to the command line by cli.py. Tables go to standard output, progress to standard
error; --out writes the JSON to a file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure phiforge beside other programs: the same work, taking turns.",
    epilog="Example: `phiforge bench engine --size nano --peer transformers`",
)

_SIZE_HELP = "nano, {}small-100m or phi-4-layers (GPU); default: all that can."
EngineSizeOption = Annotated[
    list[str] | None, typer.Option("--size", help=_SIZE_HELP.format("pts, "))
]
TrainSizeOption = Annotated[list[str] | None, typer.Option("--size", help=_SIZE_HELP.format(""))]
PeerOption = Annotated[
    list[str] | None,
    typer.Option("--peer", help="transformers, litgpt, llama.cpp or none; default: all there are."),
]
PythonOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PYTHON", help="A Python that has the peer, in place of `setup`'s."),
]
RepeatOption = Annotated[int, typer.Option(min=1, help="Rounds that are measured.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads of everyone; 0 = one per core.")]
QuickOption = Annotated[bool, typer.Option(help="Tiny and short: shows that it works, in seconds.")]
TimeoutOption = Annotated[float, typer.Option(help="Longest wait for one answer, in seconds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutOption = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


@app.command(epilog="Example: `phiforge bench engine --size small-100m --out engine.json`")
def engine(
    size: EngineSizeOption = None,
    peer: PeerOption = None,
    peer_python: PythonOption = None,
    repeat: RepeatOption = 5,
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    timeout: TimeoutOption = 600.0,
    json_output: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Decoding: one row, a batch, many short samples, a level of pivotal-token search."""
    options = (size, peer, peer_python, repeat, threads, quick, timeout)
    _measure("engine", *options, json_output=json_output, out=out)


@app.command(epilog="Example: `phiforge bench train --size nano --peer transformers`")
def train(
    size: TrainSizeOption = None,
    peer: PeerOption = None,
    peer_python: PythonOption = None,
    repeat: RepeatOption = 5,
    threads: ThreadsOption = 0,
    quick: QuickOption = False,
    timeout: TimeoutOption = 600.0,
    json_output: JsonOption = False,
    out: OutOption = None,
) -> None:
    """The training step: the loop of `phiforge.train` beside the peers' loops."""
    options = (size, peer, peer_python, repeat, threads, quick, timeout)
    _measure("train", *options, json_output=json_output, out=out)


@app.command(epilog="Example: `phiforge bench sandbox --workers 2 --out sandbox.json`")
def sandbox(
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="Programs at a time; default: 1, then 2.")
    ] = None,
    peer_python: PythonOption = None,
    repeat: RepeatOption = 5,
    quick: QuickOption = False,
    json_output: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Running foreign programs: our sandbox, others', no isolation, what the machine allows."""
    from phiforge.bench import sandbox as bench

    pythons = _pythons(peer_python or ())
    _check_out(out)
    result = bench.run(bench.Options(tuple(workers or (1, 2)), repeat, quick, pythons))
    _show(result, bench.text, json_output=json_output, out=out)
    if bench.wrong(result):
        raise typer.Exit(1)


@app.command(epilog="Example: `phiforge bench pivotal --method paper:50 --method balanced`")
def pivotal(
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="paper, fast, balanced or thorough; paper:50 for 50 rollouts a prefix. May be "
            "given again; default: paper:50, paper:100 and all others."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Worlds to search; with --model, the searches' seeds.")
    ] = "0,18,42,45",
    gap: Annotated[float, typer.Option(help="Least change of p(success).")] = 0.2,
    paths: Annotated[int, typer.Option(help="Answers searched per question.")] = 4,
    path_choice: Annotated[
        str, typer.Option(help="balanced (success, failure, ...) or natural (as sampled).")
    ] = "balanced",
    questions: Annotated[
        int | None, typer.Option(help="Questions per world (16), or of the problems (4).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model folder, in place of the worlds with exact p.")
    ] = None,
    problems: Annotated[Path | None, typer.Option(help="Its problems, with answers.")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Brute-force counts (JSONL); a killed run goes on from it.")
    ] = None,
    brute_force: Annotated[
        int, typer.Option(help="Rollouts before and after each token that can be pivotal.")
    ] = 2000,
    temperature: Annotated[float, typer.Option(help="The model's, in all rollouts.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the model's answers.")] = 256,
    prompt_format: Annotated[
        str, typer.Option(help="chat: text prompts become a user's message; text: as they are.")
    ] = "chat",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quick: QuickOption = False,
    json_output: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Pivotal-token search: precision, recall and cost, on worlds with exact p or a real model."""
    from phiforge.bench import pivotal as bench

    _check_out(out)
    options = bench.Options(
        methods=tuple(method or ()),
        seeds=bench.parse_seeds(seeds),
        gap=gap,
        paths=paths,
        path_choice=bench.one_of("--path-choice", path_choice, ("balanced", "natural")),
        questions=questions,
        quick=quick,
        model=model,
        problems=problems,
        truth=truth,
        brute_force=brute_force,
        temperature=temperature,
        max_tokens=max_tokens,
        prompt_format=bench.one_of("--prompt-format", prompt_format, ("chat", "text")),
        device=device,
    )
    _show(bench.run(options), bench.text, json_output=json_output, out=out)


@app.command(epilog="Example: `phiforge bench setup transformers`")
def setup(
    peer: Annotated[str, typer.Argument(help="transformers, litgpt, llama.cpp or sandlock.")],
) -> None:
    """Make a peer's environment in the user's cache; installs from PyPI."""
    from phiforge.bench.environments import setup as make

    print(make(peer))


def _measure(
    task: Any,
    sizes: list[str] | None,
    peers: list[str] | None,
    pythons: list[str] | None,
    repeat: int,
    threads: int,
    quick: bool,
    timeout: float,
    *,
    json_output: bool,
    out: Path | None,
) -> None:
    from phiforge.bench.results import wrong
    from phiforge.bench.run import Options, run
    from phiforge.bench.table import text

    options = Options(
        task=task,
        sizes=tuple(sizes or ()),
        peers=tuple(peers or ()),
        peer_pythons=_pythons(pythons or ()),
        repeat=repeat,
        threads=threads,
        quick=quick,
        timeout_seconds=timeout,
    )
    _check_out(out)
    result = run(options)
    _show(result, text, json_output=json_output, out=out)
    if any(wrong(summary) for summary in result["groups"]):
        raise typer.Exit(1)


def _check_out(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: no folder {out.parent}")


def _show(
    result: dict[str, Any], text: Callable[[Any], str], *, json_output: bool, out: Path | None
) -> None:
    written = json.dumps(result, indent=1, ensure_ascii=False)
    if out is not None:
        out.write_text(written + "\n", encoding="utf-8")
    print(written if json_output else text(result))


def _pythons(pairs: Any) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, python = pair.partition("=")
        if not separator or not python:
            raise typer.BadParameter(f"--peer-python {pair!r}: write it as NAME=PYTHON")
        found[name] = python
    return found
