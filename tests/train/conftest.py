"""Fixtures of the training tests: one thread, a scratch stage folder."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phiforge.core.config import Exec
from phiforge.core.store import StageDir
from phiforge.model.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., StageDir]:
    """Make (or reopen) a scratch stage folder by name."""

    def make(name: str = "stage", **exec: object) -> StageDir:
        settings = {"device": "cpu", "threads": 1, "compile": "off", **exec}
        return StageDir.scratch(tmp_path / name, Exec(**settings))

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 400 rows."""
    texts = ["Tom has 12 apples. Then buys 7.", "12+7=19", "Answer: 19"] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(texts, 400)
