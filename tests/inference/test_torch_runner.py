"""torch's kernels: quantised products, rows in groups, decode passes as a graph would run them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_loop import CONFIG, Letters, make_model, plain_hidden

from phiforge.inference.engine import Engine, attention, graphs, products
from phiforge.inference.engine.forward import TorchRunner
from phiforge.inference.engine.graphs import _padded
from phiforge.inference.engine.runner import Pass
from phiforge.inference.engine.weights import from_model
from phiforge.model.quantize import dequantize, quantize

CPU = torch.device("cpu")


def runner(weights=None, exact=True, **changes) -> TorchRunner:
    made = TorchRunner(from_model(make_model(**changes), weights), exact)
    made.allocate(20)
    return made


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(48, 64), (300, 70)])
def test_products_are_those_of_the_dequantised_matrix(format, shape):
    generator = torch.Generator().manual_seed(0)
    matrix = quantize(torch.randn(shape, generator=generator), format)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    x_mk = torch.randn(33, shape[1], generator=generator).to(dtype)
    product = products.make_product(matrix, CPU, dtype, True)
    exact = F.linear(x_mk.double(), dequantize(matrix).double())
    error = (product(x_mk).double() - exact).norm() / exact.norm()
    assert error < (1e-6 if format == "fp32" else 4e-3)
    for m in (1, 2, 16, 17):  # no number of rows changes a row
        assert torch.equal(product(x_mk[:m]), product(x_mk)[:m])


def test_without_packed_kernels_matrices_are_turned_and_the_name_says_so(monkeypatch):
    assert products.describe("int8", CPU) == ("int8" if products.has_int8() else "int8 (as bf16)")
    monkeypatch.setattr(products, "has_int8", lambda: False)
    monkeypatch.setattr(products, "has_int4", lambda: False)
    assert products.describe("int4", CPU) == "int4 (as bf16)"
    for format in ("int8", "int4"):
        assert runner(format).name == f"torch {format} (as bf16)"
        matrix = quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), format)
        product = products.make_product(matrix, CPU, torch.bfloat16, True)
        x_mk = torch.ones(2, 64, dtype=torch.bfloat16)
        expected = F.linear(x_mk, dequantize(matrix).bfloat16())
        torch.testing.assert_close(product(x_mk), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_formats_keep_the_engines_promises(weights):
    model = make_model()
    prompts = [tuple(range(30, 100)), (5, 6), (7,)]
    found = [
        Engine(model, Letters(), rows=rows, weights=weights, kernels="torch").generate(
            prompts, n=2, max_tokens=8, logprobs=True
        )
        for rows in (1, 9)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("window", [None, 20])
def test_groups_within_bounds_are_the_whole(window, monkeypatch):
    whole = runner(sliding_window=window)
    row = [3 + i % 200 for i in range(150)]
    expected = plain_hidden(whole, row)
    monkeypatch.setattr(attention, "_SCORES", 5000)  # many pieces, of few rows each
    assert torch.equal(plain_hidden(whole, row), expected)


def decode_pass(lengths: list[int]) -> tuple[list[list[int]], Pass]:
    """Rows in blocks of their own, computed but for the last token; the pass that computes it."""
    rows = [[3 + (7 * i + j) % 200 for j in range(n)] for i, n in enumerate(lengths)]
    tables = np.arange(1, 1 + 3 * len(rows), dtype=np.int32).reshape(-1, 3)
    ids = np.array([row[-1] for row in rows], np.int32)
    positions = np.array([len(row) - 1 for row in rows], np.int32)
    return rows, Pass(ids, positions, np.arange(len(rows) + 1, dtype=np.int32), tables)


@pytest.mark.parametrize("exact", [True, False])
def test_a_graphs_padding_changes_nothing(exact):
    mine = runner(exact=exact)
    rows, batch = decode_pass([2, 64, 65, 130, 9])
    for row, table in zip(rows, batch.tables_bj, strict=True):
        n = len(row) - 1
        ids, positions = np.array(row[:-1], np.int32), np.arange(n, dtype=np.int32)
        mine.forward(Pass(ids, positions, np.array([0, n], np.int32), table[None].copy()))
    plain = mine.forward(batch)
    padded = [torch.from_numpy(array) for array in _padded(batch, (8, 4), mine.num_blocks)]
    with torch.inference_mode():
        x_bd = mine._decode(*padded)[:5]
    torch.testing.assert_close(x_bd, plain, atol=0 if exact else 1e-5, rtol=0 if exact else 1e-5)


def test_torchs_own_attention_says_the_same():
    """What CUDA runs, on this CPU."""
    generator = torch.Generator().manual_seed(0)
    q_bthe = torch.randn(3, 5, 4, 12, generator=generator)
    keys, values = (torch.randn(2, 6 * 64, 12, generator=generator) for _ in range(2))
    hidden = attention._hidden(torch.arange(90, 105).view(3, 5), 128, CONFIG)
    blocks = attention._all_heads(torch.tensor([[1, 2], [3, 4], [5, 0]]), CONFIG, 6)
    group = attention.Group(torch.zeros(3, 5), None, None, blocks, hidden)
    cached = attention.Cached(keys, values)
    fused = attention._fused(q_bthe, cached, group, False)
    spelled = attention._spelled_out(q_bthe, cached, group, True)
    torch.testing.assert_close(fused, spelled, atol=1e-5, rtol=1e-5)


class _Replay:
    """In place of a CUDA graph: runs the same pass over the same fixed tensors."""

    def __init__(self, decode, *tensors):
        self._decode, self._tensors = decode, tensors
        self.x = decode(*tensors)

    def replay(self):
        self.x.copy_(self._decode(*self._tensors))


def test_engine_over_graphs_and_torchs_attention_says_the_same(monkeypatch):
    """The passes of a CUDA device, run on this CPU with the capture replaced."""

    def capture(self, shape, padding_block, device):
        tensors = [torch.zeros(shape[0], dtype=torch.int64) for _ in range(2)]
        tensors.append(torch.full(shape, padding_block))
        graph = _Replay(self._decode, *tensors)
        return graphs._Captured(graph, *tensors, graph.x)

    model = make_model()
    prompts = [tuple(range(30, 100)), (5,), (6, 7)]
    settings = {"n": 5, "max_tokens": 60}
    expected = Engine(model, Letters(), kernels="torch", mode="fast").generate(prompts, **settings)
    monkeypatch.setattr(graphs.DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(attention, "_spelled_out", attention._fused)
    mine = Engine(model, Letters(), kernels="torch", mode="fast")
    mine.generate([(9,)], max_tokens=1)
    made = mine._scheduler.runner
    made._graphs = graphs.DecodeGraphs(made._decode)
    found = mine.generate(prompts, **settings)
    pairs = [
        (a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(a.token_ids == b.token_ids for a, b in pairs) > 12  # a rounding may turn a draw
    assert made._graphs._captured
