"""Training with own kernels: the same as with torch, chosen once, resumed to the bit.

Run `pytest tests/train/test_train_kernels.py`. It compiles the kernels where a compiler is found.
"""

import pytest
import torch
from test_train_dpo import pivotal_pairs, policy_and_reference, reference_of, response_pairs
from test_train_loop import assert_same_bits, interrupted_at, run, weights
from tiny_training import random_rows, tiny_model

from phiforge.core.config import Exec
from phiforge.core.usage import UsageError
from phiforge.model import kernels as native
from phiforge.model.fused import fused
from phiforge.model.kernels import Kernels
from phiforge.train.cost import choose_kernels
from phiforge.train.dpo import preference_loss
from phiforge.train.optim import OptimConfig, make_optimizer
from phiforge.train.pairs import make_batch
from phiforge.train.pretrain import language_model_loss
from phiforge.train.update import FusedUpdate, TorchUpdate

CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> Kernels:
    found = native.load()
    if found is None:
        pytest.skip(native.unavailable())
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_updates_equal_torch(kernels: Kernels, tied: bool, max_norm: float) -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.2)
    found = []
    for own in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        optimizer = make_optimizer(model, config)

        def steps(update, model=model) -> list[float]:
            norms = []
            for step in range(4):
                language_model_loss(model, random_rows(seed=step)).total.div(60).backward()
                norms.append(update.clip(max_norm).item())
                update.step(1e-2 / (step + 1))
                update.clear()
            return norms

        if own:
            with fused(model, kernels) as decoder:
                norms = steps(FusedUpdate(optimizer, decoder))
        else:
            norms = steps(TorchUpdate(optimizer))
        moments = {
            f"{i} {k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()
        }
        found.append((norms, weights(model), moments))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_equals_torch(stage, kernels: Kernels, dtype: str) -> None:
    losses = []
    for choice in ("native", "torch"):
        _, metrics = run(stage(choice, kernels=choice), dtype=dtype)
        assert metrics["kernels"] == (kernels.name if choice == "native" else "torch")
        losses.append(metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumed_equals_straight(stage, kernels: Kernels, choice: str, dtype: str) -> None:
    straight, _ = run(stage("straight", kernels=choice), dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(stage("resumed", kernels=choice), interrupted_at(5), dtype=dtype)
    resumed, _ = run(stage("resumed"), dtype=dtype)  # auto: as before the checkpoint
    assert_same_bits(weights(straight), weights(resumed))


def test_no_compiler_trains_with_torch_and_says_so(stage, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    _, metrics = run(stage())
    assert metrics["kernels"] == "torch"
    assert "kernels: torch (no own kernels: PHIFORGE_NATIVE=off)" in capsys.readouterr().err


def test_generic_kernels_train(stage, kernels: Kernels, monkeypatch) -> None:
    _, expected = run(stage("auto"), dtype="bf16")
    monkeypatch.setenv("PHIFORGE_NATIVE", "generic")
    _, metrics = run(stage("generic"), dtype="bf16")
    assert metrics["kernels"] == "native generic"
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_another_choice_after_a_checkpoint_is_said(stage, kernels: Kernels, monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(stage(), interrupted_at(5))
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    run(stage())
    printed = capsys.readouterr().err
    assert f"bits may differ: kernels: {kernels.name} → torch" in printed


def test_choice() -> None:
    off = Exec(kernels="torch")
    assert choose_kernels(off, CPU, compiled=False) == (None, "exec.kernels is torch")
    found, why = choose_kernels(Exec(), CPU, compiled=True)
    assert found is None
    assert "compiled" in why
    assert choose_kernels(Exec(), torch.device("cuda"), compiled=False)[0] is None
    with pytest.raises(UsageError, match=r"exec.kernels is native.*compiled"):
        choose_kernels(Exec(kernels="native"), CPU, compiled=True)


def test_native_without_compiler_is_refused(stage, monkeypatch) -> None:
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    with pytest.raises(UsageError, match=r"native, .*PHIFORGE_NATIVE=off; set auto"):
        run(stage(kernels="native"))


@pytest.mark.parametrize("pairs", [response_pairs(), pivotal_pairs()], ids=["long", "single"])
def test_preference_gradients_equal_torch(kernels: Kernels, pairs) -> None:
    policy, start = policy_and_reference()
    part = make_batch(pairs, reference_of(start, pairs), 60)
    preference_loss(policy, part, "sigmoid", 0.1).total.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    with fused(policy, kernels):
        preference_loss(policy, part, "sigmoid", 0.1).total.backward()
        for name, parameter in policy.named_parameters():
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4, name
