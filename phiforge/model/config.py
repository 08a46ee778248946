"""The architecture of a Phi decoder as one frozen dataclass, with presets from nano to phi-4.

`PhiConfig.preset("phi-4").num_parameters` is 14_659_507_200; `preset(name, num_layers=2)` changes
fields. Nothing is written; `model/huggingface.py` turns a configuration into files and back.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE factors (arXiv 2402.13753): one divisor per rotary frequency, two sets.

    The long set serves runs whose maximum length exceeds `original_max_position_embeddings`, the
    short set all others. `attention_factor` scales cos and sin; None derives it from the lengths.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float | None = None
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """Shape of a Phi decoder (arXiv 2412.08905 section 3); phi-3 and phi-4-mini are other values.

    Lengths are in tokens. `sliding_window` n lets a token see itself and the n - 1 before it;
    None is full attention. Raises ValueError, naming the field, when fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    max_position_embeddings: int
    original_max_position_embeddings: int | None = None
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    rope_scaling: LongRope | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        _check_sizes(self)
        _check_rope(self)
        _check_token_ids(self)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PhiConfig:
        """A named shape, with `changes` to its fields. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; "
                f"choose one of: {', '.join(PRESETS)}"
            )
        return PRESETS[name].replace(**changes)

    def replace(self, **changes: Any) -> PhiConfig:
        """A copy with some fields changed. Raises ValueError for an unknown field."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(
                    f"PhiConfig has no field {name!r}{did_you_mean(name, known)}; "
                    f"fields: {', '.join(known)}"
                )
        return replace(self, **changes)

    @property
    def head_size(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE turns; the rest carry no position."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def original_length(self) -> int:
        """Length in tokens up to which LongRoPE uses its short factors."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def rope_attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1 without LongRoPE.

        Else sqrt(1 + ln s / ln original_length), s the ratio of the lengths (arXiv 2402.13753).
        """
        scaling = self.rope_scaling
        if scaling is None:
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        ratio = scaling.factor or self.max_position_embeddings / self.original_length
        if ratio <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(ratio) / math.log(self.original_length))

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters, tied embeddings counted once."""
        query = self.num_heads * self.head_size
        key = self.num_kv_heads * self.head_size
        attention = self.hidden_size * (2 * query + 2 * key)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layers = self.num_layers * (attention + mlp + 2 * self.hidden_size)
        tables = 1 if self.tie_word_embeddings else 2
        return layers + tables * self.vocab_size * self.hidden_size + self.hidden_size


def did_you_mean(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The end of an error message: the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_sizes(config: PhiConfig) -> None:
    positive = (
        "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads "
        "head_dim max_position_embeddings original_max_position_embeddings sliding_window"
    )
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"PhiConfig.{name} is {value!r}; it must be a whole number above 0")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"PhiConfig.num_kv_heads is {config.num_kv_heads}; it must divide num_heads "
            f"({config.num_heads})"
        )
    if config.head_dim is None and config.hidden_size % config.num_heads:
        raise ValueError(
            f"PhiConfig.hidden_size is {config.hidden_size}; it must be a multiple of num_heads "
            f"({config.num_heads}), or set head_dim"
        )


def _check_rope(config: PhiConfig) -> None:
    if config.rope_theta <= 0:
        raise ValueError(f"PhiConfig.rope_theta is {config.rope_theta!r}; it must be above 0")
    if not 0.0 < config.partial_rotary_factor <= 1.0:
        raise ValueError(
            f"PhiConfig.partial_rotary_factor is {config.partial_rotary_factor!r}; "
            "it must be above 0 and at most 1"
        )
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise ValueError(
            f"PhiConfig: head size {config.head_size} x partial_rotary_factor "
            f"{config.partial_rotary_factor} gives {config.rotary_dim} rotary dimensions; RoPE "
            "turns pairs, so this must be an even number above 0: change one of the two"
        )
    if config.original_length > config.max_position_embeddings:
        raise ValueError(
            f"PhiConfig.original_max_position_embeddings is {config.original_length}; it must not "
            f"exceed max_position_embeddings ({config.max_position_embeddings})"
        )
    if config.rope_scaling is None:
        return
    for name in ("short_factor", "long_factor"):
        length = len(getattr(config.rope_scaling, name))
        if length != config.rotary_dim // 2:
            raise ValueError(
                f"PhiConfig.rope_scaling.{name} has {length} numbers; it must have "
                f"{config.rotary_dim // 2}, half the {config.rotary_dim} rotary dimensions"
            )


def _check_token_ids(config: PhiConfig) -> None:
    named = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    named |= {f"eos_token_ids[{i}]": value for i, value in enumerate(config.eos_token_ids)}
    for name, value in named.items():
        if value is not None and not 0 <= value < config.vocab_size:
            raise ValueError(
                f"PhiConfig.{name} is {value}; token ids run from 0 to {config.vocab_size - 1} "
                "(vocab_size - 1)"
            )


# Phi-4-mini's published LongRoPE set: a geometric ramp, then searched values near 128K / 4K = 32.
_PHI_4_MINI_LONG = (
    *(1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817),
    *(2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687),
    *(4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894),
    *(8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252),
    *(16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884),
    *(32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97),
    *(33.28, 33.49, 33.5, 44.16, 47.77),
)

_PHI_4 = PhiConfig(
    vocab_size=100_352,
    hidden_size=5120,
    intermediate_size=17_920,
    num_layers=40,
    num_heads=40,
    num_kv_heads=10,
    max_position_embeddings=16_384,
    rope_theta=250_000.0,
    bos_token_id=100_257,
    eos_token_ids=(100_265, 100_257),
    pad_token_id=100_349,
)
_PHI_3_MINI = PhiConfig(
    vocab_size=32_064,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    max_position_embeddings=4096,
    sliding_window=2047,
    bos_token_id=1,
    eos_token_ids=(32_000, 32_007),
    pad_token_id=32_000,
)

PRESETS: dict[str, PhiConfig] = {
    "nano": PhiConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=320,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=256,
        # 128 ** -0.5: at this width 0.02 starts so small that a million tokens go by unused.
        initializer_range=0.088,
    ),
    "small-100m": PhiConfig(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "phi-3-mini-4k": _PHI_3_MINI,
    "phi-3-medium-4k": _PHI_3_MINI.replace(
        hidden_size=5120, intermediate_size=17_920, num_layers=40, num_heads=40, num_kv_heads=10
    ),
    "phi-4-mini": PhiConfig(
        vocab_size=200_064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=24,
        num_kv_heads=8,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling=LongRope(short_factor=(1.0,) * 48, long_factor=_PHI_4_MINI_LONG),
        sliding_window=262_144,
        tie_word_embeddings=True,
        bos_token_id=199_999,
        eos_token_ids=(200_020, 199_999),
        pad_token_id=199_999,
    ),
    # Pretraining shape: 4K, full attention; the report states no RoPE base, phi-3's is assumed.
    "phi-4-4k": _PHI_4.replace(max_position_embeddings=4096, rope_theta=10_000.0),
    "phi-4": _PHI_4,
    "phi-4-reasoning": _PHI_4.replace(max_position_embeddings=32_768, rope_theta=500_000.0),
}
