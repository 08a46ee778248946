"""A model folder in another format: one GGUF file, or a safetensors folder of another dtype.

`convert("folder", "gguf", "model.gguf", type="q8_0")` is `phiforge convert`; returns what was
written as a dictionary. Writes the file or folder, which must not exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phiforge.core.usage import UsageError

FORMATS = ("gguf", "safetensors")
DTYPES = ("bf16", "fp32", "fp16", "bfloat16", "float32", "float16")


def convert(
    folder: str | Path,
    to: str,
    out: str | Path,
    *,
    type: str | None = None,
    dtype: str | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Converts a model folder or Hub name; `type` belongs to gguf, the other two to safetensors.

    Raises UsageError for an unknown format, an option of the other format, or an existing `out`;
    ValueError and FileNotFoundError for a folder that cannot be read or expressed.
    """
    if to not in FORMATS:
        raise UsageError(f"--to is {to!r}; choose one of: {', '.join(FORMATS)}")
    others = {"--dtype": dtype, "--layout": layout} if to == "gguf" else {"--type": type}
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"{name} is no option of --to {to}; leave it out")
    if Path(out).exists():
        raise UsageError(f"{out}: exists already; name another place, or remove it first")
    path = _folder(folder)
    if to == "gguf":
        return _to_gguf(path, out, type or "bf16")
    return _to_safetensors(path, Path(out), dtype or "bf16", layout or "phi3")


def _folder(folder: str | Path) -> Path:
    from phiforge.model.huggingface import resolve_folder

    try:
        return resolve_folder(folder)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error


def _to_gguf(folder: Path, out: str | Path, type: str) -> dict[str, Any]:
    from phiforge.model.gguf import convert as to_gguf

    made = to_gguf(folder, out, type)
    return {
        "path": str(made.path),
        "format": "gguf",
        "type": made.type,
        "num_tensors": made.num_tensors,
        "num_bytes": made.num_bytes,
        "pre_tokenizer": made.pre_tokenizer,
        "notes": list(made.notes),
    }


def _to_safetensors(folder: Path, out: Path, dtype: str, layout: str) -> dict[str, Any]:
    from phiforge.model.huggingface import load, save
    from phiforge.model.huggingface_config import ARCHITECTURES

    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; choose one of: {', '.join(DTYPES)}")
    if layout not in ARCHITECTURES:
        raise UsageError(f"--layout is {layout!r}; choose one of: {', '.join(ARCHITECTURES)}")
    model, tokenizer = load(folder, dtype=dtype)
    save(model, tokenizer, out, layout=layout, dtype=dtype)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "path": str(out),
        "format": "safetensors",
        "type": dtype,
        "layout": layout,
        "num_bytes": size,
        "notes": [],
    }
