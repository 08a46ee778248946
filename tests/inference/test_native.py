"""The native decoder: right against torch on the same weights, and the same bits however it is cut.

Every case runs on two builds: with this machine's instructions, and the generic one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from phiforge.core.native import build
from phiforge.inference.engine import sample
from phiforge.inference.engine.native import NativeRunner
from phiforge.inference.engine.runner import Pass, make_runner
from phiforge.inference.engine.weights import Weights, from_model
from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.phi import Phi
from phiforge.model.quantize import FORMATS, Format, dequantize

BLOCKS = 24
LENGTHS = (1, 7, 64, 65, 130, 3, 200)
BASE = PhiConfig(
    vocab_size=517,
    hidden_size=48,
    intermediate_size=77,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=18,
    max_position_embeddings=512,
    initializer_range=0.2,
)
CONFIGS = {
    "odd": BASE,
    "tied": BASE.replace(hidden_size=37, head_dim=36, tie_word_embeddings=True, num_kv_heads=1),
    "window": BASE.replace(hidden_size=64, head_dim=64, num_kv_heads=4, sliding_window=70),
    "partial": BASE.replace(head_dim=24, partial_rotary_factor=0.5, num_heads=8, num_kv_heads=1),
    "long-rope": BASE.replace(
        original_max_position_embeddings=128,
        rope_scaling=LongRope(
            short_factor=(1.0,) * 9, long_factor=tuple(1.0 + i / 3 for i in range(9))
        ),
    ),
}
# |got - want| / |want| over all logits: rounding of activations to bf16 is what is left.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.025, "int8": 0.025, "int4": 0.025}


@pytest.fixture(params=["auto", "generic"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which build runs; skipped where there is no compiler."""
    monkeypatch.setenv("PHIFORGE_NATIVE", request.param)
    if reason := build.unavailable("decoder"):
        pytest.skip(reason)
    return request.param


def make(config: PhiConfig, format: Format, seed: int = 0) -> tuple[NativeRunner, Weights]:
    model = Phi(config).initialize(torch.Generator().manual_seed(seed))
    weights = from_model(model, format)
    runner = NativeRunner(weights)
    runner.allocate(BLOCKS)
    return runner, weights


def dequantized(weights: Weights) -> Phi:
    """A torch model in fp32 with exactly the numbers that the kernels multiply with."""
    config = weights.config
    model = Phi(config)
    q, k = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    values = {"embedding.weight": weights.embedding, "norm.weight": weights.norm}
    if not config.tie_word_embeddings:
        values["lm_head.weight"] = dequantize(weights.lm_head)
    for index, layer in enumerate(weights.layers):
        query, key, value = dequantize(layer.query_key_value).split([q, k, k])
        gate, up = dequantize(layer.gate_up).chunk(2)
        parts = {
            "attention_norm": layer.attention_norm,
            "attention.query": query,
            "attention.key": key,
            "attention.value": value,
            "attention.output": dequantize(layer.output),
            "mlp_norm": layer.mlp_norm,
            "mlp.gate": gate,
            "mlp.up": up,
            "mlp.down": dequantize(layer.down),
        }
        values |= {f"layers.{index}.{name}.weight": part for name, part in parts.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def row_ids(config: PhiConfig, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)


Row = tuple[np.ndarray, int, Sequence[int]]  # new token ids, position of the first, its blocks


def batch(rows: Sequence[Row], width: int = 8) -> Pass:
    tables_bj = np.zeros((len(rows), width), np.int32)
    for index, (_, _, blocks) in enumerate(rows):
        tables_bj[index, : len(blocks)] = blocks
    positions = [np.arange(first, first + len(ids)) for ids, first, _ in rows]
    return Pass(
        token_ids_n=np.concatenate([ids for ids, _, _ in rows]).astype(np.int32),
        positions_n=np.concatenate(positions).astype(np.int32),
        row_starts=np.cumsum([0, *(len(ids) for ids, _, _ in rows)]).astype(np.int32),
        tables_bj=tables_bj,
    )


def tables(lengths: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    free = list(order)
    return [[free.pop() for _ in range(-(-length // 64))] for length in lengths]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_torchs(kernels: str, name: str, format: Format) -> None:
    config = CONFIGS[name]
    runner, weights = make(config, format)
    ids = row_ids(config, 150, 1)
    got = runner.logits(runner.forward(batch([(ids, 0, [5, 2, 9])])))
    with torch.no_grad():
        model = dequantized(weights)
        if weights.dtype == torch.bfloat16 and config.tie_word_embeddings and format != "bf16":
            # The table stays bf16 at the entrance; at the exit it is quantised like any matrix.
            x_td = model.hidden(torch.from_numpy(ids)[None].long())[0]
            want = x_td @ dequantize(weights.lm_head).T
        else:
            want = model(torch.from_numpy(ids)[None].long())[0]
    assert got.shape == (150, config.vocab_size)
    error = (got - want).norm() / want.norm()
    assert error < TOLERANCE[format], f"{runner.name}: {error}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["odd", "window", "tied"])
def test_same_bits_alone_batched_and_in_chunks(kernels: str, name: str, format: Format) -> None:
    config = CONFIGS[name]
    runner, _ = make(config, format)
    rows = [row_ids(config, length, seed) for seed, length in enumerate(LENGTHS)]
    straight = tables(LENGTHS, range(BLOCKS))
    permuted = tables(LENGTHS, np.random.default_rng(0).permutation(BLOCKS).tolist())
    alone = [
        runner.forward(batch([(ids, 0, blocks)]))
        for ids, blocks in zip(rows, straight, strict=True)
    ]
    runner.allocate(BLOCKS)
    together = batch([(ids, 0, blocks) for ids, blocks in zip(rows, permuted, strict=True)])
    x_nd = runner.forward(together)
    assert torch.equal(x_nd, torch.cat(alone))
    with threads(2):
        assert torch.equal(runner.forward(together), x_nd)
        logits_nv = runner.logits(x_nd)
    assert torch.equal(logits_nv, torch.cat([runner.logits(x_d[None]) for x_d in x_nd]))
    for size in (1, 7, 64):
        # The blocks are full of the last pass's numbers: what is stale must not be read.
        assert torch.equal(in_chunks(runner, rows, permuted, size), x_nd)


def in_chunks(
    runner: NativeRunner, rows: list[np.ndarray], blocks: list[list[int]], size: int
) -> Tensor:
    """All rows side by side, so many tokens of each at a time."""
    found: list[list[Tensor]] = [[] for _ in rows]
    for first in range(0, max(map(len, rows)), size):
        live = [index for index, ids in enumerate(rows) if first < len(ids)]
        parts = [rows[index][first : first + size] for index in live]
        x_nd = runner.forward(
            batch([(part, first, blocks[i]) for part, i in zip(parts, live, strict=True)])
        )
        for index, x_td in zip(live, x_nd.split([len(part) for part in parts]), strict=True):
            found[index].append(x_td)
    return torch.cat([torch.cat(parts) for parts in found])


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_number_of_rows(kernels: str, format: Format) -> None:
    config = BASE.replace(hidden_size=160, num_layers=1)
    runner, _ = make(config, format)
    runner.allocate(70)
    ids = row_ids(config, 70, 3)
    x_nd = torch.cat([runner.forward(batch([(ids[i : i + 1], 0, [i])])) for i in range(70)])
    logits_nv = runner.logits(x_nd)
    for count in range(1, 71):
        rows = [(ids[i : i + 1], 0, [i]) for i in range(count)]
        assert torch.equal(runner.forward(batch(rows)), x_nd[:count]), count
        assert torch.equal(runner.logits(x_nd[:count]), logits_nv[:count]), count


def test_damage_in_a_block_ends_with_its_row(kernels: str) -> None:
    """A block that another row left full of NaN gives the numbers of a clean one."""
    runner, _ = make(BASE, "bf16")
    ids = row_ids(BASE, 131, 4)
    clean = runner.forward(batch([(ids, 0, [1, 2, 3])]))
    for first in (1, 65, 131):  # rows that end at even and odd slots, in one pass or token by token
        runner._cache.fill_(float("nan"))
        assert torch.equal(runner.forward(batch([(ids[:first], 0, [1, 2, 3])])), clean[:first])
        rest = [
            runner.forward(batch([(ids[place : place + 1], place, [1, 2, 3])]))
            for place in range(first, 131)
        ]
        assert torch.equal(torch.cat([clean[:first], *rest]), clean)


def test_copied_block_continues(kernels: str) -> None:
    runner, _ = make(BASE, "bf16")
    ids = row_ids(BASE, 100, 5)
    whole = runner.forward(batch([(ids, 0, [1, 2])]))
    runner.copy_block(1, 7)
    runner.copy_block(2, 8)
    # The copy holds 100 tokens; a row that shares 70 of them goes on as if the rest were not there.
    assert torch.equal(runner.forward(batch([(ids[70:], 70, [7, 8])])), whole[70:])
    assert torch.equal(runner.forward(batch([(ids[99:], 99, [1, 2])])), whole[99:])


def test_wrong_passes_are_refused(kernels: str) -> None:
    runner, _ = make(BASE, "fp32")
    ids = row_ids(BASE, 3, 6)
    for wrong, rows in {
        "token_ids": [(ids + 517, 0, [1])],
        "positions": [(ids, 510, [1] * 8)],
        "tables": [(ids, 0, [BLOCKS])],
        "table_width": [(ids, 63, [1])],
    }.items():
        with pytest.raises(AssertionError, match=wrong):
            runner.forward(batch(rows, width=1 if wrong == "table_width" else 8))
    good = batch([(ids, 0, [1])])
    with pytest.raises(AssertionError, match="int32"):
        runner.forward(
            Pass(
                good.token_ids_n.astype(np.int64), good.positions_n, good.row_starts, good.tables_bj
            )
        )
    with pytest.raises(AssertionError, match="blocks"):
        runner.copy_block(0, BLOCKS)


def test_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    weights = from_model(Phi(BASE).initialize(torch.Generator().manual_seed(0)), "bf16")
    with pytest.raises(ValueError, match="PHIFORGE_NATIVE=off"):
        NativeRunner(weights)
    assert make_runner(weights, "exact", "auto").name.startswith("torch")


@pytest.mark.parametrize("vocab_size", [1, 5, 517, 1024])
def test_draws_are_torchs(kernels: str, vocab_size: int) -> None:
    runner, _ = make(BASE, "bf16")
    rng = np.random.default_rng(vocab_size)
    num_rows = 200
    logits_bv = torch.from_numpy(rng.normal(0, 4, (num_rows, vocab_size))).float()
    laws = sample.Laws.empty(num_rows)
    laws.temperature[:] = rng.choice([0.0, 0.7, 1.0, 2.0], num_rows)
    laws.min_p[:] = rng.choice([0.0, 0.05, 0.3], num_rows)
    laws.top_p[:] = rng.choice([0.8, 1.0], num_rows)
    laws.top_k[:] = rng.choice([0, 3], num_rows)
    uniforms_b = rng.random(num_rows)
    uniforms_b[:3] = [0.0, 1.0 - 2.0**-53, 0.5]
    ids_b, finite_b = runner.draw(logits_bv, laws, uniforms_b)
    wanted_b, _ = sample.draw(logits_bv, laws, uniforms_b)
    assert finite_b.all()
    assert torch.equal(ids_b, wanted_b)
    with threads(2):
        assert torch.equal(runner.draw(logits_bv, laws, uniforms_b)[0], ids_b)
    one = runner.draw(logits_bv[7:8], laws.take(np.array([7])), uniforms_b[7:8])
    assert torch.equal(one[0], ids_b[7:8])


def test_draws_keep_to_the_probabilities(kernels: str) -> None:
    runner, _ = make(BASE, "bf16")
    num_draws, v = 20_000, 70
    logits_v = torch.randn(v, generator=torch.Generator().manual_seed(1)) * 2
    laws = sample.Laws.empty(num_draws)
    laws.temperature[:], laws.top_p[:], laws.min_p[:] = 0.8, 1.0, 0.02
    uniforms_b = (np.arange(num_draws) + 0.5) / num_draws
    ids_b, _ = runner.draw(logits_v.expand(num_draws, v).contiguous(), laws, uniforms_b)
    p_v = torch.softmax(logits_v.double() / 0.8, dim=0)
    p_v = torch.where(p_v >= 0.02 * p_v.max(), p_v, 0.0)
    found_v = torch.bincount(ids_b, minlength=v) / num_draws
    assert (found_v - p_v / p_v.sum()).abs().max() < 2 / num_draws


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_told(kernels: str, temperature: float) -> None:
    runner, _ = make(BASE, "bf16")
    logits_bv = torch.zeros(6, 100)
    logits_bv[0, 50], logits_bv[1, 99], logits_bv[2, 3] = torch.nan, torch.inf, torch.nan
    logits_bv[3] = -torch.inf
    logits_bv[4, :99] = -torch.inf  # a mask that leaves one token is no damage
    laws = sample.Laws.empty(6)
    laws.temperature[:], laws.top_p[:] = temperature, 1.0
    ids_b, finite_b = runner.draw(logits_bv, laws, np.full(6, 0.3))
    assert finite_b.tolist() == [False, False, False, False, True, True]
    assert ids_b[4] == 99
