"""`config.json` of Hugging Face folders: the published ones, and every known trap.

Run `pytest tests/model/test_huggingface_config.py`. It writes into pytest's temporary folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.huggingface import load_config, load_model, save
from phiforge.model.phi import Phi

TINY = PhiConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    rope_theta=250_000.0,
    pad_token_id=96,
    bos_token_id=95,
    eos_token_ids=(94, 95),
)
VARIANTS = {
    "window": TINY.replace(sliding_window=7),
    "mini": TINY.replace(
        partial_rotary_factor=0.5,
        rope_scaling=LongRope(short_factor=(1.0, 1.1), long_factor=(1.5, 6.0)),
        original_max_position_embeddings=16,
        sliding_window=11,
    ),
    "no-ids": TINY.replace(pad_token_id=None, bos_token_id=None, eos_token_ids=()),
}


def build(config: PhiConfig) -> Phi:
    return Phi(config).initialize(torch.Generator().manual_seed(0))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; the value `...` removes one."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is ...:
            values.pop(name, None)
        else:
            values[name] = value
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build(TINY), None, tmp_path / "model", dtype="float32")
    return tmp_path / "model"


# --- published configurations -----------------------------------------------------------------

PHI_4 = {
    "_name_or_path": "phi-4",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {},
    "bos_token_id": 100257,
    "embd_pdrop": 0.0,
    "eos_token_id": 100265,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "model_type": "phi3",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100349,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
PHI_4_REASONING = PHI_4 | {
    "max_position_embeddings": 32768,
    "original_max_position_embeddings": 32768,
    "rope_theta": 500000,
}
PHI_3_MINI_4K = PHI_4 | {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "vocab_size": 32064,
}
PHI_3_MEDIUM_4K = PHI_3_MINI_4K | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
}
PHI_3_MINI_128K = PHI_3_MINI_4K | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "long_factor": [1.0 + i for i in range(48)],
        "short_factor": [1.0] * 48,
        "type": "su",
    },
    "sliding_window": 262144,
}
PHI_4_MINI = PHI_4 | {
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": list(PhiConfig.preset("phi-4-mini").rope_scaling.long_factor),
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
LLAMAFIED_PHI_4 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100351,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


def write_config(folder: Path, values: dict, end_ids: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    if end_ids is not None:
        generation = json.dumps({"eos_token_id": end_ids})
        (folder / "generation_config.json").write_text(generation)
    return folder


@pytest.mark.parametrize(
    ("values", "end_ids", "preset"),
    [
        (PHI_4, [100257, 100265], "phi-4"),
        (PHI_4_REASONING, [100257, 100265], "phi-4-reasoning"),
        (PHI_3_MINI_4K, [32000, 32007], "phi-3-mini-4k"),
        (PHI_3_MEDIUM_4K, [32000, 32007], "phi-3-medium-4k"),
        (LLAMAFIED_PHI_4, [100265, 100257], "phi-4"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_published_configs_equal_presets(
    tmp_path: Path, values: dict, end_ids: list, preset: str
) -> None:
    assert load_config(write_config(tmp_path, values, end_ids)) == PhiConfig.preset(preset)


def test_phi_4_mini_config(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, PHI_4_MINI, [200020, 199999]))
    assert config.replace(eos_token_ids=(200020, 199999)) == PhiConfig.preset("phi-4-mini")
    assert config.num_parameters == 3_836_021_760


def test_phi_3_128k_config_with_its_old_name_for_longrope(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, PHI_3_MINI_128K))
    assert config.rope_scaling is not None
    assert (config.original_length, config.sliding_window) == (4096, 262144)
    assert config.rope_attention_factor == pytest.approx(1.1902380714238083)


@pytest.mark.parametrize(
    ("pad", "end", "generation"),
    [(100257, 100257, [100257, 100265]), (100351, 100265, None), (100349, 100265, None)],
    ids=["first upload", "padded with the think token", "now"],
)
def test_phi_4_ids_of_every_release(tmp_path: Path, pad: int, end: int, generation: Any) -> None:
    values = PHI_4 | {"pad_token_id": pad, "eos_token_id": end}
    config = load_config(write_config(tmp_path, values, generation))
    assert config.pad_token_id == 100349
    assert config.eos_token_ids[0] == 100265


# --- configuration traps ----------------------------------------------------------------------


def test_rope_is_written_for_old_and_new_readers(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["rope_theta"] == 250_000.0
    assert values["rope_scaling"] is None
    assert values["rope_parameters"]["rope_theta"] == 250_000.0
    assert values["sliding_window"] is None
    assert values["original_max_position_embeddings"] == values["max_position_embeddings"]
    assert (values["pad_token_id"], values["eos_token_id"], values["bos_token_id"]) == (96, 94, 95)


@pytest.mark.parametrize("removed", ["rope_theta", "rope_parameters"])
def test_either_rope_key_alone_is_enough(folder: Path, removed: str) -> None:
    edit_json(folder / "config.json", **{removed: ...})
    assert load_config(folder).rope_theta == 250_000.0


def test_no_rope_key_at_all_is_an_error(folder: Path) -> None:
    edit_json(folder / "config.json", rope_theta=..., rope_parameters=...)
    with pytest.raises(ValueError, match=r'config\.json: .*rope_theta.*add "rope_theta": 10000'):
        load_config(folder)


def test_disagreeing_rope_keys_warn_and_the_new_one_wins(folder: Path) -> None:
    edit_json(folder / "config.json", rope_theta=10_000.0)
    with pytest.warns(UserWarning, match=r"rope_theta is 10000\.0 but rope_parameters"):
        assert load_config(folder).rope_theta == 250_000.0


def test_unset_ids_are_written_as_null(tmp_path: Path) -> None:
    """Where a key is missing `transformers` assumes 32000, beyond a small vocabulary."""
    save(build(VARIANTS["no-ids"]), None, tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert values[name] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "phimoe"}, ["phimoe", "supported", "phi3"]),
        ({"model_type": "lama"}, ["did you mean 'llama'"]),
        ({"architectures": ["Phi3ForSequenceClassification"]}, ["SequenceClassification"]),
        ({"attention_bias": True}, ["attention_bias", "no biases"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantized", "original"]),
        ({"vocab_size": ...}, ["vocab_size is missing"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3"]),
        ({"pad_token_id": 32000}, ["pad_token_id", "32000", "96"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            ["'yarn'", "not supported", "longrope"],
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
                "original_max_position_embeddings": ...,
            },
            ["original_max_position_embeddings is missing"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:rope_theta is")
def test_unusable_configs_name_file_field_and_remedy(
    folder: Path, changes: dict, words: list[str]
) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for word in [str(folder / "config.json"), *words]:
        assert word in str(error.value)


def test_dropout_in_a_config_is_said(folder: Path) -> None:
    edit_json(folder / "config.json", resid_pdrop=0.1)
    with pytest.warns(UserWarning, match=r"resid_pdrop is 0\.1"):
        load_config(folder)


def test_layouts_that_cannot_hold_the_model_are_refused(tmp_path: Path) -> None:
    for name, word in (("window", "sliding window"), ("mini", "sliding window")):
        with pytest.raises(ValueError, match=word):
            save(build(VARIANTS[name]), None, tmp_path / "m", layout="llama")
    with pytest.raises(ValueError, match="partial rotary"):
        save(build(TINY.replace(partial_rotary_factor=0.5)), None, tmp_path / "m", layout="llama")
    with pytest.raises(ValueError, match="layout is 'gguf'"):
        save(build(TINY), None, tmp_path / "m", layout="gguf")
    assert not list(tmp_path.iterdir())
