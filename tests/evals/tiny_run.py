"""Inputs of the evaluate stage in miniature: problems, a held-out shard, untrained models."""

from functools import cache
from pathlib import Path

import torch

from phiforge.core.records import Problem, write_records
from phiforge.data.shards import Packed, write_shard
from phiforge.model import huggingface
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer, train_tokenizer
from phiforge.synth.procedural import generate
from phiforge.synth.worksheets import entry

FAMILIES = ("stories", "ordering")
CONTEXT = 40
TEXTS = ("The first text is about tea. " * 30, "A second one, on rain and snow. " * 9, "Short.")


@cache
def tokenizer() -> Tokenizer:
    items = [item for name in FAMILIES for item in generate(name, 1, "train", 0, 30)]
    texts = [entry(item.question, item.worked) for item in items]
    return train_tokenizer([*texts, *TEXTS], 512)


def model(context: int, seed: int = 0) -> Phi:
    config = PhiConfig.preset(
        "nano",
        vocab_size=tokenizer().vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=context,
        eos_token_ids=tuple(sorted(tokenizer().stop_ids)),
        pad_token_id=tokenizer().pad_id,
    )
    return Phi(config).initialize(torch.Generator().manual_seed(seed))


def problems(split: str, count: int, bogus: int = 0) -> list[Problem]:
    found = []
    for name in FAMILIES:
        for index, item in enumerate(generate(name, 1, split, 0, count + bogus)):  # type: ignore[arg-type]
            is_bogus = index >= count
            facts = {"family": name, "variant": "bogus" if is_bogus else "answerable"}
            found.append(
                Problem(
                    id=f"{split}/{name}/{index}",
                    prompt=item.bogus_question or item.question if is_bogus else item.question,
                    answer=None if is_bogus else item.answer,
                    kind="refusal" if is_bogus else item.kind,
                    metadata=facts if is_bogus else {**facts, "worked": item.worked},
                )
            )
    return found


def make_inputs(folder: Path) -> dict[str, Path]:
    """synthesize, pack, pretrain, midtrain and sft folders with untrained models."""
    words = tokenizer()
    (folder / "synthesize").mkdir(parents=True)
    write_records(folder / "synthesize" / "problems_test.jsonl", problems("test", 4, 2))
    write_records(folder / "synthesize" / "problems_train.jsonl", problems("train", 4))
    meta = {"kind": "documents", "eod_id": words.eod_id, "pad_id": words.pad_id}
    packed = [
        Packed(str(i), [*words.encode(text), words.eod_id], None, len(text))
        for i, text in enumerate(TEXTS)
    ]
    for split in ("train", "validation"):
        shard = folder / "pack" / "docs"
        write_shard(shard if split == "train" else shard / split, packed, meta)
    for seed, (name, context) in enumerate(
        {"pretrain": CONTEXT, "midtrain": 512, "sft": 512}.items()
    ):
        huggingface.save(model(context, seed), words, folder / name / "model", dtype="float32")
    names = ("synthesize", "pack", "pretrain", "midtrain", "sft")
    return {name: folder / name for name in names}
