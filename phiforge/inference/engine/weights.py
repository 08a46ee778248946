"""A model's weights as the engine multiplies them: fused matrices in one of four formats.

`from_model(model, format)` of a model in memory, `from_folder(folder, format)` of a Hugging Face
folder, tensor by tensor. Layers are made when asked for, so that a runner that packs each one and
lets go of it holds no second copy. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from phiforge.model.config import PhiConfig
from phiforge.model.huggingface import parameter_shapes, resolve_folder
from phiforge.model.huggingface_config import read_config
from phiforge.model.huggingface_weights import (
    StoredRows,
    joined,
    locate_parameters,
    read_stacked,
)
from phiforge.model.phi import Phi
from phiforge.model.quantize import Format, Matrix, check_format, quantize, quantize_rows


@dataclass(frozen=True)
class LayerWeights:
    """One layer: query, key and value rows in one matrix, gate and up rows in one; norms fp32."""

    attention_norm: Tensor
    query_key_value: Matrix
    output: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Layers(Sequence[LayerWeights]):
    """The layers in order, each made anew by every access: iterate once, keep what you need."""

    def __init__(self, num_layers: int, make: Callable[[int], LayerWeights]) -> None:
        self._num_layers = num_layers
        self._make = make

    def __len__(self) -> int:
        return self._num_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Layers: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Layers:
        if isinstance(index, slice):
            chosen = range(self._num_layers)[index]
            return Layers(len(chosen), lambda i: self._make(chosen[i]))
        return self._make(range(self._num_layers)[index])

    def __iter__(self) -> Iterator[LayerWeights]:
        return (self._make(index) for index in range(self._num_layers))


@dataclass(frozen=True)
class Weights:
    """Everything a runner needs: a copy of the model at one moment.

    `dtype` is what activations and the cache are kept in: fp32 or bf16 (bf16 for int8 and int4).
    A matrix carries its own format: the `lm_head` of int4 weights is int8, that of a tied fp32 or
    bf16 model shares `embedding`'s memory. `long_rope`: LongRoPE takes its long factors.
    """

    config: PhiConfig
    format: Format
    dtype: torch.dtype
    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    lm_head: Matrix
    long_rope: bool


def stamp(model: Phi) -> tuple[object, ...]:
    """Changes whenever a weight is written in place, replaced, moved or cast: then the weights
    taken from the model are out of date."""
    parts = []
    for parameter in model.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        parts.append((parameter.data_ptr(), version))
    return (model.compute_dtype, model.max_length, *parts)


def from_model(model: Phi, format: Format | None = None) -> Weights:
    """Copies of a model's weights on its device; None keeps its compute dtype.

    ValueError for an unknown format, or a compute dtype other than fp32 and bf16.
    """
    chosen = _format_of(model) if format is None else check_format(format)
    dtype = compute_dtype(chosen)
    parameters = dict(model.named_parameters())

    def convert(names: Sequence[str], to: Format) -> Matrix:
        parts = [parameters[name].detach() for name in names]
        return quantize(parts[0] if len(parts) == 1 else torch.cat(parts), to)

    def vector(name: str) -> Tensor:
        return parameters[name].detach().to(torch.float32, copy=True)

    with torch.no_grad():
        embedding = parameters["embedding.weight"].detach().to(dtype, copy=True)
        return _assemble(model.config, chosen, embedding, convert, vector, model.max_length)


def from_folder(
    folder: str | Path, format: Format | None = None, device: str | torch.device = "cpu"
) -> Weights:
    """Weights of a Hugging Face folder or Hub name, on `device`; None keeps the stored precision
    (fp32 stays fp32, 16 bits become bf16).

    Files are read a few rows at a time, layers when asked for: beside the result, memory holds some
    megabytes. Raises FileNotFoundError or ValueError, naming file and remedy, for files that are
    missing, damaged or of another model, before any layer is read.
    """
    path = resolve_folder(folder)
    config = read_config(path)
    rows = locate_parameters(path, parameter_shapes(config), config)
    chosen = _stored_format(rows) if format is None else check_format(format)

    def convert(names: Sequence[str], to: Format) -> Matrix:
        parts = joined([rows[name] for name in names])

        def read(first: int, last: int) -> Tensor:
            return read_stacked(parts, first, last).to(device)

        return quantize_rows(read, sum(part.num_rows for part in parts), parts[0].num_inputs, to)

    def vector(name: str) -> Tensor:
        return rows[name].read().to(device=device, dtype=torch.float32)

    embedding = convert(["embedding.weight"], "fp32" if chosen == "fp32" else "bf16").data
    length = config.max_position_embeddings
    return _assemble(config, chosen, embedding, convert, vector, length)


def _stored_format(rows: Mapping[str, StoredRows]) -> Format:
    dtype = rows["embedding.weight"].read(0, 1).dtype
    return "fp32" if dtype in (torch.float32, torch.float64) else "bf16"


def compute_dtype(format: Format) -> torch.dtype:
    """What activations are kept in: fp32 for fp32, bf16 for the rest."""
    return torch.float32 if format == "fp32" else torch.bfloat16


def _format_of(model: Phi) -> Format:
    known: dict[torch.dtype, Format] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if model.compute_dtype not in known:
        raise ValueError(
            f"the model computes in {model.compute_dtype}; the engine computes in float32 or "
            'bfloat16: load it with dtype="bfloat16", or name the weights\' format'
        )
    return known[model.compute_dtype]


def _assemble(
    config: PhiConfig,
    format: Format,
    embedding: Tensor,
    convert: Callable[[Sequence[str], Format], Matrix],
    vector: Callable[[str], Tensor],
    max_length: int,
) -> Weights:
    """The weights, from functions that fetch stacked matrices and norms by parameter names."""

    def matrix(*names: str) -> Matrix:
        return convert(names, format)

    def layer(index: int) -> LayerWeights:
        at = f"layers.{index}."
        attention = [f"{at}attention.{name}.weight" for name in ("query", "key", "value")]
        return LayerWeights(
            attention_norm=vector(f"{at}attention_norm.weight"),
            query_key_value=matrix(*attention),
            output=matrix(f"{at}attention.output.weight"),
            mlp_norm=vector(f"{at}mlp_norm.weight"),
            gate_up=matrix(f"{at}mlp.gate.weight", f"{at}mlp.up.weight"),
            down=matrix(f"{at}mlp.down.weight"),
        )

    tied = config.tie_word_embeddings
    if tied and format in ("fp32", "bf16"):
        lm_head = Matrix(format, config.vocab_size, config.hidden_size, embedding)
    else:
        # Logits suffer most from 4 bits: an int8 head undoes two fifths of int4's harm
        # (docs/convert.md).
        head_format: Format = "int8" if format == "int4" else format
        lm_head = convert(["embedding.weight" if tied else "lm_head.weight"], head_format)
    return Weights(
        config=config,
        format=format,
        dtype=compute_dtype(format),
        embedding=embedding,
        layers=Layers(config.num_layers, layer),
        norm=vector("norm.weight"),
        lm_head=lm_head,
        long_rope=max_length > config.original_length,
    )
