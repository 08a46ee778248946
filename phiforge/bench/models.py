"""The models and batches all contestants share: random weights of a fixed seed, written once.

`write_model(config, folder)` writes a Hugging Face folder, `write_gguf(folder, file, kind)` the
same weights for llama.cpp, `write_batches(path, ...)` a training run's tokens as .npz.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phiforge.model import huggingface
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer, train_tokenizer
from phiforge.train.batch import pack_sequences

SEED = 0
_BASE_VOCABULARY = 300  # bytes, the names of roles and some merges: enough for any text


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """A tokenizer with `vocab_size` rows, of which it uses few: no scenario reads text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lacks merges, and says so
        small = train_tokenizer(["measured side by side"], _BASE_VOCABULARY, whole_numbers_below=1)
    return Tokenizer(
        small.backend,
        eos=small.eos,
        eod=small.eod,
        pad=small.pad,
        bos=small.bos,
        vocab_size=vocab_size,
    )


def write_model(config: PhiConfig, folder: Path, dtype: str = "float32") -> None:
    """A model folder with the configuration's shape and random weights of SEED."""
    model = Phi(config).initialize(torch.Generator().manual_seed(SEED))
    huggingface.save(model, tokenizer_of(config.vocab_size), folder, dtype=dtype)


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """The folder's weights as GGUF of a kind (f32, bf16, q8_0), by the command users have."""
    command = [sys.executable, "-m", "phiforge", "convert", str(folder), "--to", "gguf"]
    command += ["--type", kind, "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


def random_prompts(vocab_size: int, num: int, length: int, seed: int) -> list[list[int]]:
    """`num` prompts of `length` token ids, drawn evenly from the vocabulary."""
    rng = np.random.default_rng([SEED, seed])
    return rng.integers(0, vocab_size, (num, length)).tolist()


def path_prefixes(vocab_size: int, num: int, length: int, seed: int) -> list[list[int]]:
    """`num` prefixes of one path of `length` tokens, evenly spaced, the whole path the last."""
    (path,) = random_prompts(vocab_size, 1, length, seed)
    return [path[: length * (i + 1) // num] for i in range(num)]


def write_batches(
    path: Path,
    vocab_size: int,
    num_batches: int,
    rows: int,
    context: int,
    document_tokens: tuple[int, int] | None,
) -> None:
    """Training batches: random tokens, rows full of documents of random lengths (inclusive bounds
    in tokens), or one document a row with None.

    Arrays token_ids, targets, documents, positions, each [batch, row, token].
    """
    rng = np.random.default_rng(SEED)
    batches = [_batch(rng, vocab_size, rows, context, document_tokens) for _ in range(num_batches)]
    names = ("token_ids", "targets", "documents", "positions")
    arrays: dict[str, Any] = {n: np.stack([b[i] for b in batches]) for i, n in enumerate(names)}
    np.savez(path, **arrays)


def _batch(
    rng: np.random.Generator,
    vocab_size: int,
    rows: int,
    context: int,
    document_tokens: tuple[int, int] | None,
) -> tuple[np.ndarray, ...]:
    sequences, placed = [], []
    for _ in range(rows):
        lengths = _lengths(rng, context, document_tokens)
        placed.append(list(range(len(sequences), len(sequences) + len(lengths))))
        for length in lengths:
            sequences.append((rng.integers(0, vocab_size, length).tolist(), [1] * length))
    packed = pack_sequences(sequences, placed, context, pad_id=0)
    tensors = (packed.token_ids_bt, packed.targets_bt, packed.documents_bt, packed.positions_bt)
    return tuple(tensor.numpy() for tensor in tensors)


def _lengths(
    rng: np.random.Generator, context: int, document_tokens: tuple[int, int] | None
) -> list[int]:
    if document_tokens is None:
        return [context]
    least, most = document_tokens
    lengths: list[int] = []
    while (left := context - sum(lengths)) > 0:
        length = int(rng.integers(least, most + 1))
        lengths.append(left if left - length < least else length)
    return lengths
