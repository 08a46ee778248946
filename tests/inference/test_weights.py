"""The engine's weights: a folder gives what the model gives, little memory beside, same perplexity.

The parity test trains a model of 78 thousand parameters for about two seconds, because the
weights of an untrained one mean nothing.
"""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from phiforge.inference.engine.weights import Weights, from_folder, from_model, stamp
from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.huggingface import save
from phiforge.model.phi import Phi
from phiforge.model.quantize import FORMATS, Format, Matrix

TINY = PhiConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
VARIANTS = {
    "plain": TINY,
    "tied": TINY.replace(tie_word_embeddings=True),
    "long": TINY.replace(
        original_max_position_embeddings=16,
        rope_scaling=LongRope(short_factor=(1.0,) * 6, long_factor=(2.0,) * 6),
    ),
}


def build(config: PhiConfig) -> Phi:
    return Phi(config).initialize(torch.Generator().manual_seed(0))


def same(left: Matrix, right: Matrix) -> bool:
    shapes = (left.num_outputs, left.num_inputs) == (right.num_outputs, right.num_inputs)
    scales = left.scale is right.scale is None or torch.equal(left.scale, right.scale)  # pyright: ignore
    return shapes and left.format == right.format and scales and torch.equal(left.data, right.data)


def assert_same(left: Weights, right: Weights) -> None:
    assert (left.config, left.format, left.dtype) == (right.config, right.format, right.dtype)
    assert left.long_rope == right.long_rope
    assert torch.equal(left.embedding, right.embedding)
    assert torch.equal(left.norm, right.norm)
    assert same(left.lm_head, right.lm_head)
    for ours, theirs in zip(left.layers, right.layers, strict=True):
        assert torch.equal(ours.attention_norm, theirs.attention_norm)
        assert torch.equal(ours.mlp_norm, theirs.mlp_norm)
        for name in ("query_key_value", "output", "gate_up", "down"):
            assert same(getattr(ours, name), getattr(theirs, name)), name


# ---------------------------------------------------------------------- model and folder


def test_matrices_are_fused_in_order():
    model = build(TINY)
    layer, weights = model.layers[1], from_model(model, "fp32")
    attention = layer.attention
    stacked = [attention.query.weight, attention.key.weight, attention.value.weight]
    made = weights.layers[1]
    assert torch.equal(made.query_key_value.data, torch.cat(stacked))
    assert torch.equal(made.gate_up.data, torch.cat([layer.mlp.gate.weight, layer.mlp.up.weight]))
    assert torch.equal(weights.layers[-1].down.data, model.layers[2].mlp.down.weight)
    assert weights.dtype == weights.embedding.dtype == torch.float32
    assert weights.norm.dtype == torch.float32


@pytest.mark.parametrize("layout", ["phi3", "llama"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_gives_what_the_model_gives(tmp_path, variant, format, layout):
    model = build(VARIANTS[variant])
    save(model, None, tmp_path / "m", layout=layout, dtype="float32", max_shard_bytes=50_000)
    assert_same(from_folder(tmp_path / "m", format), from_model(model, format))


def test_small_chunks_across_stored_tensors(tmp_path, monkeypatch):
    """Rows of one piece that lie in two tensors of a llama folder."""
    model = build(TINY)
    save(model, None, tmp_path / "m", layout="llama", dtype="float32")
    whole = from_model(model, "int4")
    for name in ("_TORCH_CHUNK", "_NATIVE_CHUNK"):
        monkeypatch.setattr(f"phiforge.model.quantize.{name}", 48 * 7)
    assert_same(from_folder(tmp_path / "m", "int4"), whole)


def test_format_follows_what_is_there(tmp_path):
    model = build(TINY)
    assert from_model(model).format == "fp32"
    model.compute_dtype = torch.bfloat16
    assert from_model(model).format == "bf16"
    for dtype, format in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "bf16")):
        save(model, None, tmp_path / dtype, dtype=dtype)
        assert from_folder(tmp_path / dtype).format == format


def test_weights_are_copies():
    model = build(VARIANTS["tied"])
    weights = from_model(model, "fp32")
    assert weights.lm_head.data is weights.embedding
    before = weights.embedding.clone()
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert torch.equal(weights.embedding, before)


def test_int4_weights_have_an_int8_head():
    assert from_model(build(TINY), "int4").lm_head.format == "int8"
    assert from_model(build(VARIANTS["tied"]), "int4").lm_head.format == "int8"


def test_layers_are_made_when_asked_for(tmp_path):
    save(build(TINY), None, tmp_path / "m")
    layers = from_folder(tmp_path / "m", "int8").layers
    assert len(layers) == len(layers[1:]) + 1 == 3
    assert layers[0].down.data is not layers[0].down.data
    assert same(layers[1:][0].down, layers[1].down)
    assert same(layers[-1].down, list(layers)[2].down)
    with pytest.raises(IndexError):
        layers[3]


def test_long_factors_follow_the_models_length():
    model = build(VARIANTS["long"])
    assert from_model(model).long_rope
    model.set_max_length(16)
    assert not from_model(model).long_rope


def test_stamp_changes_with_the_model():
    model = build(TINY)
    seen = [stamp(model)]
    with torch.no_grad():
        model.norm.weight.mul_(2.0)
    seen.append(stamp(model))
    model.set_max_length(7)
    seen.append(stamp(model))
    model.compute_dtype = torch.bfloat16
    seen.append(stamp(model))
    assert len(set(seen)) == 4
    assert stamp(model) == seen[-1]


# ---------------------------------------------------------------------- mistakes


def test_misuse(tmp_path):
    model = build(TINY)
    with pytest.raises(ValueError, match="choose one of: fp32, bf16, int8, int4"):
        from_model(model, "int5")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"computes in torch\.float16"):
        from_model(model.to(torch.float16))
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        from_folder(tmp_path / "none", "int8")


def test_missing_and_damaged_files_are_found_before_reading(tmp_path):
    save(build(TINY), None, tmp_path / "m", max_shard_bytes=50_000)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_folder(tmp_path / "m", "int8")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="missing shard"):
        from_folder(tmp_path / "m", "int8")


# ---------------------------------------------------------------------- memory

_LOAD = """
import re, sys, torch
from phiforge.inference.engine.weights import from_folder
from phiforge.model.quantize import matrix_bytes
torch.set_num_threads(1)
def peak():  # ru_maxrss would count what the starting process once had
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
from_folder(sys.argv[2], "int4").layers[0]  # kernels are compiled, libraries loaded
before = peak()
weights = from_folder(sys.argv[1], "int4")
size = weights.embedding.nbytes + matrix_bytes(weights.lm_head)
kept = []
for layer in weights.layers:
    kept.append(layer)
    for name in ("query_key_value", "output", "gate_up", "down"):
        size += matrix_bytes(getattr(layer, name))
print(peak() - before, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_result_and_a_little(tmp_path):
    """121 MB of fp32 become 19 MB of int4: the peak lies 17 MB above, one piece of rows."""
    wide = {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2048, "num_layers": 3}
    save(build(TINY), None, tmp_path / "small")
    save(build(TINY.replace(**wide)), None, tmp_path / "wide", dtype="float32")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "wide"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = (int(number) for number in done.stdout.split())
    stored = sum(file.stat().st_size for file in (tmp_path / "wide").glob("*.safetensors"))
    assert stored > 4 * size
    assert peak < size + 40_000_000


# ---------------------------------------------------------------------- perplexity


def sums(num_lines: int, seed: int) -> list[list[int]]:
    """Lines such as `17+25=42.` as character ids, several to a row of 49."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 50, (num_lines, 2), generator=draw).tolist()
    text = " ".join(f"{a}+{b}={a + b}." for a, b in numbers)
    ids = [ord(char) - 32 for char in text]
    return [ids[at : at + 49] for at in range(0, len(ids) - 49, 49)]


@pytest.fixture(scope="module")
def trained() -> Phi:
    config = TINY.replace(vocab_size=32, hidden_size=64, intermediate_size=128, num_layers=2)
    model = build(config.replace(initializer_range=0.1))
    rows = torch.tensor(sums(4000, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = rows[torch.arange(16 * step, 16 * step + 16) % len(rows)]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def perplexity(model: Phi, format: Format, kernels: str) -> float:
    from phiforge.inference.engine import Engine

    rows = sums(600, seed=2)
    tokenizer = SimpleNamespace(stop_ids=frozenset())
    engine = Engine(model, tokenizer, weights=format, kernels=kernels)  # pyright: ignore
    found = engine.score([row[:1] for row in rows], [row[1:] for row in rows])
    values = [value for row in found for value in row]
    return math.exp(-sum(values) / len(values))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_quantised_weights_keep_the_perplexity(trained, kernels):
    """int8 within 0.5% of fp32, bf16 within 0.5%, int4 within 3%."""
    exact = perplexity(trained, "fp32", kernels)
    assert exact < 4.0, "the model has learnt nothing"
    ratios = {f: perplexity(trained, f, kernels) / exact for f in ("bf16", "int8", "int4")}
    assert abs(ratios["bf16"] - 1) < 0.005, ratios
    assert abs(ratios["int8"] - 1) < 0.005, ratios
    assert abs(ratios["int4"] - 1) < 0.03, ratios
