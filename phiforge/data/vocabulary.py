"""The tokenizer stage: train a byte-level BPE on the run's own text, or adopt a finished one.

Run as stage `tokenizer`, or call `run(TokenizerConfig(vocab_size=4096), {"curate": …}, out)`.
Writes a Hugging Face tokenizer folder: tokenizer.json, tokenizer_config.json and their companions.
"""

import hashlib
import heapq
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, model_validator

from phiforge.core.config import StageConfig
from phiforge.core.records import Chat, Document, read_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.model.tokenizer import Tokenizer, train_tokenizer

VERSION = 1


class TokenizerConfig(StageConfig):
    """How to come by a tokenizer: train one of `vocab_size` rows, or name a finished one."""

    vocab_size: int = Field(default=4096, ge=272, description="Rows, special tokens included.")
    whole_numbers_below: int = Field(
        default=100, ge=1, le=1000, description="Every number below this is one token."
    )
    num_dummies: int = Field(default=8, ge=1, description="Spare special tokens; one pads.")
    max_characters: int = Field(
        default=100_000_000,
        ge=1,
        description="Train on at most so many characters, a sample of documents by id.",
    )
    folder: Path | None = Field(
        default=None, description="Adopt this Hugging Face tokenizer folder instead of training."
    )
    rank_file: Path | None = Field(
        default=None, description="Build Phi-4's own tokenizer from this cl100k_base rank file."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "TokenizerConfig":
        if self.folder is not None and self.rank_file is not None:
            raise ValueError("folder and rank_file are both given; give one")
        trained = ("max_characters", "num_dummies", "vocab_size", "whole_numbers_below")
        # Defaults written out are fine: a run's recipe.yaml has every field.
        fields = type(self).model_fields
        given = [name for name in trained if getattr(self, name) != fields[name].default]
        if (self.folder or self.rank_file) and given:
            raise ValueError(
                f"{', '.join(given)}: has no effect on a finished tokenizer; remove it, or "
                "folder / rank_file"
            )
        return self


def run(config: TokenizerConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Make the tokenizer folder. Raises ValueError when there is no text to train on."""
    num_characters = 0
    if config.folder is not None:
        tokenizer = Tokenizer.load(config.folder)
    elif config.rank_file is not None:
        tokenizer = Tokenizer.from_tiktoken(config.rank_file)
    else:
        texts = _sample(list(_texts(inputs)), config)
        if not texts:
            raise ValueError(
                "tokenizer: no text to train on; run curate or synthesize before, or give folder"
            )
        num_characters = sum(map(len, texts))
        tokenizer = train_tokenizer(
            texts,
            config.vocab_size,
            whole_numbers_below=config.whole_numbers_below,
            num_dummies=config.num_dummies,
        )
    tokenizer.save(out.path)
    out.note(f"{tokenizer.vocab_size:,} rows, trained on {num_characters:,} characters")
    return {
        "vocab_size": tokenizer.vocab_size,
        "trained_characters": num_characters,
        "eos_id": tokenizer.eos_id,
        "eod_id": tokenizer.eod_id,
        "pad_id": tokenizer.pad_id,
    }


def _texts(inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(id, text) of every training document and chat; held-out documents stay unseen."""
    for stage in ("curate", "synthesize"):
        for name in ("documents.jsonl", "long_documents.jsonl"):
            path = inputs[stage] / name if stage in inputs else None
            if path is not None and path.is_file():
                for document in read_records(path, Document):
                    if document.metadata.get("split") != "validation":
                        yield document.id, document.text
    if "synthesize" in inputs and (path := inputs["synthesize"] / "chats.jsonl").is_file():
        for chat in read_records(path, Chat):
            yield chat.id, "\n".join(message["content"] for message in chat.messages)


def _sample(texts: list[tuple[str, str]], config: TokenizerConfig) -> list[str]:
    """At most `max_characters` of whole documents, chosen by a hash of their ids."""
    if sum(len(text) for _, text in texts) <= config.max_characters:
        return [text for _, text in texts]

    def rank(at: int) -> bytes:
        return hashlib.blake2b(f"{config.seed}\0{texts[at][0]}".encode(), digest_size=8).digest()

    order = [(rank(at), at) for at in range(len(texts))]
    heapq.heapify(order)
    chosen, room = [], config.max_characters
    while order and room > 0:
        _, at = heapq.heappop(order)
        chosen.append(at)
        room -= len(texts[at][1])
    return [texts[at][1] for at in sorted(chosen)]
