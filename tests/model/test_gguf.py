"""GGUF files: tensors, fields and tokenizer as llama.cpp reads them, and llama.cpp's own answers.

The comparison with llama.cpp runs where PHIFORGE_LLAMACPP_PYTHON names an interpreter that has
llama-cpp-python: same token ids for every text, same greedy tokens.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llamacpp_process import PYTHON, LlamaCpp
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from phiforge.core.usage import UsageError
from phiforge.model import bpe
from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.convert import convert as convert_any
from phiforge.model.gguf import convert
from phiforge.model.gguf_tokenizer import CONTROL, NORMAL, UNUSED, describe
from phiforge.model.huggingface import load, save
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")
needs_llamacpp = pytest.mark.skipif(not PYTHON, reason="PHIFORGE_LLAMACPP_PYTHON is not set")

TEXTS = [
    "Hello, world! It's 2024, and I'VE 1234567 things; don'T we'LL?",
    "你好，世界。今天天气怎么样？3.14，人工智能",
    "👍🏽 emoji 👩‍👩‍👧‍👦 naïve café Straße 🇩🇪",
    "def f(x):\n\treturn x**2  # comment\n\n\n    if x:\r\n  y = {'a': [1, 2]}",
    "   leading   and   trailing   \n\n \t ",
    "a\u00a0b\u2003c\u3000d\u200be\ufeff \u2028\u0085x",
    "ſ'ſ Kelvin K'ſ x'Re 'RE ''s ''ll",
    "٣٤٥ ①②③ ½ Ⅷ हिन्दी 한국어 ก็ e\u0301",
    "<|im_start|>user<|im_sep|>hi<|im_end|>",
    "\x01\x7f\x1f",
]
PHI = PhiConfig(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=512,
    rope_theta=250_000.0,
    initializer_range=0.3,
)
MINI = PHI.replace(
    tie_word_embeddings=True,
    partial_rotary_factor=0.75,
    original_max_position_embeddings=256,
    rope_scaling=LongRope(
        short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5), long_factor=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(TEXTS * 3, vocab_size=590, whole_numbers_below=10)


def saved(folder: Path, config: PhiConfig, tokenizer: Tokenizer) -> Path:
    model = Phi(config).initialize(torch.Generator().manual_seed(0))
    save(model, tokenizer, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "phi", PHI, tokenizer)


def field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


# ---------------------------------------------------------------------- tensors and fields


@pytest.mark.parametrize(("type", "error"), [("f32", 0.0), ("bf16", 2**-8), ("q8_0", 0.005)])
def test_tensors_are_the_models(folder, tmp_path, type, error):
    made = convert(folder, tmp_path / "a.gguf", type)
    tensors = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    assert made.num_tensors == len(tensors) == 2 * 6 + 3
    model, _ = load(folder)
    attention = model.layers[1].attention
    expected = {
        "token_embd.weight": [model.embedding.weight],
        "output.weight": [model.lm_head.weight],
        "output_norm.weight": [model.norm.weight],
        "blk.1.attn_qkv.weight": [
            part.weight for part in (attention.query, attention.key, attention.value)
        ],
        "blk.0.ffn_up.weight": [model.layers[0].mlp.gate.weight, model.layers[0].mlp.up.weight],
        "blk.1.ffn_norm.weight": [model.layers[1].mlp_norm.weight],
    }
    for name, parts in expected.items():
        weight = torch.cat(list(parts)).detach().numpy()
        tensor = tensors[name]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        limit = error * np.abs(weight).max() if weight.ndim == 2 else 0.0
        assert np.abs(found - weight).max() <= limit, name
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_chunks_do_not_show(folder, tmp_path, monkeypatch):
    whole = convert(folder, tmp_path / "a.gguf", "q8_0").path.read_bytes()
    monkeypatch.setattr("phiforge.model.gguf._CHUNK", 1000)
    assert convert(folder, tmp_path / "b" / "a.gguf", "q8_0").path.read_bytes() == whole


def test_fields(folder, tmp_path, tokenizer):
    reader = gguf.GGUFReader(convert(folder, tmp_path / "a.gguf").path)
    assert field(reader, "general.architecture") == "phi3"
    assert field(reader, "phi3.attention.sliding_window") == 0
    assert field(reader, "phi3.rope.freq_base") == 250_000.0
    assert field(reader, "phi3.rope.dimension_count") == 16
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_id
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert len(field(reader, "tokenizer.ggml.tokens")) == PHI.vocab_size


def test_long_rope_and_tied_embeddings(tmp_path, tokenizer):
    source = saved(tmp_path / "mini", MINI.replace(sliding_window=300), tokenizer)
    made = convert(source, tmp_path / "mini.gguf", "f32")
    reader = gguf.GGUFReader(made.path)
    tensors = {t.name: t for t in reader.tensors}
    assert "output.weight" not in tensors
    assert MINI.rope_scaling is not None
    assert tensors["rope_factors_long.weight"].data.tolist() == list(MINI.rope_scaling.long_factor)
    assert field(reader, "phi3.rope.dimension_count") == 12
    assert field(reader, "phi3.rope.scaling.original_context_length") == 256
    factor = field(reader, "phi3.rope.scaling.attn_factor")
    assert factor == pytest.approx(MINI.rope_attention_factor)
    assert "ignores phi3's sliding window" in made.notes[0]
    assert "long factors" in made.notes[1]


# ---------------------------------------------------------------------- tokenizer


def test_tokenizer_fields(tokenizer):
    made = describe(tokenizer, 600)
    assert made.pre == "dbrx"
    assert len(made.tokens) == len(made.kinds) == 600
    assert made.kinds[tokenizer.eos_id] == CONTROL
    assert made.kinds[65] == NORMAL
    assert made.kinds[599] == UNUSED
    assert made.merges[0] == " ".join(json.loads(tokenizer.backend.to_str())["model"]["merges"][0])


def test_template_has_no_generation_marks_and_renders_the_same(tokenizer):
    from jinja2 import Environment

    template = describe(tokenizer, 600).chat_template
    assert template is not None
    assert "generation %}" not in template
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = Environment().from_string(template).render(messages=chat, add_generation_prompt=True)
    assert rendered == tokenizer.render_chat(chat, add_generation_prompt=True)


def backend_with(**parts: Any) -> Tokenizer:
    ids = {token: index for index, token in enumerate(bpe.byte_alphabet().values())}
    backend = Backend(models.BPE(vocab=ids, merges=[], **parts.pop("model", {})))
    backend.decoder = decoders.ByteLevel()
    for name, value in parts.items():
        setattr(backend, name, value)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<pad>"])
    return Tokenizer(backend, eos="<|im_end|>", eod="<|endoftext|>", pad="<pad>")


def test_known_pre_tokenizers():
    gpt2 = backend_with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert describe(gpt2, 300).pre == "gpt-2"
    llama = backend_with(model={"ignore_merges": True}, pre_tokenizer=bpe._pre_tokenizer())
    assert describe(llama, 300).pre == "llama-bpe"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, "cuts words by None"),
        ({"model": {"byte_fallback": True}}, "SentencePiece"),
        ({"normalizer": normalizers.NFC()}, "normalises text"),
    ],
)
def test_other_tokenizers_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        describe(backend_with(**parts), 300)


# ---------------------------------------------------------------------- mistakes


def test_q8_0_names_the_tensor_it_cannot_group(tmp_path, tokenizer):
    config = PHI.replace(intermediate_size=40)
    source = saved(tmp_path / "m", config, tokenizer)
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_down\.weight.* rows of 40"):
        convert(source, tmp_path / "m.gguf", "q8_0")
    assert convert(source, tmp_path / "m.gguf", "f32").path.is_file()


def test_head_size_that_phi3_cannot_express(tmp_path, tokenizer):
    source = saved(tmp_path / "m", PHI.replace(head_dim=32), tokenizer)
    with pytest.raises(ValueError, match="4 heads of 32 dimensions"):
        convert(source, tmp_path / "m.gguf")


def test_misuse(folder, tmp_path):
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UsageError, match="exists already"):
        convert(folder, tmp_path / "there.gguf")
    with pytest.raises(UsageError, match="choose one of: f32, bf16, q8_0"):
        convert(folder, tmp_path / "a.gguf", "q4_0")
    with pytest.raises(UsageError, match="choose one of: gguf, safetensors"):
        convert_any(folder, "onnx", tmp_path / "a")
    with pytest.raises(UsageError, match="--dtype is no option of --to gguf"):
        convert_any(folder, "gguf", tmp_path / "a", dtype="bf16")
    with pytest.raises(UsageError, match="no such model folder"):
        convert_any(tmp_path / "none", "gguf", tmp_path / "a")
    assert not list(tmp_path.glob(".*partial"))


def test_missing_package_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"phiforge\[gguf\]"):
        convert(folder, tmp_path / "a.gguf")


def test_failure_leaves_no_file(folder, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("phiforge.model.gguf._write_tensors", broken)
    with pytest.raises(OSError, match="disk full"):
        convert(folder, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_of_another_layout(folder, tmp_path):
    made = convert_any(folder, "safetensors", tmp_path / "llama", dtype="fp32", layout="llama")
    ours, theirs = load(folder)[0], load(tmp_path / "llama")[0]
    assert made["num_bytes"] > 4 * PHI.num_parameters
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)


# ---------------------------------------------------------------------- llama.cpp itself


def greedy(model: Phi, token_ids: list[int], num_tokens: int) -> list[int]:
    """The plain loop without a cache."""
    ids = list(token_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(token_ids) :]


@needs_llamacpp
@pytest.mark.parametrize(
    ("config", "context"),
    [(PHI, 512), (PHI.replace(tie_word_embeddings=True, num_kv_heads=4), 512)]
    + [(MINI, 256), (MINI, 512)],
    ids=["phi", "tied", "longrope-short", "longrope-long"],
)
def test_llamacpp_gives_the_same_greedy_tokens(tmp_path, tokenizer, config, context):
    source = saved(tmp_path / "m", config, tokenizer)
    model, _ = load(source)
    model.set_max_length(context)
    file = convert(source, tmp_path / "m.gguf", "f32").path
    with LlamaCpp(file, context) as llama:
        for text in TEXTS[:4]:
            prompt = tokenizer.encode_chat([{"role": "user", "content": text}], True)
            assert llama.greedy(prompt, 40) == greedy(model, prompt, 40)


@needs_llamacpp
@pytest.mark.parametrize("type", ["bf16", "q8_0"])
def test_llamacpp_runs_the_other_types(folder, tmp_path, type):
    """Their products are rounded otherwise, so tokens may part ways: the first one must agree."""
    model, tokenizer = load(folder)
    file = convert(folder, tmp_path / "m.gguf", type).path
    prompt = tokenizer.encode("Hello, world!")
    with LlamaCpp(file, 512) as llama:
        assert llama.greedy(prompt, 1) == greedy(model, prompt, 1)


@needs_llamacpp
def test_llamacpp_tokenises_the_same(folder, tmp_path):
    _, tokenizer = load(folder)
    file = convert(folder, tmp_path / "m.gguf", "q8_0").path
    with LlamaCpp(file, 512) as llama:
        for special in (False, True):
            expected = [tokenizer.encode(text, allow_special=special) for text in TEXTS]
            assert llama.tokenize(TEXTS, special) == expected


@needs_llamacpp
def test_llamacpp_uses_the_chat_template(folder, tmp_path):
    """Its answer to a chat is the greedy continuation of the prompt that we render."""
    model, tokenizer = load(folder)
    file = convert(folder, tmp_path / "m.gguf", "f32").path
    chat = [{"role": "user", "content": "Hello"}]
    tokens = greedy(model, tokenizer.encode_chat(chat, True), 8)
    with LlamaCpp(file, 512) as llama:
        answer = llama.chat(chat)
    assert answer
    assert answer == tokenizer.decode(tokens).replace("\ufffd", "")  # it drops broken characters
