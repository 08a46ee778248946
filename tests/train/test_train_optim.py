"""Optimizer groups, schedules, clipping, guards, cost."""

import math
from itertools import pairwise

import pytest
import torch
from tiny_training import tiny_config, tiny_model

from phiforge.core.config import Exec
from phiforge.model.config import PhiConfig
from phiforge.train.cost import choose_compile, flops_per_token, matrix_parameters
from phiforge.train.guard import Guard, TrainingError
from phiforge.train.loop import TrainConfig
from phiforge.train.optim import OptimConfig, clip, lr_at, make_optimizer


def names_of(model: torch.nn.Module, parameters: list) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_groups(decay_embeddings: bool) -> None:
    model = tiny_model()
    optimizer = make_optimizer(
        model, OptimConfig(lr=1e-3, weight_decay=0.2, decay_embeddings=decay_embeddings)
    )
    decayed, plain = (names_of(model, group["params"]) for group in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert decayed | plain == {name for name, _ in model.named_parameters()}
    assert not decayed & plain
    assert {name for name in plain if "norm" not in name} == (
        set() if decay_embeddings else {"embedding.weight"}
    )
    assert "lm_head.weight" in decayed


def test_tied_embedding_decays() -> None:
    model = tiny_model(tie_word_embeddings=True)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    assert "embedding.weight" in names_of(model, optimizer.param_groups[0]["params"])


def test_linear_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="linear")
    rates = [lr_at(s, 14, config) for s in range(14)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx([1 - i / 10 for i in range(10)])


def test_wsd_schedule() -> None:
    config = OptimConfig(
        lr=2.0, warmup_steps=2, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.1
    )
    rates = [lr_at(s, 20, config) for s in range(20)]
    assert rates[2:13] == [2.0] * 11
    assert rates[-1] == pytest.approx(2 * (0.1 + 0.9 / 8))
    assert all(a > b for a, b in pairwise(rates[12:]))


def test_cosine_and_constant() -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert lr_at(0, 10, cosine) == pytest.approx(1.0)
    assert lr_at(5, 10, cosine) == pytest.approx(0.5)
    assert lr_at(9, 10, cosine) == pytest.approx(0.5 * (1 - math.cos(math.pi / 10)))
    assert lr_at(9, 10, OptimConfig(lr=1.0, schedule="constant")) == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "wsd"}, "decay_fraction"),
        ({"decay_fraction": 0.3}, "decay_fraction"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimConfig(lr=1.0, **settings)


def test_warmup_must_end() -> None:
    with pytest.raises(ValueError, match="warmup_steps"):
        TrainConfig(lr=1.0, steps=10, tokens_per_step=8, warmup_steps=10)


def test_clip_scales_to_the_norm() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip([a, b], 0.0).item() == pytest.approx(5.0)
    assert b.grad.item() == 4.0
    assert clip([a, b], 1.0).item() == pytest.approx(5.0)
    assert a.grad[0].item() == pytest.approx(0.6, abs=1e-5)


def calm_guard(max_skipped: int = 2) -> Guard:
    guard = Guard(sigma=6.0, window=64, max_skipped=max_skipped)
    for step in range(40):
        assert guard.check(step, 2.0 + 0.01 * (step % 3), 1.0, "none")
    return guard


def test_spikes_are_skipped_then_stop() -> None:
    guard = calm_guard()
    assert not guard.check(40, 3.0, 1.0, "none")
    assert not guard.check(41, 2.0, 50.0, "none")
    assert guard.check(42, 2.0, 1.1, "none")
    assert (guard.skipped, guard.skipped_in_a_row) == (2, 0)
    for step in (43, 44):
        assert not guard.check(step, 9.0, 1.0, "none")
    with pytest.raises(TrainingError, match=r"step 45: 3 steps in a row.*HERE.*lower lr"):
        guard.check(45, 9.0, 1.0, "HERE")


def test_guard_off_and_state() -> None:
    guard = Guard(sigma=0.0, window=64, max_skipped=0)
    for step in range(50):
        assert guard.check(step, 10.0 ** (step % 5), 1.0, "none")
    other = Guard(sigma=0.0, window=64, max_skipped=0)
    other.restore(guard.state())
    assert other.state() == guard.state()


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (2.0, math.inf)])
def test_not_finite_stops(bad: tuple[float, float]) -> None:
    with pytest.raises(TrainingError, match=r"step 7: .*CHECKPOINT.*Lower lr"):
        Guard(0.0, 8, 0).check(7, *bad, "CHECKPOINT")


def test_flops_of_the_reference_shape() -> None:
    config = PhiConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=896,
        num_layers=8,
        num_heads=4,
        num_kv_heads=1,
        max_position_embeddings=512,
    )
    assert flops_per_token(config, 512) == pytest.approx(53.5e6, rel=2e-3)


def test_matrix_parameters_counts_the_head_once() -> None:
    model = tiny_model()
    counted = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    assert matrix_parameters(model.config) == counted - model.embedding.weight.numel()
    tied = tiny_config(tie_word_embeddings=True)
    assert matrix_parameters(tied) == matrix_parameters(model.config)


def test_compile_is_decided_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not choose_compile(Exec(), cpu, 1e20, fixed_shapes=True)[0]
    assert not choose_compile(Exec(), cuda, 1e20, fixed_shapes=False)[0]
    assert not choose_compile(Exec(), cuda, 1e12, fixed_shapes=True)[0]
    assert not choose_compile(Exec(compile="off"), cuda, 1e20, fixed_shapes=True)[0]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    assert choose_compile(Exec(), cuda, 1e20, fixed_shapes=True)[0]
    monkeypatch.setattr("shutil.which", lambda name: None)
    chosen, why = choose_compile(Exec(compile="on"), cpu, 1e20, fixed_shapes=True)
    assert not chosen
    assert "C++ compiler" in why
