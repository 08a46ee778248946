"""Hugging Face folder -> one GGUF file for llama.cpp (architecture `phi3`), tokenizer included.

`convert("folder", "model.gguf", "q8_0")` writes the file, tensor by tensor, and returns what it
wrote. Needs the `gguf` package: pip install 'phiforge[gguf]'.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from phiforge.core.usage import UsageError
from phiforge.model.config import PhiConfig
from phiforge.model.gguf_tokenizer import GgufTokenizer, describe
from phiforge.model.huggingface import parameter_shapes, resolve_folder
from phiforge.model.huggingface_config import read_config
from phiforge.model.huggingface_weights import (
    StoredRows,
    joined,
    locate_parameters,
    read_stacked,
)
from phiforge.model.tokenizer import Tokenizer

Type = Literal["f32", "bf16", "q8_0"]
TYPES: tuple[Type, ...] = get_args(Type)
Q8_GROUP = 32  # values of a row that share one scale of q8_0
_CHUNK = 1 << 24  # weights converted at once

# Tensor of a layer in the file -> the parameters in it, stacked by rows.
_LAYER = {
    "attn_norm": ("attention_norm",),
    "attn_qkv": ("attention.query", "attention.key", "attention.value"),
    "attn_output": ("attention.output",),
    "ffn_norm": ("mlp_norm",),
    "ffn_up": ("mlp.gate", "mlp.up"),
    "ffn_down": ("mlp.down",),
}


@dataclass(frozen=True)
class Converted:
    """What was written. `notes` say where llama.cpp computes something else than this decoder."""

    path: Path
    type: Type
    num_tensors: int
    num_bytes: int
    pre_tokenizer: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A tensor of the file to be: parameters one below the other, or a few numbers."""

    name: str
    shape: tuple[int, ...]
    parts: Sequence[StoredRows] = ()
    values: tuple[float, ...] = ()

    def read(self, first: int, last: int) -> Tensor:
        if self.values:
            return torch.tensor(self.values, dtype=torch.float32)[first:last]
        return read_stacked(self.parts, first, last)


def convert(folder: str | Path, out: str | Path, type: str = "bf16") -> Converted:
    """Writes `out` (which must not exist) from a model folder or Hub name.

    Matrices are stored as `type`, norms in fp32. Memory holds one tensor in `type`. Raises
    UsageError for an unknown type, an existing file, or a matrix whose rows q8_0 cannot group;
    ValueError for a folder that is damaged or that llama.cpp's phi3 cannot express.
    """
    gguf = _package()
    target = Path(out)
    kind = _checked_type(type)
    if target.exists():
        raise UsageError(f"{target}: exists already; name another file, or remove it first")
    path = resolve_folder(folder)
    config = read_config(path)
    _check_expressible(config, path)
    tokenizer = Tokenizer.load(path)
    described = describe(tokenizer, config.vocab_size)
    sources = list(_sources(config, path))
    if kind == "q8_0":
        _check_groups(sources)
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(partial, "phi3")
        _add_fields(writer, gguf, config, target.stem, kind)
        _add_tokenizer(writer, described)
        _write_tensors(writer, gguf, sources, kind)
        writer.close()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    size = target.stat().st_size
    return Converted(target, kind, len(sources), size, described.pre, _notes(config))


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need a package: pip install 'phiforge[gguf]'") from error
    return gguf


def _checked_type(type: str) -> Type:
    if type not in TYPES:
        raise UsageError(f"type is {type!r}; choose one of: {', '.join(TYPES)}")
    return type  # pyright: ignore[reportReturnType]


def _check_expressible(config: PhiConfig, path: Path) -> None:
    if config.num_heads * config.head_size != config.hidden_size:
        raise ValueError(
            f"{path}: {config.num_heads} heads of {config.head_size} dimensions are not the hidden "
            f"size {config.hidden_size}; llama.cpp's phi3 needs them equal"
        )


def _check_groups(sources: Sequence[_Source]) -> None:
    for source in sources:
        if len(source.shape) == 2 and source.shape[1] % Q8_GROUP:
            raise UsageError(
                f"tensor {source.name!r} has rows of {source.shape[1]}; q8_0 groups "
                f"{Q8_GROUP} values, so rows must be a multiple of that: use bf16 or f32"
            )


def _notes(config: PhiConfig) -> tuple[str, ...]:
    notes = []
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp ignores phi3's sliding window: answers differ beyond {window:,} tokens"
        )
    if config.rope_scaling is not None:
        notes.append(
            "llama.cpp takes LongRoPE's long factors when its context (-c) exceeds "
            f"{config.original_length:,} tokens, else the short ones"
        )
    return tuple(notes)


def _sources(config: PhiConfig, path: Path) -> Iterator[_Source]:
    """Every tensor of the file in order; the folder's files are checked, not read."""
    rows = locate_parameters(path, parameter_shapes(config), config)

    def stored(name: str, *parameters: str) -> _Source:
        parts = joined([rows[f"{parameter}.weight"] for parameter in parameters])
        num_rows = sum(part.num_rows for part in parts)
        is_vector = name.endswith("norm")
        shape = (num_rows,) if is_vector else (num_rows, parts[0].num_inputs)
        return _Source(f"{name}.weight", shape, parts)

    yield stored("token_embd", "embedding")
    for layer in range(config.num_layers):
        for theirs, ours in _LAYER.items():
            yield stored(f"blk.{layer}.{theirs}", *(f"layers.{layer}.{name}" for name in ours))
    yield stored("output_norm", "norm")
    if not config.tie_word_embeddings:
        yield stored("output", "lm_head")
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        for kind, factors in (("long", scaling.long_factor), ("short", scaling.short_factor)):
            yield _Source(f"rope_factors_{kind}.weight", (len(factors),), values=factors)


def _add_fields(writer: Any, gguf: Any, config: PhiConfig, name: str, type: Type) -> None:
    file_types = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_types[type]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_orig_ctx_len(config.original_length)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor)
    # 0 says that there is none: older readers assume a window where the field is missing.
    writer.add_sliding_window(config.sliding_window or 0)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    writer.add_token_merges(tokenizer.merges)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(writer: Any, gguf: Any, sources: Sequence[_Source], type: Type) -> None:
    import numpy as np

    types = gguf.GGMLQuantizationType
    kind_of = {"f32": types.F32, "bf16": types.BF16, "q8_0": types.Q8_0}
    kinds = [kind_of[type] if len(source.shape) == 2 else types.F32 for source in sources]
    for source, kind in zip(sources, kinds, strict=True):
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        *outer, inner = source.shape
        shape = (*outer, inner // block * block_bytes)
        num_bytes = int(np.prod(shape))
        writer.add_tensor_info(source.name, shape, np.dtype(np.uint8), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, kind in zip(sources, kinds, strict=True):
        chunks = []
        for first, last in _row_ranges(source.shape):
            values = source.read(first, last).float().numpy()
            chunks.append(gguf.quants.quantize(values, kind).view(np.uint8))
        writer.write_tensor_data(np.concatenate(chunks))


def _row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = shape[0] if len(shape) == 1 else max(1, _CHUNK // shape[1])
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])
