"""`phiforge sandbox check | run | test`: the commands; imports nothing heavy until one is called.

`app` is added to the command line by cli.py. Verdicts go to the file of --out, one line each.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Run code that a model wrote, contained: what holds here, one program, many tests.",
    epilog="Example: `phiforge sandbox check --attack`",
)

BackendOption = Annotated[
    str, typer.Option(help="native (our own layers), bubblewrap, sandlock, or auto.")
]
WithoutOption = Annotated[
    list[str] | None,
    typer.Option("--without", help="Leave out namespaces, landlock or seccomp, to see the rest."),
]
UnsafeOption = Annotated[
    bool, typer.Option("--unsafe", help="Run even where files or network are not isolated.")
]
WarmOption = Annotated[
    bool, typer.Option("--warm/--cold", help="Fork a prepared interpreter, or start a fresh one.")
]
PreloadOption = Annotated[
    list[str] | None, typer.Option(help="Module imported once for all warm runs, e.g. numpy.")
]
ReadableOption = Annotated[
    list[Path] | None, typer.Option(help="File or folder that programs may read as well.")
]
CpuOption = Annotated[int, typer.Option(min=1, help="Most CPU seconds of a process.")]
WallOption = Annotated[float, typer.Option(min=0.01, help="Most seconds of a run.")]
MemoryOption = Annotated[int, typer.Option(min=64, help="Most memory, in MiB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _open(**options: Any) -> Any:
    from phiforge.core.usage import UsageError
    from phiforge.verify.sandbox import Sandbox

    try:
        return Sandbox(**{name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _limits(cpu_seconds: int, wall_seconds: float, memory_mib: int) -> Any:
    from phiforge.verify.sandbox import Limits

    return Limits(
        cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mib * 2**20
    )


@app.command(epilog="Example: `phiforge sandbox check --attack`")
def check(
    attack: Annotated[
        bool, typer.Option(help="Run hostile programs and look for what got through.")
    ] = False,
    backend: BackendOption = "auto",
    warm: WarmOption = True,
    without: WithoutOption = None,
    unsafe: UnsafeOption = False,
    json_output: JsonOption = False,
) -> None:
    """Which layers hold on this machine; with --attack, whether they really do."""
    with _open(backend=backend, warm=warm, without=without, unsafe=unsafe) as sandbox:
        layers = sandbox.layers
        findings = _attack(sandbox, quiet=json_output) if attack else []
    if json_output:
        result = {**asdict(layers), "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        typer.echo(f"backend: {layers.backend}")
        typer.echo("\n".join(layers.lines()))
    escaped = [finding for finding in findings if not finding.contained]
    if findings and not json_output:
        for finding in escaped:
            typer.echo(f"NOT CONTAINED {finding.name}: {finding.evidence}")
        typer.echo(f"{len(findings) - len(escaped)} of {len(findings)} hostile programs contained")
    if escaped:
        raise typer.Exit(1)


def _attack(sandbox: Any, quiet: bool) -> list[Any]:
    from phiforge.verify.sandbox.hostile import attack

    return attack(sandbox, progress=None if quiet else _say)


def _say(finding: Any) -> None:
    held = "held     " if finding.contained else "NOT HELD "
    typer.echo(f"{held} {finding.name:28} {finding.evidence}", err=True)


@app.command(epilog="Example: `phiforge sandbox run program.py --cpu-seconds 10`")
def run(
    program: Annotated[Path, typer.Argument(help="Python file, or - for standard input.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the program.")] = None,
    stdin: Annotated[Path | None, typer.Option(help="File that the program reads.")] = None,
    cpu_seconds: CpuOption = 5,
    wall_seconds: WallOption = 20.0,
    memory_mib: MemoryOption = 512,
    readable: ReadableOption = None,
    preload: PreloadOption = None,
    backend: BackendOption = "auto",
    warm: WarmOption = True,
    without: WithoutOption = None,
    unsafe: UnsafeOption = False,
    json_output: JsonOption = False,
) -> None:
    """Run one program; its output is printed, and 1 returned unless it ended with exit code 0."""
    task = {
        "kind": "program",
        "source": _text(program),
        "argv": arguments or [],
        "stdin": _text(stdin) if stdin else "",
    }
    limits = _limits(cpu_seconds, wall_seconds, memory_mib)
    options = {"backend": backend, "warm": warm, "without": without, "unsafe": unsafe}
    with _open(**options, readable=readable, preload=preload) as sandbox:
        outcome = sandbox.run(task, limits)
    if json_output:
        texts = {name: getattr(outcome, name).decode(errors="replace") for name in _STREAMS}
        typer.echo(json.dumps({**asdict(outcome), **texts}, indent=1, ensure_ascii=False))
    else:
        _pass_on(outcome.stdout, sys.stdout)
        _pass_on(outcome.stderr, sys.stderr)
    if outcome.ended != "exited" or outcome.returncode:
        if not json_output:
            typer.echo(f"phiforge: {_ending(outcome)}", err=True)
        raise typer.Exit(1)


def _pass_on(raw: bytes, stream: TextIO) -> None:
    """What a program wrote, as it is; on a terminal without the sequences that would steer it."""
    if stream.isatty():
        text = raw.decode(errors="replace")
        shown = (c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
        raw = "".join(shown).encode(errors="replace")
    stream.flush()
    stream.buffer.write(raw)
    stream.flush()


_STREAMS = ("stdout", "stderr")


def _ending(outcome: Any) -> str:
    said = {
        "exited": f"the program ended with exit code {outcome.returncode}",
        "signal": f"the program was ended by signal {outcome.signal}",
        "timeout": f"stopped: out of time after {outcome.seconds:.1f} s",
        "memory": "stopped: too much memory (--memory-mib)",
        "output": "stopped: too much output",
        "disk": "stopped: too many or too large files",
    }
    return said[outcome.ended]


def _text(path: Path) -> str:
    from phiforge.core.usage import UsageError

    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None


@app.command("test", epilog="Example: `phiforge sandbox test HumanEval.jsonl --reference gold`")
def judge_file(
    problems: Annotated[
        Path, typer.Argument(help="HumanEval or MBPP rows, or rows with a list `tests`.")
    ],
    samples: Annotated[
        Path | None, typer.Argument(help="Rows of task_id and completion, solution or response.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="gold: the problems' own solutions; stub: empty functions.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL of verdicts; a stopped run goes on from it.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    cpu_seconds: CpuOption = 5,
    wall_seconds: WallOption = 20.0,
    memory_mib: MemoryOption = 512,
    preload: PreloadOption = None,
    backend: BackendOption = "auto",
    warm: WarmOption = True,
    unsafe: UnsafeOption = False,
    json_output: JsonOption = False,
) -> None:
    """Judge solutions by their problems' tests: pass, fail, timeout, memory, crash, refused."""
    from phiforge.core.usage import UsageError
    from phiforge.verify import samples as judged

    if (samples is None) == (reference is None) or reference not in (None, "gold", "stub"):
        raise UsageError("give a file of samples, or --reference gold or --reference stub")
    known = judged.read_problems(problems)
    if samples is not None:
        wanted = judged.read_samples(samples, known)
    else:
        wanted = list(judged.reference_samples(known.values(), reference))  # type: ignore[arg-type]
    limits = _limits(cpu_seconds, wall_seconds, memory_mib)
    with _open(backend=backend, warm=warm, unsafe=unsafe, preload=preload) as sandbox:
        rows = judged.judge(known, wanted, out, sandbox, limits, workers)
    result = judged.summary(rows)
    if json_output:
        typer.echo(json.dumps({**result, "rows": rows if out is None else []}, indent=1))
        return
    for verdict, count in result["verdicts"].items():
        typer.echo(f"{verdict:8} {count}")
    low, high = (100 * bound for bound in result["interval"])
    typer.echo(
        f"{100 * result['pass_rate']:.1f} % of {result['samples']} samples of "
        f"{result['problems']} problems pass [{low:.1f}, {high:.1f}]"
    )
