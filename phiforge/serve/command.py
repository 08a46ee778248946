"""`phiforge serve MODEL`: the command, and nothing that needs torch to be shown.

cli.py adds `serve` to the command line; `server.py` does the work. Nothing is written.
"""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    weights: Annotated[
        str | None, typer.Option(help="fp32, bf16, int8 or int4; as saved if not given.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most samples computed at a time.")] = 256,
    max_queue: Annotated[int, typer.Option(min=0, help="Most samples that wait for a row.")] = 1024,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the API keys.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with an API key on each line.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.")] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="What running answers are given when told to stop.")
    ] = 30.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Serve a model behind the OpenAI API; --json prints one line when it is ready."""
    from phiforge.serve.server import serve as serve_model

    serve_model(
        model,
        host=host,
        port=port,
        weights=weights,
        rows=rows,
        max_queue=max_queue,
        api_key_env=api_key_env,
        api_key_file=api_key_file,
        threads=threads,
        drain_seconds=drain_seconds,
        as_json=json_output,
    )
