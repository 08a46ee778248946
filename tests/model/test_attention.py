"""Block attention over packed rows: equal to PyTorch's masked attention, forward and backward.

Run `pytest tests/model/test_attention.py`. It writes nothing.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.model.attention import attention_bias, block_attention, query_blocks
from phiforge.model.phi import causal_mask


def packed_documents(length: int) -> Tensor:
    """Two rows cut at different places, the second ending in padding."""
    one = (torch.arange(length) >= length // 3).int()
    two = torch.arange(length).int() // 7
    two[-3:] = -1
    return torch.stack([one, two])


@pytest.mark.parametrize("length", [5, 64, 100])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_masked_attention(length: int, window: int | None, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, heads, 8, generator=generator).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    mask_bts = causal_mask(length, packed_documents(length), window)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask_bts[:, None],
        enable_gqa=True,
    ).transpose(1, 2)
    found = block_attention(q, k, v, query_blocks(mask_bts, block_tokens=16))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_near_as_a_fused_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 96, heads, 16, generator=generator) for heads in (4, 2, 2)]
    mask_bts = causal_mask(96, packed_documents(96))
    weights = torch.randn(2, 96, 4, 16, generator=generator)

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in exact)
        if fused:
            bias = attention_bias(mask_bts, dtype)
            heads = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=True)
            out = out.transpose(1, 2)
        else:
            out = block_attention(q, k, v, query_blocks(mask_bts, 32))
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), (q, k, v))]

    truth = run(True, torch.float32)
    for ours, theirs, true in zip(
        run(False, torch.bfloat16), run(True, torch.bfloat16), truth, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        error, other = ((x.float() - true).norm() / true.norm() for x in (ours, theirs))
        assert error < 1.5 * other


def test_blocks_skip_other_documents() -> None:
    documents_bt = torch.arange(100)[None] // 10
    blocks = query_blocks(causal_mask(100, documents_bt), block_tokens=20)
    assert [(block.first, block.last) for block in blocks] == [
        (start, start + 20) for start in range(0, 100, 20)
    ]
    causal = query_blocks(causal_mask(100), block_tokens=40)
    assert [(b.start, b.end, b.first, b.last) for b in causal] == [
        (0, 40, 0, 40),
        (40, 80, 0, 80),
        (80, 100, 0, 100),
    ]
