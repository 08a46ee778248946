"""Safetensors files <-> the decoder's parameters, tensor by tensor, in the phi3 or llama layout.

`read_weights(folder, shapes, config, dtype, device)` yields (parameter name, tensor);
`locate_parameters` says where each one lies, to be read by rows. `write_weights(model, folder,
layout, dtype)` writes `model.safetensors`, or shards and their index, the same bytes every time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phiforge.model.config import PhiConfig, did_you_mean
from phiforge.model.phi import Phi

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Tensor of a layer in the file -> the parameters it holds, stacked by rows (phi-4-spec: q, k, v;
# gate before up). No row is permuted: RoPE is half-split on both sides.
_SHARED = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "self_attn.o_proj": ("attention.output",),
    "mlp.down_proj": ("mlp.down",),
}
_LAYER_LAYOUTS = {
    "phi3": _SHARED
    | {
        "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
        "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    },
    "llama": _SHARED
    | {
        "self_attn.q_proj": ("attention.query",),
        "self_attn.k_proj": ("attention.key",),
        "self_attn.v_proj": ("attention.value",),
        "mlp.gate_proj": ("mlp.gate",),
        "mlp.up_proj": ("mlp.up",),
    },
}


def tensor_names(config: PhiConfig, layout: str) -> dict[str, tuple[str, ...]]:
    """Every tensor of a file in that layout -> the parameters stacked in it, in file order."""
    names: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("embedding.weight",)}
    for layer in range(config.num_layers):
        for theirs, ours in _LAYER_LAYOUTS[layout].items():
            parameters = tuple(f"layers.{layer}.{name}.weight" for name in ours)
            names[f"model.layers.{layer}.{theirs}.weight"] = parameters
    names["model.norm.weight"] = ("norm.weight",)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("lm_head.weight",)
    return names


@dataclass(frozen=True)
class StoredRows:
    """Where a parameter lies: rows `first` .. `first + num_rows - 1` of a tensor of a file.

    `num_inputs` is the length of a row, 1 for a vector.
    """

    path: Path
    name: str
    first: int
    num_rows: int
    num_inputs: int

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The parameter's rows `first` .. `last - 1`, as stored; the file is closed again."""
        last = self.num_rows if last is None else last
        with _open(self.path) as file:
            try:
                return file.get_slice(self.name)[self.first + first : self.first + last]
            except (SafetensorError, RuntimeError) as error:
                raise _damaged(self.path, error) from error


def joined(parts: Sequence[StoredRows]) -> list[StoredRows]:
    """The parts, neighbours in one stored tensor made one, so that they are read at once."""
    found: list[StoredRows] = []
    for part in parts:
        above = found[-1] if found else None
        end = above and (above.path, above.name, above.first + above.num_rows)
        if above and end == (part.path, part.name, part.first):
            found[-1] = replace(above, num_rows=above.num_rows + part.num_rows)
            continue
        found.append(part)
    return found


def read_stacked(parts: Sequence[StoredRows], first: int, last: int) -> Tensor:
    """Rows `first` .. `last - 1` of the parts put one below the other."""
    found = []
    above = 0
    for part in parts:
        start, end = max(first - above, 0), min(last - above, part.num_rows)
        if start < end:
            found.append(part.read(start, end))
        above += part.num_rows
    return found[0] if len(found) == 1 else torch.cat(found)


def locate_parameters(
    folder: Path, shapes: dict[str, torch.Size], config: PhiConfig
) -> dict[str, StoredRows]:
    """Every parameter's place, in file order; only the files' headers are read.

    `shapes` are the decoder's parameters. Either layout, or a mixture, is read. Raises
    FileNotFoundError for a missing file, ValueError for a damaged one, an unknown or missing
    tensor, or a shape that `config` does not give.
    """
    known = tensor_names(config, "phi3") | tensor_names(config, "llama")
    found: dict[str, StoredRows] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if _is_redundant(name, config):
                    continue
                parameters = _parameters_of(name, known, path)
                _check_shape(file, name, parameters, shapes, path)
                first = 0
                for parameter in parameters:
                    num_rows, *inputs = shapes[parameter]
                    found[parameter] = StoredRows(path, name, first, num_rows, *inputs or [1])
                    first += num_rows
    missing = [name for name in shapes if name not in found]
    if missing:
        theirs = next(file_name for file_name, ours in known.items() if missing[0] in ours)
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shapes)} parameters are in no file, the first is "
            f"{theirs!r}; copy the missing .safetensors files, or correct config.json"
        )
    return found


def read_weights(
    folder: Path,
    shapes: dict[str, torch.Size],
    config: PhiConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter once, holding one at a time; errors as in `locate_parameters`."""
    for parameter, rows in locate_parameters(folder, shapes, config).items():
        yield parameter, rows.read().to(device=device, dtype=dtype)


def write_weights(
    model: Phi, folder: Path, layout: str, dtype: torch.dtype, max_shard_bytes: int
) -> list[str]:
    """Writes the weights under the layout's names; returns the file names.

    One `model.safetensors` up to `max_shard_bytes`, else shards with an index, each made in turn so
    that memory holds one shard beside the model.
    """
    parameters = dict(model.named_parameters())
    names = tensor_names(model.config, layout)
    item_bytes = torch.empty((), dtype=dtype).element_size()
    sizes = {
        name: item_bytes * sum(parameters[part].numel() for part in parts)
        for name, parts in names.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        weight_map = {n: file for file, shard in zip(files, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    for file, shard in zip(files, shards, strict=True):
        tensors = {
            name: _stack([parameters[part] for part in names[name]], dtype) for name in shard
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return files if len(files) == 1 else [*files, INDEX]


def _stack(parts: list[torch.nn.Parameter], dtype: torch.dtype) -> Tensor:
    """The parts, one below the other, on the CPU, in memory of their own."""
    tensors = [part.detach().to(device="cpu", dtype=dtype) for part in parts]
    return torch.cat(tensors).contiguous()


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth"))
        remedy = (
            f"{pickles[0].name} is a pickle, which may run code and is not read: convert it to "
            "safetensors with transformers' save_pretrained"
            if pickles
            else "copy the .safetensors files beside config.json"
        )
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}; {remedy}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no usable weight_map ({error}); restore the file") from error
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: missing shard, listed in {INDEX}; copy or download it again "
                f"({len(names)} shards in all)"
            )
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    size = path.stat().st_size
    return ValueError(
        f"{path}: not a whole safetensors file ({size:,} bytes; {error}); it is truncated or "
        "damaged: copy or download it again"
    )


def _is_redundant(name: str, config: PhiConfig) -> bool:
    """RoPE tables that old files carry, and the head of a tied model, a copy of the embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return config.tie_word_embeddings and name == "lm_head.weight"


def _parameters_of(name: str, known: dict[str, tuple[str, ...]], path: Path) -> tuple[str, ...]:
    if name in known:
        return known[name]
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and re.sub(r"\.\d+\.", ".0.", name, count=1) in known:
        raise ValueError(
            f"{path}: tensor {name!r} belongs to layer {layer[1]}, beyond config.json's "
            "num_hidden_layers; the two files are not of one model"
        )
    raise ValueError(
        f"{path}: unknown tensor {name!r}{did_you_mean(name, known)}; expected the names of "
        "Phi3ForCausalLM or LlamaForCausalLM without biases or adapters"
    )


def _check_shape(
    file: Any,
    name: str,
    parameters: tuple[str, ...],
    shapes: dict[str, torch.Size],
    path: Path,
) -> None:
    found = tuple(file.get_slice(name).get_shape())
    rows = sum(shapes[parameter][0] for parameter in parameters)
    expected = (rows, *shapes[parameters[0]][1:])
    if found != expected:
        raise ValueError(
            f"{path}: tensor {name!r} has shape {list(found)}, config.json gives "
            f"{list(expected)}; the two files are not of one model"
        )
