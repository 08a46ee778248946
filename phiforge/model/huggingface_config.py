"""`config.json` and `generation_config.json` of Hugging Face folders <-> `PhiConfig`.

`read_config(folder)` understands `phi3` and `llama`, old and new RoPE keys, and refuses what the
decoder would compute differently. `config_json` and `generation_json` return what `save` writes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phiforge.model.config import LongRope, PhiConfig, did_you_mean

ARCHITECTURES = {"phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}
# What `transformers` assumes where a file is silent.
_NORM_EPS = {"phi3": 1e-5, "llama": 1e-6}

# Phi-4's vocabulary and its ids: early copies of the release pad with the end token or `</think>`.
_PHI_4_VOCAB_SIZE = 100_352
_PHI_4_END, _PHI_4_PAD, _PHI_4_THINK_END = 100_265, 100_349, 100_351


def read_config(folder: Path) -> PhiConfig:
    """The configuration of a model folder.

    Stop ids of `generation_config.json` are added. Raises FileNotFoundError without `config.json`,
    ValueError naming file, field and remedy for anything this decoder does not compute.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; a model folder holds config.json beside its .safetensors files"
        )
    values = _read_json(path)
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    try:
        return _parse(values, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_json(config: PhiConfig, layout: str, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`.

    RoPE is written twice, `rope_theta`/`rope_scaling` for older readers and `rope_parameters` for
    `transformers` 5. Raises ValueError when the layout's architecture cannot express the model.
    """
    _check_layout(config, layout)
    end_ids = config.eos_token_ids
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[layout]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": dtype,
        "eos_token_id": end_ids[0] if end_ids else None,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": layout,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "original_max_position_embeddings": config.original_length,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope_json(config, layout),
        "rope_scaling": _scaling_json(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim is not None or layout == "llama":
        values["head_dim"] = config.head_size
    if layout == "phi3":
        values |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": config.sliding_window}
        values["partial_rotary_factor"] = config.partial_rotary_factor
    else:
        values["mlp_bias"] = False
    return dict(sorted(values.items()))


def generation_json(config: PhiConfig) -> dict[str, Any]:
    """The contents of `generation_config.json`: ids alone, so that decoding stays greedy."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    return values


def _parse(values: Mapping[str, Any], generation: Mapping[str, Any]) -> PhiConfig:
    model_type = _check_architecture(values)
    _check_unsupported(values)
    rope = _rope_parameters(values)
    scaling = _long_rope(rope)
    num_heads = _required(values, "num_attention_heads")
    token_ids = _token_ids(values, generation)
    return PhiConfig(
        vocab_size=_required(values, "vocab_size"),
        hidden_size=_required(values, "hidden_size"),
        intermediate_size=_required(values, "intermediate_size"),
        num_layers=_required(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_or(values.get("num_key_value_heads"), num_heads),
        head_dim=_head_dim(values, num_heads),
        max_position_embeddings=_required(values, "max_position_embeddings"),
        original_max_position_embeddings=_original_length(values, rope) if scaling else None,
        rope_theta=float(rope["rope_theta"]),
        partial_rotary_factor=float(_or(rope.get("partial_rotary_factor"), 1.0)),
        rope_scaling=scaling,
        sliding_window=values.get("sliding_window") if model_type == "phi3" else None,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        rms_norm_eps=float(_or(values.get("rms_norm_eps"), _NORM_EPS[model_type])),
        initializer_range=float(_or(values.get("initializer_range"), 0.02)),
        **token_ids,
    )


def _check_architecture(values: Mapping[str, Any]) -> str:
    model_type = values.get("model_type")
    supported = ", ".join(f"{name} ({value})" for name, value in ARCHITECTURES.items())
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type is {model_type!r}{did_you_mean(str(model_type), list(ARCHITECTURES))}; "
            f"supported architectures: {supported}"
        )
    named = values.get("architectures") or [ARCHITECTURES[model_type]]
    if ARCHITECTURES[model_type] not in named:
        raise ValueError(f"architectures is {named}; supported architectures: {supported}")
    return model_type


def _check_unsupported(values: Mapping[str, Any]) -> None:
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {values['hidden_act']!r}; this decoder computes 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{name} is true; this decoder has no biases")
    if values.get("quantization_config") or values.get("quantization"):
        raise ValueError("the weights are quantized; use the original, unquantized folder")
    for name in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        if values.get(name):
            warnings.warn(
                f"{name} is {values[name]}; this decoder has no dropout: inference is the same, "
                "training goes without",
                stacklevel=2,
            )


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Base, partial factor, type and factors from whichever keys the file has.

    Where `rope_parameters` (new) and `rope_theta`/`rope_scaling` (old) disagree the new one wins.
    """
    old = dict(values.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if values.get(name) is not None:
            old[name] = values[name]
    new = dict(values.get("rope_parameters") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in new and name in old and float(new[name]) != float(old[name]):
            warnings.warn(
                f"{name} is {old[name]} but rope_parameters.{name} is {new[name]}; the latter is "
                "used, as in transformers",
                stacklevel=2,
            )
    rope = old | new
    if rope.get("rope_theta") is None:
        raise ValueError(
            "neither rope_theta nor rope_parameters.rope_theta is set; other readers assume 10000 "
            'in silence, which ruins a model trained with another base: add "rope_theta": 10000.0 '
            "if that is what it was trained with"
        )
    return rope


def _long_rope(rope: Mapping[str, Any]) -> LongRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    has_factors = "short_factor" in rope and "long_factor" in rope
    # Early phi-3 files call LongRoPE "su" or "yarn".
    if kind not in ("longrope", "su", "yarn") or not has_factors:
        raise ValueError(
            f"RoPE scaling of type {kind!r} is not supported; supported: 'default', or 'longrope' "
            "with short_factor and long_factor"
        )
    return LongRope(
        short_factor=tuple(float(x) for x in rope["short_factor"]),
        long_factor=tuple(float(x) for x in rope["long_factor"]),
        factor=rope.get("factor"),
        attention_factor=rope.get("attention_factor"),
    )


def _original_length(values: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    length = values.get("original_max_position_embeddings")
    length = _or(length, rope.get("original_max_position_embeddings"))
    if length is None:
        raise ValueError(
            "original_max_position_embeddings is missing; LongRoPE chooses its factors by it "
            "(4096 for the phi models published with 128K context)"
        )
    return length


def _head_dim(values: Mapping[str, Any], num_heads: int) -> int | None:
    """None where the file only repeats hidden_size / heads, so that files and presets are equal."""
    head_dim = values.get("head_dim")
    repeats = head_dim is not None and head_dim * num_heads == values.get("hidden_size")
    return None if repeats else head_dim


def _token_ids(values: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """bos, pad and all end ids, those of `config.json` first; phi-4's early ids are corrected."""
    end_ids: list[int] = []
    for source in (values, generation):
        found = source.get("eos_token_id")
        found = [found] if isinstance(found, int) else (found or [])
        end_ids += [token_id for token_id in found if token_id not in end_ids]
    pad = _or(values.get("pad_token_id"), generation.get("pad_token_id"))
    if values.get("vocab_size") == _PHI_4_VOCAB_SIZE:
        end_ids.sort(key=lambda token_id: token_id != _PHI_4_END)
        if pad == _PHI_4_THINK_END or pad in end_ids:
            pad = _PHI_4_PAD
    return {
        "bos_token_id": _or(values.get("bos_token_id"), generation.get("bos_token_id")),
        "pad_token_id": pad,
        "eos_token_ids": tuple(end_ids),
    }


def _check_layout(config: PhiConfig, layout: str) -> None:
    if layout not in ARCHITECTURES:
        raise ValueError(f"layout is {layout!r}; choose one of: {', '.join(ARCHITECTURES)}")
    if layout != "llama":
        return
    if config.sliding_window is not None:
        raise ValueError("layout 'llama' has no sliding window; save as 'phi3'")
    if config.partial_rotary_factor != 1.0:
        raise ValueError("layout 'llama' has no partial rotary embedding; save as 'phi3'")


def _scaling_json(scaling: LongRope | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {
        "long_factor": list(scaling.long_factor),
        "rope_type": "longrope",
        "short_factor": list(scaling.short_factor),
        "type": "longrope",
    }
    for name in ("factor", "attention_factor"):
        if getattr(scaling, name) is not None:
            values[name] = getattr(scaling, name)
    return values


def _rope_json(config: PhiConfig, layout: str) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if layout == "phi3":
        values["partial_rotary_factor"] = config.partial_rotary_factor
    scaling = _scaling_json(config.rope_scaling)
    if scaling is not None:
        values |= scaling | {"original_max_position_embeddings": config.original_length}
    return values


def _required(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"{name} is missing; the file must state it")
    return values[name]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
