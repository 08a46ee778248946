"""Each training kernel against fp32 autograd of the plain formula: odd sizes, bf16 and fp32.

Run `pytest tests/model/test_kernels.py`. It compiles the kernels where a compiler is found, also
without instructions written by hand; it writes nothing else.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.model import kernels as native
from phiforge.model.kernels import Heads, Kernels, TensorTable
from phiforge.model.phi import causal_mask
from phiforge.model.rope import rope_table, rotate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["auto", "generic"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setenv("PHIFORGE_NATIVE", request.param)
    found = native.load()
    if found is None:
        pytest.skip(native.unavailable())
    return found


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """fp32: to rounding; bf16: relative to the whole tensor, whose numbers are rounded once."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < (2e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(5, 37), (1, 16), (9, 130)])
def test_norm(kernels: Kernels, dtype: torch.dtype, n: int, d: int) -> None:
    before, delta = random(n, d, dtype=dtype), random(n, d, seed=1, dtype=dtype)
    weight = random(d, seed=2)
    x, out, again = (torch.empty(n, d, dtype=dtype) for _ in range(3))
    scale = torch.empty(n)
    kernels.norm(x, weight, 1e-5, out, scale, add=(before, delta))
    assert torch.equal(x, before + delta)
    leaf, leaf_weight = x.float().requires_grad_(), weight.clone().requires_grad_()
    expected = F.rms_norm(leaf, (d,), leaf_weight, 1e-5)
    assert_near(out, expected.detach(), dtype)
    d_out, d_skip = random(n, d, seed=3, dtype=dtype), random(n, d, seed=4, dtype=dtype)
    expected.backward(d_out.float())
    d_x, d_weight = torch.empty_like(x), torch.ones(d)
    kernels.norm_backward(x, weight, scale, d_out, d_skip, d_x, again, d_weight)
    assert_near(d_x, leaf.grad + d_skip.float(), dtype)
    assert_near(d_weight, leaf_weight.grad + 1, dtype)
    assert torch.equal(again, out)
    kernels.norm_backward(x, weight, scale, d_out, None, d_x, again, d_weight)
    assert_near(d_x, leaf.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [3, 8])
def test_rope(kernels: Kernels, dtype: torch.dtype, r: int) -> None:
    heads = Heads(num_heads=3, num_kv_heads=1, head_size=16, window=None)
    qkv = random(7, heads.row_size, dtype=dtype)
    cos, sin = rope_table(torch.linspace(1, 0.1, r), torch.arange(7)[None], 1.1)
    tables = (cos.view(7, r), sin.view(7, r))
    turned = qkv.clone()
    kernels.rope(turned, tables, torch.arange(7), heads)
    expected = rotate(qkv[:, :64].reshape(1, 7, 4, 16), cos, sin).reshape(7, 64)
    assert_near(turned[:, :64], expected.float(), dtype)
    assert torch.equal(turned[:, 64:], qkv[:, 64:])
    order = torch.arange(6, -1, -1)
    mixed = tuple(table[order] for table in tables)
    kernels.rope(turned, mixed, order, heads, back=True)
    square = torch.tensor(1.1**2)
    rest = torch.cat([qkv[:, :64].view(7, 4, 16)[..., : 2 * r].flatten(1)])
    assert_near(turned[:, :64].view(7, 4, 16)[..., : 2 * r].flatten(1), rest * square, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [5, 48, 67])
def test_swiglu(kernels: Kernels, dtype: torch.dtype, f: int) -> None:
    gate_up, d_out = random(6, 2 * f, dtype=dtype) * 4, random(6, f, seed=1, dtype=dtype)
    out, again = torch.empty(6, f, dtype=dtype), torch.empty(6, f, dtype=dtype)
    kernels.swiglu(gate_up, out)
    leaf = gate_up.float().requires_grad_()
    expected = F.silu(leaf[:, :f]) * leaf[:, f:]
    assert_near(out, expected.detach(), dtype)
    expected.backward(d_out.float())
    d_gate_up = torch.empty_like(gate_up)
    kernels.swiglu_backward(gate_up, d_out, d_gate_up, again)
    assert_near(d_gate_up, leaf.grad, dtype)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [3, 61, 1024])
def test_cross_entropy(kernels: Kernels, dtype: torch.dtype, v: int) -> None:
    logits = random(9, v, dtype=dtype) * 5
    logits[0, 1] = 300.0
    targets = torch.arange(9) % v
    scale = torch.linspace(-1, 2, 9)
    leaf = logits.float().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    loss = torch.empty(9)
    kernels.token_loss(logits, targets, loss)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.float(), leaf.detach())
    (expected * scale).sum().backward()
    errors, again = logits.clone(), torch.empty(9)
    kernels.cross_entropy(errors, targets, again, scale)
    assert torch.equal(loss, again)
    if dtype == torch.float32:  # p - 1 loses digits where p is near 1
        torch.testing.assert_close(errors, leaf.grad, rtol=1e-5, atol=2e-6)
    else:
        assert_near(errors, leaf.grad, dtype)
    kernels.cross_entropy(logits, targets, again)
    torch.testing.assert_close(logits[8] * scale[8], errors[8], rtol=1e-2, atol=1e-6)


def test_not_a_number_is_passed_on(kernels: Kernels) -> None:
    for dtype in DTYPES:
        logits, loss = random(2, 40, dtype=dtype), torch.empty(2)
        logits[1, 7] = float("nan")
        kernels.cross_entropy(logits, torch.tensor([1, 2]), loss)
        assert torch.isfinite(loss[0])
        assert torch.isnan(loss[1])
        x, scale = torch.full((1, 20), float("nan"), dtype=dtype), torch.empty(1)
        out = torch.empty_like(x)
        kernels.norm(x, torch.ones(20), 1e-5, out, scale)
        assert torch.isnan(out).all()
    assert torch.isnan(torch.tensor(kernels.sum_of_squares(TensorTable([logits.float()]))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(kernels: Kernels, dtype: torch.dtype) -> None:
    table, ids = random(11, 19), torch.tensor([3, 3, 10, 0, 3])
    out = torch.empty(5, 19, dtype=dtype)
    kernels.embed(table, ids, out)
    assert torch.equal(out, table[ids].to(dtype))
    d_out, d_table = random(5, 19, seed=1, dtype=dtype), torch.ones(11, 19)
    kernels.embed_backward(d_out, ids, d_table)
    expected = torch.ones(11, 19).index_add(0, ids, d_out.float())
    torch.testing.assert_close(d_table, expected)
    for bad in (-1, 11):
        with pytest.raises(IndexError, match="outside 0 to 10"):
            kernels.embed(table, torch.tensor([bad]), out[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate(kernels: Kernels, dtype: torch.dtype) -> None:
    source, into = random(67, dtype=dtype), torch.full((67,), float("nan"))
    kernels.accumulate(source, into, add=False)
    kernels.accumulate(source, into, add=True)
    assert torch.equal(into, 2 * source.float())


def run_starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 9, 70])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(4, 2, 8), (3, 1, 20)])
def test_attention(
    kernels: Kernels,
    dtype: torch.dtype,
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
) -> None:
    heads = Heads(num_heads, num_kv_heads, head_size, window)
    lengths = [1, 150, 64, 7, 33]
    n = sum(lengths)
    qkv = random(n, heads.row_size, dtype=dtype)
    starts = run_starts(lengths)
    out, log_sum = torch.empty(n, num_heads * head_size, dtype=dtype), torch.empty(n, num_heads)
    kernels.attention(qkv, starts, heads, out, log_sum)

    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    mask = causal_mask(n, documents, window)[:, None]
    leaf = qkv.float().requires_grad_()
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    parts = (x.view(1, n, -1, head_size).transpose(1, 2) for x in leaf.split(sizes, dim=1))
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    expected = expected.transpose(1, 2).reshape(n, -1)
    assert_near(out, expected.detach(), dtype)

    d_out = random(n, num_heads * head_size, seed=1, dtype=dtype)
    expected.backward(d_out.float())
    d_qkv = torch.full_like(qkv, float("nan"))
    kernels.attention_backward(qkv, starts, heads, out, log_sum, d_out, d_qkv)
    for found, true in zip(d_qkv.split(sizes, 1), leaf.grad.split(sizes, 1), strict=True):
        if true.norm() > 1e-3:  # one key to look at: no gradient but that of its value
            assert_near(found, true, dtype)


def test_find_runs(kernels: Kernels) -> None:
    documents = torch.tensor(
        [[0, 0, 1, 1, 1, -1], [-1] * 6, [1, 1, 1, -1, 0, -1]], dtype=torch.int32
    )
    kept, starts = kernels.find_runs(documents, 1)
    assert kept.tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 16]
    assert starts.tolist() == [0, 2, 5, 8, 9]
    kept, starts = kernels.find_runs(documents, 4)
    assert kept.tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 16, 5, 6, 7]
    assert starts.tolist() == [0, 2, 5, 8, 9, 12]
    assert len(kernels.find_runs(documents, 128)[0]) == 18
    documents[0, 5] = 0
    assert kernels.find_runs(documents, 1) is None


@pytest.mark.parametrize("shadow_dtype", DTYPES)
def test_adamw(kernels: Kernels, shadow_dtype: torch.dtype) -> None:
    shapes = [(3, 5), (70,), (20_000,)]
    ours, theirs = ([random(*s, seed=i) for i, s in enumerate(shapes)] for _ in range(2))
    decays = [0.1, 0.0, 0.3]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip(theirs, decays, strict=True)]
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8}
    optimizer = torch.optim.AdamW(groups, **settings)
    means, squares = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    shadows = [torch.empty_like(p, dtype=shadow_dtype) for p in ours]
    shadows[1] = None
    for step in range(1, 4):
        gradients = [random(*s, seed=10 * step + i) for i, s in enumerate(shapes)]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g * 0.5
        optimizer.step()
        tables = [TensorTable(x) for x in (ours, gradients, means, squares, shadows)]
        kernels.adamw(*tables, decays, shadow_dtype=shadow_dtype, clip=0.5, step=step, **settings)
        total = sum(g.double().square().sum() for g in gradients)
        assert kernels.sum_of_squares(tables[1]) == pytest.approx(float(total), rel=1e-6)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(shadows[2], ours[2].to(shadow_dtype))


def test_threads_change_no_bit_of_sums_over_tensors(kernels: Kernels) -> None:
    table = TensorTable([random(100_000), random(7)])
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.add(kernels.sum_of_squares(table))
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)
