"""The search on a real Phi model whose next-token law is a known chain, and the whole stage."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pivotal_world import FORK, NO, START, STOP, YES, ScriptedTokenizer, oracle, problems

from phiforge.core.records import Pair, Problem, read_records, write_records
from phiforge.core.store import StageDir
from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal.stage import PivotalConfig, run

torch = pytest.importorskip("torch")


def chain_model(law: Mapping[int, Sequence[tuple[int, float]]], vocab_size: int) -> Any:
    """A Phi that draws the next token from `law[last token]`.

    Attention and MLP add nothing, embeddings are one-hot, so after the norm the state is √d at the
    token's place and the head's columns are log-probabilities over √d.
    """
    from phiforge.model.config import PhiConfig
    from phiforge.model.phi import Phi

    size = math.ceil(vocab_size / 16) * 16
    config = PhiConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=16,
        num_layers=1,
        num_heads=size // 16,
        num_kv_heads=size // 16,
        max_position_embeddings=128,
        rms_norm_eps=1e-12,
    )
    model = Phi(config)
    head_vd = torch.full((vocab_size, size), -80.0)
    for last, choices in law.items():
        for token, share in choices:
            head_vd[token, last] = math.log(share)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.embedding.weight.copy_(torch.eye(vocab_size, size))
        assert model.lm_head is not None
        model.lm_head.weight.copy_(head_vd / math.sqrt(size))
    return model.eval()


def forked_engine(rows: int) -> Any:
    from phiforge.inference.engine import Engine

    law = {token: FORK.next(token) for token in [*FORK.law, YES, NO]}
    return Engine(chain_model(law, 128), ScriptedTokenizer(), rows=rows)


def searched(rows: int, count: int = 3) -> list[Any]:
    found = pivotal.search(
        forked_engine(rows),
        problems(count),
        oracle,
        method="paper",
        n_filter=32,
        n_rollouts=96,
        max_tokens=12,
        gap=0.15,
        band=(0.1, 0.9),
    )
    return [(q.status, q.root, q.paths, q.tokens, q.pairs, q.ledger) for q in found.questions()]


def test_estimates_of_a_real_engine_agree_with_the_closed_form() -> None:
    for status, _, paths, tokens, pairs, ledger in searched(64):
        assert status == "searched"
        assert tokens
        assert pairs
        assert all(prefix[-1:] != (STOP,) for prefix in ledger.rollouts)
        for path in paths:
            ids = [START, *path.token_ids]
            assert math.isclose(path.logprobs[0], math.log(0.5), abs_tol=1e-4)
            for i, estimate in enumerate(path.estimates[:-1]):
                if estimate is not None:
                    p = FORK.p(ids[i])
                    assert abs(estimate.p - p) <= 4.5 * math.sqrt(p * (1 - p) / estimate.n)


def test_results_do_not_depend_on_the_engines_rows() -> None:
    assert searched(24, 1) == searched(256, 1)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """A saved chat model that answers "Answer: 1" or "Answer: 2" evenly, and its problems."""
    from phiforge.model.huggingface import save
    from phiforge.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["Answer: 1", "Answer: 2", "What is it?"] * 20, vocab_size=380)
    opening = tokenizer.encode_chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
    stem, one, two = (tokenizer.encode(text) for text in ("Answer: ", "1", "2"))
    assert len({*stem, *one, *two, opening[-1]}) == len(stem) + 3
    law: dict[int, list[tuple[int, float]]] = {opening[-1]: [(stem[0], 1.0)]}
    law |= {a: [(b, 1.0)] for a, b in pairwise(stem)}
    law[stem[-1]] = [(one[0], 0.5), (two[0], 0.5)]
    law |= {token: [(tokenizer.eos_id, 1.0)] for token in (one[0], two[0])}
    save(chain_model(law, tokenizer.vocab_size), tokenizer, tmp_path / "sft/model", dtype="float32")
    asked = [
        Problem(
            id=f"p{i}",
            prompt="What is it?" * (i + 1),
            answer="1",
            kind="number",
            metadata={"family": "digits", "variant": "answerable"},
        )
        for i in range(5)
    ]
    write_records(tmp_path / "synthesize/problems_train.jsonl", asked)
    return {"sft": tmp_path / "sft", "synthesize": tmp_path / "synthesize"}


def test_the_stage_finds_the_digit_that_decides(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = PivotalConfig(
        method="paper", n_filter=32, n_rollouts=32, max_tokens=16, band=(0.1, 0.9)
    )
    out = StageDir.scratch(tmp_path / "pivotal")
    metrics = run(config, inputs, out)
    assert metrics["questions_in_band"] == metrics["pairs"] == 5
    assert metrics["pivotal_tokens"] == 10
    assert metrics["rollouts_unscored"] == 0
    for pair in read_records(out.path / "pairs.jsonl", Pair):
        assert (pair.chosen, pair.rejected) == ("1", "2")
        assert str(pair.prompt).endswith("<|im_sep|>Answer: ")
        assert pair.metadata["delta"] == 1.0
    for line in (out.path / "paths.jsonl").read_text().splitlines():
        path = json.loads(line)
        assert "".join(path["texts"]).startswith("Answer: ")
        assert path["p"][path["pivotal"][0] + 1] in (0.0, 1.0)
    with gzip.open(out.path / "rollouts.jsonl.gz", "rt") as file:
        assert sum(1 for _ in file) == metrics["prefixes_estimated"]
