"""An independent check: greedy answers are those of `transformers` on the same weights."""

import pytest
import torch
from plain_loop import KERNELS, Letters, make_model

from phiforge.inference.engine import Engine
from phiforge.model.huggingface import save

PROMPTS = [tuple(range(30, 30 + k)) for k in (1, 7, 64, 90)] + [(200, 17, 5)]


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_answers_are_those_of_transformers(kernels, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(sliding_window=100)
    save(model, None, tmp_path / "model", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    mine = Engine(model, Letters(), rows=3, kernels=kernels)
    found = mine.generate(PROMPTS, max_tokens=40, temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        row = torch.tensor([prompt])
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        expected = theirs.generate(row, attention_mask=torch.ones_like(row), **settings)[
            0, len(prompt) :
        ]
        assert completion.token_ids == tuple(expected.tolist())
