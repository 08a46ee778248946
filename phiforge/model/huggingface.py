"""Hugging Face folders in and out: configuration, weights, tokenizer, model card.

`model, tokenizer = load("folder-or-owner/name", dtype="bfloat16")`; `save(model, tokenizer,
folder)` writes config.json, generation_config.json, safetensors, the tokenizer's files and
README.md, all at once: a crash leaves the old folder or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from phiforge.model.config import PhiConfig
from phiforge.model.huggingface_config import config_json, generation_json, read_config
from phiforge.model.huggingface_weights import read_weights, write_weights
from phiforge.model.phi import Phi

if TYPE_CHECKING:
    from phiforge.model.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files a model folder may hold: `save` replaces a folder of these alone, never anything else.
_MODEL_FILES = re.compile(
    r"README\.md|LICENSE|\.gitattributes|(config|generation_config|tokenizer|tokenizer_config|"
    r"special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.(jinja|json)|"
    r"(model|pytorch_model).*\.safetensors(\.index\.json)?|.*\.tiktoken"
)


def load(
    folder: str | Path, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[Phi, Tokenizer]:
    """A model and its tokenizer from a local folder, or from a Hugging Face Hub name.

    Raises FileNotFoundError or ValueError naming the file and the remedy; ValueError when the
    tokenizer has more ids than the model has rows.
    """
    from phiforge.model.tokenizer import Tokenizer

    path = resolve_folder(folder)
    tokenizer = Tokenizer.load(path)
    config = read_config(path)
    _check_vocabulary(config, tokenizer)
    return _load_weights(path, config, dtype, device), tokenizer


def load_model(
    folder: str | Path, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> Phi:
    """The model alone; errors as in `load`. Memory: the model in `dtype`, and one tensor."""
    path = resolve_folder(folder)
    return _load_weights(path, read_config(path), dtype, device)


def load_config(folder: str | Path) -> PhiConfig:
    """The configuration alone: of a folder, or of a Hub name."""
    return read_config(resolve_folder(folder))


def save(
    model: Phi,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    layout: str = "phi3",
    dtype: str | torch.dtype = "bfloat16",
    *,
    card: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads without custom code, the same bytes every time.

    `layout` "phi3" fuses q, k, v and gate, up; "llama" keeps them apart. Token ids the
    configuration leaves open are taken from the tokenizer. `card` is Markdown added to the model
    card. An existing model folder is replaced; ValueError if it holds other files.
    """
    target = Path(folder)
    torch_dtype = _dtype(dtype)
    config = _with_token_ids(model.config, tokenizer)
    dtype_name = str(torch_dtype).removeprefix("torch.")
    values = config_json(config, layout, dtype_name)
    _check_replaceable(target)
    partial = target.with_name(f".{target.name}.saving")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(model, partial, layout, torch_dtype, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(partial)
    _write_json(partial / "config.json", values)
    _write_json(partial / "generation_config.json", generation_json(config))
    text = _model_card(target.name, config, layout, dtype_name, card)
    (partial / "README.md").write_text(text, encoding="utf-8")
    _publish(partial, target)


def parameter_shapes(config: PhiConfig) -> dict[str, torch.Size]:
    """The decoder's parameters by name, without making them."""
    with torch.device("meta"):
        model = Phi(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _load_weights(
    path: Path, config: PhiConfig, dtype: str | torch.dtype, device: str | torch.device
) -> Phi:
    with torch.device("meta"):
        model = Phi(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, values in read_weights(path, shapes, config, _dtype(dtype), torch.device(device)):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(values))
    return model


def resolve_folder(folder: str | Path) -> Path:
    """The local folder, downloading a Hub name with `huggingface_hub` where that is meant.

    Raises FileNotFoundError or ValueError naming the folder and the remedy.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    interrupted = path.with_name(f".{path.name}.old")
    if interrupted.is_dir():
        raise FileNotFoundError(f"{path}: saving was interrupted; rename {interrupted} back to it")
    if isinstance(folder, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        raise FileNotFoundError(f"{path}: no such model folder; check the path")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{folder}: no such folder; to read it as a Hub name, pip install 'phiforge[hub]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.tiktoken"]
    try:
        return Path(snapshot_download(folder, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"{folder}: no such folder here, and the Hub did not give it ({error}); check the "
            "name, the network and, for a private model, `hf auth login`"
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _with_token_ids(config: PhiConfig, tokenizer: Tokenizer | None) -> PhiConfig:
    """The configuration to write: open ids from the tokenizer, so that generation stops."""
    if tokenizer is None:
        return config
    _check_vocabulary(config, tokenizer)
    bos, pad = config.bos_token_id, config.pad_token_id
    ends = (tokenizer.eos_id, *sorted(tokenizer.stop_ids - {tokenizer.eos_id}))
    return config.replace(
        bos_token_id=tokenizer.eod_id if bos is None else bos,
        pad_token_id=tokenizer.pad_id if pad is None else pad,
        eos_token_ids=config.eos_token_ids or ends,
    )


def _check_vocabulary(config: PhiConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model has "
            f"{config.vocab_size} embedding rows; they do not belong together"
        )


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; name a folder to save the model in")
    others = sorted(
        entry.name
        for entry in (target.iterdir() if target.is_dir() else ())
        if entry.is_dir() or not _MODEL_FILES.fullmatch(entry.name)
    )
    if others:
        raise ValueError(
            f"{target}: holds {others[0]!r}, which is no part of a model folder and would be lost; "
            "save into a new folder"
        )


def _publish(partial: Path, target: Path) -> None:
    """Puts the finished folder in the place of the old one; files are on disk before the rename."""
    for path in [*sorted(partial.iterdir()), partial]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = target.with_name(f".{target.name}.old")
    if target.is_dir() and any(target.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _model_card(name: str, config: PhiConfig, layout: str, dtype: str, extra: str) -> str:
    attention = "full" if config.sliding_window is None else f"window {config.sliding_window:,}"
    scaling = "none" if config.rope_scaling is None else f"LongRoPE from {config.original_length:,}"
    rows = {
        "parameters": f"{config.num_parameters:,}",
        "layers / hidden / feed-forward": (
            f"{config.num_layers} / {config.hidden_size:,} / {config.intermediate_size:,}"
        ),
        "query heads / key-value heads / head size": (
            f"{config.num_heads} / {config.num_kv_heads} / {config.head_size}"
        ),
        "vocabulary rows": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens, attention {attention}",
        "RoPE": (
            f"base {config.rope_theta:,.0f}, scaling {scaling}, "
            f"rotary share {config.partial_rotary_factor}"
        ),
        "embeddings": "tied" if config.tie_word_embeddings else "untied",
        "file layout / dtype": f"{layout} / {dtype}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    usage = (
        "```python\n"
        "import phiforge\n\n"
        'model, tokenizer = phiforge.load("this-folder", dtype="bfloat16")\n'
        "```\n\n"
        "or `transformers.AutoModelForCausalLM.from_pretrained(...)`, without custom code."
    )
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- phiforge\n---",
        f"# {name}",
        "A decoder-only language model of the Phi family, written by phiforge.",
        f"| | |\n|---|---|\n{table}",
        f"## Use\n\n{usage}",
        extra.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
