"""The configuration: presets, parameter counts, and errors that name the field.

Run `pytest tests/model/test_config.py`. It writes nothing.
"""

import dataclasses

import pytest
import torch

from phiforge.model.config import PRESETS, LongRope, PhiConfig
from phiforge.model.phi import Phi

TINY = PhiConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=32,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("phi-4", 14_659_507_200),
        ("phi-4-4k", 14_659_507_200),
        ("phi-4-reasoning", 14_659_507_200),
        ("phi-4-mini", 3_836_021_760),
        ("phi-3-mini-4k", 3_821_079_552),
        ("phi-3-medium-4k", 13_960_238_080),
    ],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    config = PhiConfig.preset(name)
    with torch.device("meta"):
        model = Phi(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert config.num_parameters == count


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_counts_what_the_module_holds(name: str) -> None:
    config = PhiConfig.preset(name)
    with torch.device("meta"):
        model = Phi(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters


def test_nano_and_small_have_the_promised_size() -> None:
    assert 1.0e6 < PhiConfig.preset("nano").num_parameters < 2.0e6
    assert 0.9e8 < PhiConfig.preset("small-100m").num_parameters < 1.2e8


def test_phi_4_head_and_rotary_sizes() -> None:
    assert (PhiConfig.preset("phi-4").head_size, PhiConfig.preset("phi-4").rotary_dim) == (128, 128)
    mini = PhiConfig.preset("phi-4-mini")
    assert (mini.head_size, mini.rotary_dim, mini.original_length) == (128, 96, 4096)
    assert mini.rope_attention_factor == pytest.approx(1.1902380714238083)


def test_preset_takes_changes_and_config_is_frozen() -> None:
    config = PhiConfig.preset("nano", vocab_size=512, eos_token_ids=[3])
    assert (config.vocab_size, config.eos_token_ids) == (512, (3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_heads": 3}, ["num_kv_heads", "3", "num_heads"]),
        ({"hidden_size": 30}, ["hidden_size", "30", "head_dim"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"num_layers": 1.5}, ["num_layers", "1.5"]),
        ({"rope_theta": 0.0}, ["rope_theta", "above 0"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5"]),
        ({"head_dim": 7}, ["head size 7", "even"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"original_max_position_embeddings": 64}, ["original_max_position", "64", "32"]),
        ({"pad_token_id": 64}, ["pad_token_id", "64", "63"]),
        ({"eos_token_ids": (1, -1)}, ["eos_token_ids[1]", "-1"]),
        ({"rope_scaling": LongRope(short_factor=(1.0,), long_factor=(2.0,) * 4)}, ["short_factor"]),
        ({"hidden_sise": 8}, ["hidden_sise", "did you mean 'hidden_size'"]),
    ],
)
def test_errors_name_field_and_value(changes: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        TINY.replace(**changes)
    for word in words:
        assert word in str(error.value)


def test_unknown_preset_suggests_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'phi-4-mini'"):
        PhiConfig.preset("phi-4-mni")
