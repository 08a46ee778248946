"""Tiny models and rows that the training tests share; imported by them, never run."""

import torch

from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.train.batch import Rows

VOCAB = 61


def tiny_config(**changes: object) -> PhiConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 64,
    }
    return PhiConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes: object) -> Phi:
    return Phi(tiny_config(**changes)).initialize(torch.Generator().manual_seed(seed))


def random_rows(num_rows: int = 4, context: int = 24, seed: int = 0, masked: bool = True) -> Rows:
    """Rows of two documents and some padding; about a third of the targets masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (num_rows, context + 1), generator=generator)
    cut = context // 2 + 3
    documents = torch.full((num_rows, context), -1, dtype=torch.int32)
    documents[:, :cut], documents[:, cut : context - 2] = 0, 1
    positions = torch.arange(context).repeat(num_rows, 1)
    positions[:, cut:] -= cut
    targets = ids[:, 1:].clone()
    targets[documents < 0] = -100
    if masked:
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    return Rows(ids[:, :-1].clone(), targets, documents, positions)
