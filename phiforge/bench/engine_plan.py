"""What `bench engine` measures: decoding alone and in a batch, many short samples, a PTS level.

`groups(sizes, quick, setting)` yields a Group per model, its files written when it is reached.
Written into the setting's folder: model folders and GGUF files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phiforge.bench.models import path_prefixes, random_prompts, write_gguf, write_model
from phiforge.bench.plan import LIMIT, OURS, Comparison, Entrant, Group, Work
from phiforge.bench.roofline import decode_shapes
from phiforge.model.config import PhiConfig

FORMATS = ("bf16", "fp32", "int8", "int4")
MOST_LAYERS = 12  # of phi-4: more would take longer to write than to measure
_LLAMA_KINDS = {"f32": "fp32", "bf16": "bf16", "q8_0": "q8_0"}


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs: the folder for its files, threads, peers, what the machine has."""

    folder: Path
    threads: int
    peers: Mapping[str, Path]
    kernels: tuple[Literal["native", "torch"], ...]
    gpu_bytes: int = 0  # memory of the first GPU; 0 = torch sees none


def small_100m_config() -> PhiConfig:
    """About 100M weights per token: dim 768 x 12, 12/4 heads, 32k tokens, untied."""
    return PhiConfig.preset("small-100m", tie_word_embeddings=False)


def nano_config() -> PhiConfig:
    """The nano recipe's model, as long as its answers need."""
    return PhiConfig.preset("nano", vocab_size=1024, num_heads=2, num_kv_heads=1)


def pts_config() -> PhiConfig:
    """A model of 2.9M parameters, the size a laptop searches for pivotal tokens."""
    return PhiConfig(
        vocab_size=1408,
        hidden_size=192,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        max_position_embeddings=256,
        initializer_range=0.07,
    )


def tiny_config() -> PhiConfig:
    """What --quick measures: it shows that the benchmark works, and nothing else."""
    return PhiConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )


def groups(sizes: Sequence[str], quick: bool, setting: Setting) -> Iterator[Group]:
    """The groups of the sizes asked for, one after the other."""
    if quick:
        yield _tiny(setting)
        return
    makers: dict[str, Callable[[Setting], Group]] = {
        "small-100m": _small_100m,
        "nano": _nano,
        "pts": _pts,
        "phi-4-layers": _phi_4_layers,
    }
    for size in sizes:
        yield makers[size](setting)


def _small_100m(setting: Setting) -> Group:
    config = small_100m_config()
    folder = _written(config, setting.folder / "small-100m")
    entrants = [
        _ours(setting, folder, kernels, format, rows=16)
        for kernels in setting.kernels
        for format in FORMATS
    ]
    if "transformers" in setting.peers:
        entrants += [
            _transformers(setting, folder, "fp32"),
            _transformers(setting, folder, "bf16"),
            _transformers(setting, folder, "bf16", compile=True),
        ]
    if "llama.cpp" in setting.peers:
        entrants += _llama(setting, folder, _LLAMA_KINDS, rows=16, tokens_per_row=128)
    works = (
        _decode_work(config, "decode-1", rows=1, max_tokens=96),
        _decode_work(config, "decode-16", rows=16, max_tokens=64),
    )
    comparisons = [
        Comparison("decode-1", f"{OURS} torch bf16", "transformers bf16", 1.3),
        *_both(setting, "decode-1", "bf16", "transformers bf16"),
        Comparison("decode-1", f"{OURS} native bf16", LIMIT, 0.5),
        *_both(setting, "decode-16", "bf16", "transformers bf16", 2.0),
        *_both(setting, "decode-1", "int8", "llama.cpp q8_0"),
        *_both(setting, "decode-16", "int8", "llama.cpp q8_0", 1.0),
        *_both(setting, "decode-16", "bf16", "transformers bf16 compiled"),
    ]
    return _group(setting, "small-100m", config, entrants, works, comparisons)


def _nano(setting: Setting) -> Group:
    config = nano_config()
    folder = _written(config, setting.folder / "nano")
    entrants = [
        _ours(setting, folder, kernels, format, rows=256)
        for kernels in setting.kernels
        for format in ("bf16", "fp32")
    ]
    if "transformers" in setting.peers:
        entrants += [_transformers(setting, folder, dtype) for dtype in ("bf16", "fp32")]
    work = Work(
        "short-256",
        "256 short samples at once: prompts of 32 tokens, 64 new, temperature 1",
        lambda round: {
            "prompts": random_prompts(config.vocab_size, 256, 32, round + 1),
            **_sampling(1, 64, 1.0, round),
        },
        rows=256,
        context=64,
    )
    # On so small a model fp32 may be the faster one of a peer: ours in bf16 meets both.
    comparisons = [
        comparison
        for ours, theirs in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))
        for comparison in _both(setting, work.name, ours, f"transformers {theirs}", 4.0)
    ]
    return _group(setting, "nano", config, entrants, (work,), comparisons)


def _pts(setting: Setting) -> Group:
    config = pts_config()
    folder = _written(config, setting.folder / "pts")
    entrants = [
        _ours(setting, folder, kernels, format, rows=256)
        for kernels in setting.kernels
        for format in ("bf16", "fp32")
    ]
    if "transformers" in setting.peers:
        entrants += [
            _transformers(setting, folder, dtype, rows_per_call=rows)
            for dtype in ("bf16", "fp32")
            for rows in (5, 20)
        ]
    work = _pts_work(config, num_prefixes=24, path_tokens=192, rollouts=20, max_tokens=32)
    comparisons = [
        comparison
        for ours, theirs in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"))
        for rows, bar in ((5, 6.0), (20, 3.5))
        for comparison in _both(
            setting, work.name, ours, f"transformers {theirs}, calls of {rows} rows", bar
        )
    ]
    return _group(setting, "pts", config, entrants, (work,), comparisons)


def _phi_4_layers(setting: Setting) -> Group:
    """Phi-4's layers in bf16, as many as fit: the share of the limit hardly depends on how many."""
    config = PhiConfig.preset("phi-4", max_position_embeddings=4096)
    contestants = 1 + ("transformers" in setting.peers)
    layer = config.num_parameters - config.replace(num_layers=config.num_layers - 1).num_parameters
    tables = config.num_parameters - config.num_layers * layer
    room = 0.35 * setting.gpu_bytes / contestants / 2  # parameters of 2 bytes, loaded and fused
    config = config.replace(num_layers=max(1, min(MOST_LAYERS, int((room - tables) / layer))))
    folder = _written(config, setting.folder / "phi-4-layers", "bfloat16")
    entrants = [_ours(setting, folder, "torch", "bf16", rows=16, device="cuda")]
    if "transformers" in setting.peers:
        entrants.append(_transformers(setting, folder, "bf16", device="cuda"))
    works = (
        _decode_work(config, "decode-1", rows=1, max_tokens=128),
        _decode_work(config, "decode-16", rows=16, max_tokens=128),
    )
    comparisons = [
        Comparison("decode-1", f"{OURS} torch bf16", LIMIT, 0.6),
        Comparison("decode-1", f"{OURS} torch bf16", "transformers bf16"),
        Comparison("decode-16", f"{OURS} torch bf16", "transformers bf16"),
    ]
    return _group(setting, "phi-4-layers", config, entrants, works, comparisons, device="cuda")


def _tiny(setting: Setting) -> Group:
    config = tiny_config()
    folder = _written(config, setting.folder / "tiny")
    entrants = [_ours(setting, folder, kernels, "fp32", rows=8) for kernels in setting.kernels]
    if "transformers" in setting.peers:
        entrants.append(_transformers(setting, folder, "fp32"))
    if "llama.cpp" in setting.peers:
        entrants += _llama(setting, folder, {"f32": "fp32"}, rows=4, tokens_per_row=64)
    works = (
        _decode_work(config, "decode-1", rows=1, max_tokens=8),
        _decode_work(config, "decode-4", rows=4, max_tokens=8),
    )
    comparisons = _both(setting, "decode-4", "fp32", "transformers fp32")
    return _group(setting, "tiny", config, entrants, works, comparisons)


def _group(
    setting: Setting,
    name: str,
    config: PhiConfig,
    entrants: Sequence[Entrant],
    works: Sequence[Work],
    comparisons: Sequence[Comparison],
    device: Literal["cpu", "cuda"] = "cpu",
) -> Group:
    full = [e for e in entrants if e.settings.get("weights") == "fp32"]
    equal = ("transformers fp32", "llama.cpp f32", *(e.label for e in full))
    dtypes = sorted({entrant.dtype for entrant in entrants})
    return Group(
        name=name,
        title=f"{name}: {config.num_parameters:,} parameters, {setting.threads} threads",
        task="engine",
        device=device,
        config=config,
        entrants=tuple(entrants),
        works=tuple(works),
        limits={"dtypes": dtypes, "shapes": decode_shapes(config)},
        comparisons=tuple(comparisons),
        reference=full[0].label if full else None,
        must_equal=equal,
    )


def _decode_work(config: PhiConfig, name: str, rows: int, max_tokens: int) -> Work:
    prompt_tokens = 32 if config.max_position_embeddings > 64 else 16
    return Work(
        name,
        f"greedy decoding, batch {rows}: prompts of {prompt_tokens} tokens, {max_tokens} new",
        # Other prompts each round: nobody finds them in a cache.
        lambda round: {
            "prompts": random_prompts(config.vocab_size, rows, prompt_tokens, round + 1),
            **_sampling(1, max_tokens, 0.0, round),
        },
        rows=rows,
        context=prompt_tokens + max_tokens // 2,
        greedy=True,
    )


def _pts_work(
    config: PhiConfig, num_prefixes: int, path_tokens: int, rollouts: int, max_tokens: int
) -> Work:
    return Work(
        "pts-level",
        f"a PTS level: {num_prefixes} prefixes of a path of {path_tokens} tokens, {rollouts} "
        f"rollouts each of {max_tokens} tokens, temperature 1",
        lambda round: {
            "prompts": path_prefixes(config.vocab_size, num_prefixes, path_tokens, round + 1),
            **_sampling(rollouts, max_tokens, 1.0, round),
        },
        rows=256,
        context=(path_tokens + max_tokens) // 2,
    )


def _sampling(n: int, max_tokens: int, temperature: float, round: int) -> dict[str, Any]:
    return {"n": n, "max_tokens": max_tokens, "temperature": temperature, "seed": round + 1}


def _both(
    setting: Setting, work: str, format: str, peer: str, bar: float | None = None
) -> list[Comparison]:
    """Ours in a format, with each kind of kernels, against a peer."""
    return [Comparison(work, f"{OURS} {k} {format}", peer, bar) for k in setting.kernels]


def _ours(
    setting: Setting, folder: Path, kernels: str, format: str, rows: int, device: str = "cpu"
) -> Entrant:
    options = {"rows": rows, "mode": "exact", "weights": format, "kernels": kernels}
    return Entrant(
        f"{OURS} {kernels} {format}",
        OURS,
        {"model": str(folder), "threads": setting.threads, "device": device, **options},
        dtype="fp32" if format == "fp32" else "bf16",
        format=format,
    )


def _transformers(
    setting: Setting,
    folder: Path,
    dtype: Literal["fp32", "bf16"],
    compile: bool = False,
    rows_per_call: int = 0,
    device: str = "cpu",
) -> Entrant:
    label = f"transformers {dtype}" + (" compiled" if compile else "")
    label += f", calls of {rows_per_call} rows" if rows_per_call else ""
    settings = {"dtype": dtype, "compile": compile, "rows_per_call": rows_per_call}
    return Entrant(
        label,
        "transformers",
        {"model": str(folder), "threads": setting.threads, "device": device, **settings},
        dtype=dtype,
        format=dtype,
    )


def _llama(
    setting: Setting, folder: Path, kinds: Mapping[str, str], rows: int, tokens_per_row: int
) -> list[Entrant]:
    entrants = []
    for kind, format in kinds.items():
        file = folder.with_name(f"{folder.name}-{kind}.gguf")
        if not file.exists():
            write_gguf(folder, file, kind)
        settings = {"gguf": str(file), "threads": setting.threads, "dtype": kind}
        entrants.append(
            Entrant(
                f"llama.cpp {kind}",
                "llama.cpp",
                {**settings, "rows": rows, "tokens_per_row": tokens_per_row},
                dtype="fp32" if kind == "f32" else "bf16",
                format=format,
            )
        )
    return entrants


def _written(config: PhiConfig, folder: Path, dtype: str = "float32") -> Path:
    if not folder.exists():
        write_model(config, folder, dtype)
    return folder
