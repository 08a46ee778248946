"""Hugging Face folders: round trips both ways, damaged files, crashes while saving.

Run `pytest tests/model/test_huggingface.py`. It writes into pytest's temporary folder.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phiforge.model import huggingface
from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.huggingface import load, load_config, load_model, save
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
LONG_ROPE = LongRope(short_factor=(1.0, 1.1), long_factor=(1.5, 6.0))
VARIANTS = {
    "plain": TINY,
    "tied": TINY.replace(tie_word_embeddings=True),
    "window": TINY.replace(sliding_window=7),
    "head-dim": TINY.replace(head_dim=16),
    "mini": TINY.replace(
        partial_rotary_factor=0.5,
        rope_scaling=LONG_ROPE,
        original_max_position_embeddings=16,
        sliding_window=11,
        tie_word_embeddings=True,
    ),
    "no-ids": TINY.replace(pad_token_id=None, bos_token_id=None, eos_token_ids=()),
}


def build(config: PhiConfig) -> Phi:
    return Phi(config).initialize(torch.Generator().manual_seed(0))


def tokens(length: int = 30) -> Tensor:
    return torch.randint(0, 94, (2, length), generator=torch.Generator().manual_seed(1))


def assert_same_weights(one: Phi, other: Phi) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build(TINY), None, tmp_path / "model", dtype="float32")
    return tmp_path / "model"


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("max_shard_bytes", [10**9, 8000])
def test_round_trip(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    model = build(VARIANTS[name])
    save(model, None, tmp_path / "m", dtype="float32", max_shard_bytes=max_shard_bytes)
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    assert_same_weights(again, model)
    sharded = (tmp_path / "m" / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes == 8000)


@pytest.mark.parametrize("name", ["plain", "tied", "head-dim", "no-ids"])
def test_phi3_and_llama_folders_hold_the_same_model(tmp_path: Path, name: str) -> None:
    model = build(VARIANTS[name])
    for layout in ("phi3", "llama"):
        save(model, None, tmp_path / layout, layout=layout, dtype="float32")
    fused, unfused = load_model(tmp_path / "phi3"), load_model(tmp_path / "llama")
    assert fused.config == unfused.config == model.config
    assert_same_weights(fused, unfused)
    with torch.no_grad():
        assert (fused(tokens()) - unfused(tokens())).abs().max() == 0.0


@pytest.mark.parametrize("layout", ["phi3", "llama"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_transformers_loads_ours_and_we_load_theirs(tmp_path: Path, name: str, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = VARIANTS[name]
    if layout == "llama" and (config.sliding_window or config.partial_rotary_factor != 1.0):
        pytest.skip("the llama architecture cannot express this model")
    model = build(config)
    model.set_max_length(30)
    save(model, None, tmp_path / "ours", layout=layout, dtype="float32")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert not report["missing_keys"]
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(model(tokens()), expected, rtol=2e-5, atol=2e-5)
    ends = list(config.eos_token_ids) or None
    assert theirs.generation_config.eos_token_id == ends
    assert theirs.generation_config.pad_token_id == config.pad_token_id

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config == config
    assert_same_weights(back, model)


def test_tensor_names_are_those_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for layout in ("phi3", "llama"):
        save(build(TINY), None, tmp_path / layout, layout=layout)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / layout)
        theirs.save_pretrained(tmp_path / f"{layout}-theirs")
        ours = load_file(tmp_path / layout / "model.safetensors")
        other = load_file(tmp_path / f"{layout}-theirs" / "model.safetensors")
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_longrope_in_the_llama_layout(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = LongRope(short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))
    config = TINY.replace(rope_scaling=scaling, original_max_position_embeddings=16)
    model = build(config)
    save(model, None, tmp_path / "m", layout="llama", dtype="float32")
    assert load_config(tmp_path / "m") == config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for length in (12, 30):
        model.set_max_length(length)
        with torch.no_grad():
            expected = theirs(tokens(length)).logits
            torch.testing.assert_close(model(tokens(length)), expected, rtol=2e-5, atol=2e-5)


def test_dtypes(tmp_path: Path) -> None:
    model = build(TINY)
    save(model, None, tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "m", dtype="bfloat16").compute_dtype == torch.bfloat16
    back = load_model(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16().float())
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_model(tmp_path / "m", dtype="int8")


def test_bytes_depend_on_the_model_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(build(TINY), None, tmp_path / name / "model", max_shard_bytes=8000)
    first, second = tmp_path / "a" / "model", tmp_path / "b" / "model"
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_loaded_model_trains(folder: Path) -> None:
    model = load_model(folder)
    model(tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- damaged and foreign files ----------------------------------------------------------------


def test_missing_folder_config_and_weights(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_model(tmp_path / "nothing")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_model(folder)


def test_missing_shard_and_broken_index(tmp_path: Path) -> None:
    save(build(TINY), None, tmp_path / "m", max_shard_bytes=8000)
    shard = sorted((tmp_path / "m").glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: missing shard"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="no usable weight_map"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder)


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


def test_wrong_shape(folder: Path) -> None:
    edit_weights(folder, **{"lm_head.weight": torch.zeros(90, 32)})
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has shape \[90, 32\].*\[97, 32\]"):
        load_model(folder)


def test_unknown_tensor_gets_a_suggestion(folder: Path) -> None:
    name = "model.layers.0.self_attn.qkv_porj.weight"
    edit_weights(folder, **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unknown tensor .*did you mean '.*qkv_proj\.weight'"):
        load_model(folder)


def test_bias_adapter_and_surplus_layer(folder: Path) -> None:
    edit_weights(folder, **{"model.layers.9.mlp.down_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="layer 9, beyond"):
        load_model(folder)
    edit_weights(folder, **{"model.layers.9.mlp.down_proj.weight": None})
    edit_weights(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match="without biases"):
        load_model(folder)


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, **{"model.layers.1.mlp.gate_up_proj.weight": None})
    with pytest.raises(ValueError, match=r"2 of 21 parameters.*layers\.1\.mlp\.gate"):
        load_model(folder)


def test_copies_that_old_files_carry_are_ignored(tmp_path: Path) -> None:
    model = build(VARIANTS["tied"])
    save(model, None, tmp_path / "m", dtype="float32")
    extra = {
        "lm_head.weight": model.embedding.weight.detach().clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    edit_weights(tmp_path / "m", **extra)
    assert_same_weights(load_model(tmp_path / "m"), model)


# --- saving -----------------------------------------------------------------------------------


def test_saving_twice_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(build(TINY), None, tmp_path / "m", max_shard_bytes=8000)
    save(build(VARIANTS["tied"]), None, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m"]
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "m")) == names
    assert load_config(tmp_path / "m") == VARIANTS["tied"]


def test_a_crash_while_saving_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(TINY)
    save(old, None, tmp_path / "m", dtype="float32")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_weights", fail)
        with pytest.raises(OSError, match="No space left"):
            save(build(VARIANTS["tied"]), None, tmp_path / "m")
    assert_same_weights(load_model(tmp_path / "m"), old)
    save(build(VARIANTS["tied"]), None, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_a_crash_between_the_renames_says_how_to_recover(tmp_path: Path, folder: Path) -> None:
    folder.rename(tmp_path / ".model.old")
    with pytest.raises(FileNotFoundError, match=r"interrupted; rename .*\.model\.old"):
        load_model(folder)


def test_folders_with_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"'metrics\.jsonl'.*new folder"):
        save(build(TINY), None, tmp_path)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_saving_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save(build(TINY), None, tmp_path / "m")
    assert load_config(tmp_path / "m") == TINY


def test_model_card(tmp_path: Path) -> None:
    save(build(TINY), None, tmp_path / "tiny", card="## Evaluation\n\nNone yet.")
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for words in ("# tiny", f"{TINY.num_parameters:,}", "base 250,000", "## Evaluation"):
        assert words in text


# --- tokenizer and Hub ------------------------------------------------------------------------


class FakeTokenizer:
    """What `save` asks of a tokenizer, and nothing else."""

    def __init__(self, vocab_size: int = 90) -> None:
        self.vocab_size = vocab_size
        self.eos_id, self.eod_id, self.pad_id = 80, 81, 82
        self.stop_ids = frozenset({80, 81})

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_open_ids_come_from_the_tokenizer(tmp_path: Path) -> None:
    model = build(VARIANTS["no-ids"])
    save(model, FakeTokenizer(), tmp_path / "m")  # type: ignore[arg-type]
    config = load_config(tmp_path / "m")
    ids = (config.bos_token_id, config.pad_token_id, config.eos_token_ids)
    assert ids == (81, 82, (80, 81))
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert model.config == VARIANTS["no-ids"]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="98 ids but the model has 97"):
        save(build(TINY), FakeTokenizer(98), tmp_path / "m")  # type: ignore[arg-type]


def test_load_gives_model_and_tokenizer(tmp_path: Path) -> None:
    from phiforge.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["ab ab abc"] * 20, vocab_size=512)
    model = build(VARIANTS["no-ids"].replace(vocab_size=tokenizer.vocab_size))
    save(model, tokenizer, tmp_path / "m", dtype="float32")
    again, same = load(tmp_path / "m")
    assert_same_weights(again, model)
    assert same.encode("ab abc") == tokenizer.encode("ab abc")
    assert again.config.eos_token_ids[0] == tokenizer.eos_id


def test_hub_names_are_downloaded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = types.ModuleType("huggingface_hub")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "someone/model":
            return str(folder)
        raise OSError("404")

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_config("someone/model") == TINY
    with pytest.raises(ValueError, match="someone/else: no such folder here"):
        load_config("someone/else")
    assert load_config(str(folder)) == TINY
    assert asked == ["someone/model", "someone/else"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'phiforge\[hub\]'"):
        load_config("someone/model")
