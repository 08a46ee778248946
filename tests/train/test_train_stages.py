"""Stages end to end on a tiny pack: pretrain, midtrain, SFT; each resumes to the same bytes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from phiforge.data.loader import Loader
from phiforge.data.shards import Packed, write_shard
from phiforge.model import huggingface
from phiforge.train import sft
from phiforge.train.pretrain import (
    MidtrainConfig,
    PretrainConfig,
    derive_midtrain,
    model_folder,
    run_midtrain,
    run_pretrain,
)
from phiforge.train.validate import token_bytes

SHAPE = {
    "preset": "nano",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}
PRETRAIN = {
    "lr": 5e-3,
    "steps": 6,
    "tokens_per_step": 128,
    "warmup_steps": 2,
    "context": 32,
    "mixture": [{"source": "text", "share": 1.0}],
    "checkpoint_every": 2,
    "dtype": "fp32",
    "model": SHAPE,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer.save(folder / "tokenizer")
    pack = folder / "pack"

    def documents(count: int, repeat: int) -> list[Packed]:
        texts = [f"Tom has {n} apples. {n}+7={n + 7}. " * repeat for n in range(count)]
        return [
            Packed(str(i), [*tokenizer.encode(text), tokenizer.eod_id], None, len(text.encode()))
            for i, text in enumerate(texts)
        ]

    def chats(count: int) -> list[Packed]:
        rows = []
        for n in range(count):
            messages = [
                {"role": "user", "content": f"{n}+7?"},
                {"role": "assistant", "content": f"Answer: {n + 7}"},
            ]
            ids, mask = tokenizer.encode_chat_with_mask(messages)
            rows.append(Packed(str(n), ids, np.array(mask, np.uint8), 20))
        return rows

    meta = {"eod_id": tokenizer.eod_id, "pad_id": tokenizer.pad_id}
    write_shard(pack / "text", documents(40, 1), {"kind": "documents", **meta})
    write_shard(pack / "text" / "validation", documents(4, 1), {"kind": "documents", **meta})
    write_shard(pack / "long_documents", documents(12, 12), {"kind": "documents", **meta})
    write_shard(pack / "chats", chats(30), {"kind": "chats", **meta})
    return {"pack": pack, "tokenizer": folder / "tokenizer"}


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    batch = Loader.batch

    def interrupted(self: Loader, step: int):
        if step == at:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(Loader, "batch", interrupted)


def twice(function, config, inputs, stage, monkeypatch) -> tuple[dict, Path]:
    """Run a stage straight, and interrupted then resumed; the weights must be the same bytes."""
    metrics = function(config, inputs, stage("straight"))
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            function(config, inputs, stage("resumed"))
    function(config, inputs, stage("resumed"))
    a, b = (stage(n).path / "model" for n in ("straight", "resumed"))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    return metrics, a


def test_pretrain_midtrain_sft(inputs, stage, monkeypatch, tmp_path) -> None:
    with monkeypatch.context() as patch:
        metrics, first = twice(
            run_pretrain,
            PretrainConfig(**PRETRAIN),
            inputs,
            lambda n: stage(f"pretrain-{n}"),
            patch,
        )
    assert metrics["steps"] == 6
    assert metrics["tokens"] == 6 * 128
    assert 0 < metrics["bits_per_byte_text"] < 20
    assert metrics["bits_per_byte"] == metrics["bits_per_byte_text"]
    assert metrics["mixture"][0]["source"] == "text"
    assert metrics["loss"] < math.log(400)

    derived = derive_midtrain(PRETRAIN, {"steps": 4, "tokens_per_step": 256})
    config = MidtrainConfig(**derived)
    assert (config.context, config.lr, config.warmup_steps) == (128, 5e-4, 1)
    assert (config.long[0].min_tokens, config.long[0].upweight_from_tokens) == (65, 128)
    after = {**inputs, "pretrain": first.parent}
    with monkeypatch.context() as patch:
        metrics, second = twice(
            run_midtrain, config, after, lambda n: stage(f"midtrain-{n}"), patch
        )
    shares = {part["source"]: part["share"] for part in metrics["mixture"]}
    assert shares == pytest.approx({"long_documents": 0.3, "text": 0.7})
    shape = huggingface.load_config(second)
    assert (shape.max_position_embeddings, shape.rope_theta) == (128, 250_000.0)

    config = sft.SFTConfig(
        lr=1e-3, epochs=2, tokens_per_step=128, context=64, dtype="fp32", checkpoint_every=2
    )
    after = {**inputs, "midtrain": second.parent}
    with monkeypatch.context() as patch:
        metrics, third = twice(sft.run, config, after, lambda n: stage(f"sft-{n}"), patch)
    assert metrics["dropped_chats"] == 0
    assert metrics["steps"] >= 4
    assert huggingface.load_config(third).max_position_embeddings == 128


def test_bf16_weights_on_request(inputs, stage) -> None:
    out = stage()
    run_pretrain(PretrainConfig(**{**PRETRAIN, "save_dtype": "bf16", "steps": 3}), inputs, out)
    model = huggingface.load_model(out.path / "model")
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(values, values.bfloat16().float())


def test_sft_context_must_fit(inputs, stage) -> None:
    out = stage("base")
    run_pretrain(PretrainConfig(**{**PRETRAIN, "steps": 3}), inputs, out)
    config = sft.SFTConfig(tokens_per_step=128, context=64)
    with pytest.raises(ValueError, match=r"sft\.context is 64; .* at most 32"):
        sft.run(config, {**inputs, "pretrain": out.path}, stage())


def test_tokens_per_step_is_whole_rows() -> None:
    with pytest.raises(ValueError, match="multiple of context"):
        PretrainConfig(**{**PRETRAIN, "tokens_per_step": 130})


def test_derive_keeps_what_is_written() -> None:
    derived = derive_midtrain(PRETRAIN, {"steps": 3, "context": 96, "lr": 1e-4})
    assert (derived["context"], derived["lr"], derived["steps"]) == (96, 1e-4, 3)
    assert "model" not in derived


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file.*--rebuild pretrain"):
        model_folder({"pretrain": tmp_path}, "midtrain", "pretrain")
    with pytest.raises(ValueError, match="none of midtrain, pretrain"):
        model_folder({}, "midtrain", "pretrain")


def test_token_bytes_count_text_alone(tokenizer) -> None:
    text = "Tom has 12 äpples."
    ids = [*tokenizer.encode(text), tokenizer.eod_id, tokenizer.eos_id]
    assert token_bytes(tokenizer)[ids].sum().item() == len(text.encode())
