"""Loads the largest checkpoint the machine holds, in few bits: seconds, peak memory, tokens/s.

`python -m phiforge.bench.load_large FOLDER --preset phi-4 --weights int4` writes a random bf16
checkpoint of that shape into FOLDER (29 GB for phi-4) unless it is there, then loads and samples in
a process of its own. `--delete` removes FOLDER at the end; `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from phiforge.bench.peers.protocol import peak_bytes
from phiforge.model.config import PRESETS, PhiConfig

_BLOCK = 1 << 24  # random numbers drawn once and reused: weights need not differ to be timed
_SPARE_BYTES = 2 << 30


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="phiforge.bench.load_large", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="phi-4")
    parser.add_argument("--weights", choices=("bf16", "int8", "int4"), default="int4")
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each timed answer")
    parser.add_argument("--rows", type=int, default=16, help="answers of the batched run")
    parser.add_argument("--delete", action="store_true", help="remove FOLDER afterwards")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--load-only-in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_only_in_this_process:
        print(json.dumps(load_and_sample(options)))
        return
    written = None
    if not (options.folder / "config.json").is_file():
        written = write_checkpoint(options.folder, PhiConfig.preset(options.preset))
    try:
        result = _in_child() | {"write_seconds": written}
        print(json.dumps(result, indent=1) if options.json else table(result))
    finally:
        if options.delete:
            shutil.rmtree(options.folder)


def write_checkpoint(folder: Path, config: PhiConfig) -> float:
    """A random bf16 folder of that shape, one file a layer; returns seconds.

    Raises OSError when the disk has no room for it.
    """
    import torch
    from safetensors.torch import save_file

    from phiforge.model import bpe
    from phiforge.model.huggingface import parameter_shapes
    from phiforge.model.huggingface_config import config_json, generation_json
    from phiforge.model.huggingface_weights import INDEX, tensor_names
    from phiforge.model.tokenizer import Tokenizer

    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, 2 * config.num_parameters)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shapes = parameter_shapes(config)
    names = tensor_names(config, "phi3")
    weight_map: dict[str, str] = {}
    for file, tensors in _shards(list(names)).items():
        made = {}
        for name in tensors:
            parts = [shapes[part] for part in names[name]]
            shape = (sum(part[0] for part in parts), *parts[0][1:])
            made[name] = _random(block, shape, len(weight_map) + len(made))
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
    index = {"metadata": {"total_size": 2 * config.num_parameters}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    backend = bpe.backend(bpe.learn(["a b"], 1000, whole_numbers_below=1))
    tokenizer = Tokenizer(
        backend,
        eos=bpe.END_OF_TURN,
        eod=bpe.END_OF_TEXT,
        pad="<|dummy_0|>",
        vocab_size=config.vocab_size,
    )
    tokenizer.save(folder)
    for name, values in (
        ("config.json", config_json(config, "phi3", "bfloat16")),
        ("generation_config.json", generation_json(config.replace(eos_token_ids=()))),
    ):
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return time.perf_counter() - started


def _shards(names: list[str]) -> dict[str, list[str]]:
    """Tensors by file: one for each layer, one for each other tensor."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else name, []).append(name)
    total = len(groups)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": group
        for number, group in enumerate(groups.values(), 1)
    }


def _random(block: Any, shape: tuple[int, ...], shift: int) -> Any:
    """A tensor of the block's numbers, begun elsewhere for every tensor; norms are 1."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    count = shape[0] * shape[1]
    rolled = block.roll(7919 * shift)
    return rolled.repeat(-(-count // len(block)))[:count].view(shape).clone()


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise OSError(
            f"{folder}: {free / 1e9:.0f} GB free, the checkpoint takes {num_bytes / 1e9:.0f} GB; "
            "name a folder on another disk, or a smaller --preset"
        )


def _in_child() -> dict[str, Any]:
    """The same command in a fresh process, so that its peak memory is that of loading alone."""
    command = [sys.executable, "-m", "phiforge.bench.load_large", *sys.argv[1:]]
    done = subprocess.run(
        [*command, "--load-only-in-this-process"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def load_and_sample(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the folder, answers one prompt and then `--rows` prompts; what it took."""
    import torch

    from phiforge.inference.engine import Engine

    stored = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    imported = peak_bytes()
    started = time.perf_counter()
    engine = Engine.from_folder(
        options.folder,
        rows=options.rows,
        weights=options.weights,
        kernels=options.kernels,
        max_cache_tokens=256 * options.rows,
    )
    load_seconds = time.perf_counter() - started
    loaded = peak_bytes()
    engine.generate([[65, 66, 67]], max_tokens=4, temperature=0.0)
    single = _tokens_per_second(engine, 1, options.tokens)
    batched = _tokens_per_second(engine, options.rows, options.tokens)
    return {
        "parameters": engine.config.num_parameters,
        "runner": engine.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "stored_bytes": stored,
        "load_seconds": load_seconds,
        "import_peak_bytes": imported,
        "load_peak_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "tokens_per_second": single,
        "rows": options.rows,
        "batched_tokens_per_second": batched,
    }


def _tokens_per_second(engine: Any, rows: int, num_tokens: int) -> float:
    """Answers to prompts of 16 tokens, prompts computed within the time."""
    prompts = [[(65 + row + at) % 200 for at in range(16)] for row in range(rows)]
    started = time.perf_counter()
    found = engine.generate(prompts, n=1, max_tokens=num_tokens, temperature=1.0, seed=0)
    seconds = time.perf_counter() - started
    return sum(len(answer.token_ids) for answers in found for answer in answers) / seconds


def table(result: dict[str, Any]) -> str:
    """The result in lines."""
    stored, load = result["stored_bytes"] / 1e9, result["load_seconds"]
    lines = [
        f"{result['parameters']:,} parameters, {result['runner']}, "
        f"{result['threads']} threads, torch {result['torch']}",
        f"stored   {stored:8.2f} GB bf16",
        f"loaded   {load:8.1f} s, {stored / load:.2f} GB/s of files",
        f"peak     {result['load_peak_bytes'] / 1e9:8.2f} GB while loading, "
        f"{result['peak_bytes'] / 1e9:.2f} GB in all "
        f"({result['import_peak_bytes'] / 1e9:.2f} GB before loading)",
        f"1 row    {result['tokens_per_second']:8.2f} tokens/s",
        f"{result['rows']} rows  {result['batched_tokens_per_second']:8.2f} tokens/s",
    ]
    if result["write_seconds"] is not None:
        lines.insert(1, f"written  {result['write_seconds']:8.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
