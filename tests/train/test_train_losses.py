"""Losses: chunked equals plain, packed equals unpacked, preference losses equal TRL's."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny_training import VOCAB, random_rows, tiny_model

from phiforge.model import kernels as native
from phiforge.model.fused import fused
from phiforge.model.kernels import Kernels
from phiforge.model.phi import Phi
from phiforge.train import losses
from phiforge.train.batch import Rows, rows_step
from phiforge.train.losses import PairScores, cross_entropy_sum, head_weight, token_losses
from phiforge.train.pretrain import language_model_loss


def problem(num_tokens: int = 50, masked: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 16, generator=generator)
    weight = torch.randn(VOCAB, 16, generator=generator)
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
    if masked:
        targets[::3] = -100
    return x, weight, targets


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels | None:
    """Own kernels, and torch alone."""
    if request.param == "torch":
        return None
    if native.load() is None:
        pytest.skip(native.unavailable())
    return native.load()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunked_sum_equals_plain(
    masked: bool, chunk: int, kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda *_: chunk)
    x, weight, targets = problem(masked=masked)
    found = _value_and_gradients(
        lambda a, b: 0.37 * cross_entropy_sum(a, b, targets, kernels), x, weight
    )
    expected = _value_and_gradients(
        lambda a, b: 0.37 * F.cross_entropy(a @ b.t(), targets, reduction="sum"), x, weight
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_token_losses_equal_plain(
    chunk: int, kernels: Kernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda *_: chunk)
    x, weight, targets = problem()
    scale = torch.linspace(-1, 2, len(x))
    found = _value_and_gradients(
        lambda a, b: (token_losses(a, b, targets, kernels) * scale).sum(), x, weight
    )
    expected = _value_and_gradients(
        lambda a, b: (F.cross_entropy(a @ b.t(), targets, reduction="none") * scale).sum(),
        x,
        weight,
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_close_to_fp32(kernels: Kernels | None) -> None:
    x, weight, targets = problem()
    exact = cross_entropy_sum(x, weight, targets)
    rough = cross_entropy_sum(x.bfloat16(), weight, targets, kernels)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0.1)


def test_no_gradient_kept_without_need(kernels: Kernels | None) -> None:
    x, weight, targets = problem()
    assert not cross_entropy_sum(x, weight, targets, kernels).requires_grad


def test_no_target_no_loss(kernels: Kernels | None) -> None:
    x, weight, targets = problem()
    nothing = torch.full_like(targets, -100)
    for loss in (cross_entropy_sum, token_losses):
        found = _value_and_gradients(lambda a, b: loss(a, b, nothing, kernels).sum(), x, weight)  # noqa: B023
        assert all(not part.any() for part in found)


def test_gradients_are_used_once(kernels: Kernels | None) -> None:
    x, weight, targets = problem()
    total = cross_entropy_sum(x.requires_grad_(), weight, targets, kernels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


def test_memory_is_one_chunk() -> None:
    assert losses.chunk_tokens(100_352, torch.device("cpu")) == 512
    assert losses.chunk_tokens(2048, torch.device("cpu")) == 1024


def prepared(model: Phi, kernels: Kernels | None):
    """The model as the training loop has it, for the block."""
    return nullcontext() if kernels is None else fused(model, kernels)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_equals_logits_path(tied: bool, kernels: Kernels | None) -> None:
    model, rows = tiny_model(tie_word_embeddings=tied), random_rows()
    with prepared(model, kernels):
        total = language_model_loss(model, rows).total
        total.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(
        rows.token_ids_bt, positions_bt=rows.positions_bt, documents_bt=rows.documents_bt
    )
    plain = F.cross_entropy(logits.flatten(0, 1), rows.targets_bt.flatten(), reduction="sum")
    plain.backward()
    torch.testing.assert_close(total, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_equals_unpacked(kernels: Kernels | None) -> None:
    model, rows = tiny_model(), random_rows(num_rows=2)
    with prepared(model, kernels):
        packed = language_model_loss(model, rows).total
        single = torch.zeros(())
        for r in range(2):
            for document in (0, 1):
                at = rows.documents_bt[r] == document
                alone = Rows(
                    rows.token_ids_bt[r, at][None],
                    rows.targets_bt[r, at][None],
                    torch.zeros(1, int(at.sum()), dtype=torch.int32),
                    torch.arange(int(at.sum()))[None],
                )
                single = single + language_model_loss(model, alone).total
    torch.testing.assert_close(packed, single, rtol=1e-6, atol=1e-4)


def test_micro_batched_equals_whole(kernels: Kernels | None) -> None:
    gradients = []
    for micro_tokens in (24, 48, 10_000):
        model = tiny_model()
        step = rows_step(random_rows(), micro_tokens)
        with prepared(model, kernels):
            for part in step.parts:
                (language_model_loss(model, part).total / step.num_units).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(rows_step(random_rows(), 24).parts) == 4
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-7)


def test_head_weight_of_tied_model() -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert head_weight(model) is model.embedding.weight


# Worked out by hand for scores +1 over 8 tokens and -2 over 4; test_train_dpo.py compares with TRL.
@pytest.mark.parametrize(
    ("name", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, 0.554355),
        ("sigmoid", 0.1, 0.584355),
        ("hinge", 0.0, 0.7),
        ("ipo", 0.0, 19.140625),
        ("robust", 0.1, 0.516855),
        ("sigmoid_norm", 0.0, 0.662385),
        ("apo_zero", 0.0, 0.925187),
    ],
)
def test_preference_formulas(name: str, smoothing: float, expected: float) -> None:
    one = torch.ones(1)
    scores = PairScores(one, -2 * one, 8 * one, 4 * one)
    loss = losses.PREFERENCE_LOSSES[name](scores, 0.1, smoothing)
    assert loss.item() == pytest.approx(expected, abs=2e-6)


def _value_and_gradients(function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value.backward()
    return (value.detach(), *(leaf.grad for leaf in leaves))
