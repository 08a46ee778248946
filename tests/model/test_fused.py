"""The fused decoder: equal to the plain layers, forward and gradients, for every kind of model.

Run `pytest tests/model/test_fused.py`. It compiles the kernels where a compiler is found.
"""

import pytest
import torch
from test_phi import BASE, VARIANTS, build, tokens
from torch import Tensor

from phiforge.model import kernels as native
from phiforge.model.fused import fused
from phiforge.model.kernels import Kernels
from phiforge.model.phi import Phi, causal_mask


@pytest.fixture
def kernels() -> Kernels:
    found = native.load()
    if found is None:
        pytest.skip(native.unavailable())
    return found


def packed(num_rows: int, length: int) -> dict[str, Tensor]:
    """Two documents and some padding in each row, at other places in each."""
    documents = torch.zeros(num_rows, length, dtype=torch.int32)
    positions = torch.arange(length).repeat(num_rows, 1)
    for row in range(num_rows):
        cut = length // 3 + 3 * row
        documents[row, cut:] = 1
        positions[row, cut:] -= cut
    documents[:, -2:] = -1
    return {"documents_bt": documents, "positions_bt": positions}


def value_and_gradients(model: Phi, weights: Tensor, *batches: tuple) -> list[Tensor]:
    """Outputs of some passes (zeros at padding), and what they add to the gradients."""
    outputs = []
    for ids, packing in batches:
        padding = packing.get("documents_bt", torch.zeros_like(ids)) == -1
        out = model.hidden(ids, **packing).masked_fill(padding[..., None], 0.0)
        outputs.append(out)
        (out.float() * weights[: out.shape[0]]).sum().backward()
    return [*(out.detach().float() for out in outputs), *(p.grad for p in model.parameters())]


def with_gradients(model: Phi) -> Phi:
    """A tied or headless loss leaves the output matrix alone: its gradient is 0, not None."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_equals_the_plain_layers(kernels: Kernels, name: str) -> None:
    model = build(VARIANTS[name])
    weights = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(3))
    batches = [(tokens(3, 30), packed(3, 30)), (tokens(2, 30), {})]
    expected = value_and_gradients(with_gradients(model), weights, *batches)
    with fused(model, kernels):
        found = [x.clone() for x in value_and_gradients(model, weights, *batches)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()
    assert all(p.grad is None for p in model.parameters())


def test_bf16_is_as_near_as_the_plain_layers(kernels: Kernels) -> None:
    model = build(BASE)
    weights = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(3))
    batches = [(tokens(3, 30), packed(3, 30)), (tokens(2, 30), {})]
    exact = value_and_gradients(with_gradients(model), weights, *batches)
    model.compute_dtype = torch.bfloat16
    plain = value_and_gradients(with_gradients(model), weights, *batches)
    with fused(model, kernels):
        ours = [x.clone() for x in value_and_gradients(model, weights, *batches)]
    errors = [
        torch.stack([(x - true).norm() / true.norm() for x, true in pairs if true.norm()])
        for pairs in (zip(ours, exact, strict=True), zip(plain, exact, strict=True))
    ]
    assert errors[0].mean() < 1.05 * errors[1].mean()
    assert errors[0].max() < 1.2 * errors[1].max()


def test_gradients_add_up_until_cleared(kernels: Kernels) -> None:
    model, batch = build(BASE), (tokens(2, 20), packed(2, 20))
    weights = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(3))
    with fused(model, kernels) as decoder:
        once = [g.clone() for g in value_and_gradients(model, weights, batch)[1:]]
        twice = [g.clone() for g in value_and_gradients(model, weights, batch)[1:]]
        decoder.clear()
        again = [g.clone() for g in value_and_gradients(model, weights, batch)[1:]]
    for a, b, c in zip(once, twice, again, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(a, c)


def test_passes_may_interleave(kernels: Kernels) -> None:
    """Each pass has memory of its own until its backward pass; then it serves smaller ones too."""
    model = build(BASE)
    with fused(model, kernels) as decoder:
        first, second = model.hidden(tokens(2, 20)), model.hidden(tokens(1, 9, seed=2))
        (first.sum() * 2).backward()
        second.sum().backward()
        mixed = [p.grad.clone() for p in model.parameters()]
        assert len(decoder.free) == 2
        decoder.clear()
        (model.hidden(tokens(2, 20)).sum() * 2).backward()
        model.hidden(tokens(1, 9, seed=2)).sum().backward()
        for one, parameter in zip(mixed, model.parameters(), strict=True):
            assert torch.equal(one, parameter.grad)
        assert len(decoder.free) == 2
        out = model.hidden(tokens(1, 5)).sum()
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="runs once"):
            out.backward()


def test_no_gradient_without_need(kernels: Kernels) -> None:
    model = build(BASE)
    with torch.no_grad():
        expected = model(tokens(2, 20))
        with fused(model, kernels):
            found = model(tokens(2, 20))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_shadows_follow_a_refresh(kernels: Kernels) -> None:
    model = build(BASE)
    with fused(model, kernels) as decoder, torch.no_grad():
        before = model.hidden(tokens(1, 9))
        key = model.layers[0].attention.key.weight
        key.mul_(2)
        assert torch.equal(before, model.hidden(tokens(1, 9)))
        shadow = decoder.shadow(key)
        decoder.refresh()
        assert torch.equal(shadow, key)
        assert not torch.equal(before, model.hidden(tokens(1, 9)))
        assert decoder.shadow(model.norm.weight) is None


def test_what_kernels_cannot_do_takes_the_plain_layers(kernels: Kernels) -> None:
    model = build(BASE)
    ids, pieces = tokens(1, 12), torch.tensor([[0] * 4 + [1] * 4 + [0] * 4])
    masks = causal_mask(12, pieces)
    with torch.no_grad():
        expected = model.hidden(ids, documents_bt=pieces)
        with fused(model, kernels):
            torch.testing.assert_close(model.hidden(ids, documents_bt=pieces), expected)
            torch.testing.assert_close(model.hidden(ids, mask_bts=masks), expected)
            with pytest.raises(IndexError, match="outside 0 to 96"):
                model.hidden(torch.tensor([[97]]))


def test_padding_is_not_computed(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phiforge.model.fused._MULTIPLE", 1)
    model, ids, packing = build(BASE), tokens(3, 20), packed(3, 20)
    packing["documents_bt"][1] = -1
    with fused(model, kernels):
        out = model.hidden(ids, **packing)
        assert not out[packing["documents_bt"] == -1].any()
        packing["documents_bt"][:] = -1
        assert model.hidden(ids, **packing).shape == (3, 20, 32)


def test_positions_anywhere(kernels: Kernels) -> None:
    model, ids = build(BASE), tokens(2, 9)
    for offset in (3, 60, 1_000_000):
        positions = torch.arange(9).expand(2, -1) + offset
        with torch.no_grad():
            expected = model.hidden(ids, positions_bt=positions)
            with fused(model, kernels):
                found = model.hidden(ids, positions_bt=positions)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_longrope_length_may_change_in_between(kernels: Kernels) -> None:
    model, ids = build(VARIANTS["longrope"]), tokens(2, 9)
    with torch.no_grad(), fused(model, kernels):
        for length in (17, 16):
            model.set_max_length(length)
            plain = Phi.hidden(model, ids)
            torch.testing.assert_close(model.hidden(ids), plain, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(kernels: Kernels) -> None:
    model = build(BASE)
    model.compute_dtype = torch.bfloat16
    weights = torch.randn(3, 30, 32, generator=torch.Generator().manual_seed(3))
    results = []
    for _ in range(2):
        with fused(model, kernels):
            found = value_and_gradients(model, weights, (tokens(3, 30), packed(3, 30)))
            results.append([x.clone() for x in found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
