"""The arithmetic: spreads, paired ratios, agreement of tokens and losses, FLOPs, rooflines."""

import pytest

from phiforge.bench import figures, roofline
from phiforge.bench.engine_plan import nano_config, pts_config, small_100m_config
from phiforge.bench.figures import Spread
from phiforge.model.config import PhiConfig
from phiforge.train.cost import flops_per_token


def test_spread_and_ratio():
    assert figures.spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert figures.spread([1.0, 2.0]).median == 1.5
    assert str(Spread(1.0, 0.5, 2.0)) == "1.00 (0.50..2.00)"
    with pytest.raises(ValueError, match="no values"):
        figures.spread([])
    assert figures.ratio({0: 4.0, 1: 9.0, 3: 1.0}, {0: 2.0, 1: 3.0, 2: 5.0}) == Spread(2.5, 2, 3)
    assert figures.ratio({0: 1.0}, {1: 1.0}) is None


def test_agreement_counts_tokens_before_the_first_difference():
    assert figures.agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1.0
    assert figures.agreement([[1, 2], [3, 4]], [[1, 9], [9, 4]]) == 0.25
    assert figures.agreement([[1, 2], [3, 4]], [[1, 2]]) == 0.5
    assert figures.agreement([], []) == 1.0


def test_loss_difference():
    assert figures.loss_difference([2.0, 4.0], [2.0, 5.0]) == 0.25
    assert figures.loss_difference([], [1.0]) is None


def test_limits_are_the_best_of_the_rounds():
    replies = [
        {"bytes_per_second": b, "matmul": {"fp32": {"flops_per_second": f}}}
        for b, f in ((5.0, 1.0), (4.0, 3.0))
    ]
    expected = {"bytes_per_second": 5.0, "flops_per_second": {"fp32": 3.0}}
    assert figures.best_limits(replies) == expected


def test_decode_flops_and_bytes_by_hand():
    config = PhiConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=64,
    )
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 100
    assert roofline.decode_flops(config, 10) == 2 * matrices + 4 * 2 * 2 * 4 * 10
    alone = roofline.decode_limit(config, 1, 10, "bf16", 1000.0, 1e9)
    assert alone.bound == "memory"
    assert alone.tokens_per_second == pytest.approx(1000.0 / (2 * matrices))
    assert roofline.weight_bytes(config, "int4") == 0.5625 * (matrices - 800) + 800
    many = roofline.decode_limit(config, 50, 10, "bf16", 1e9, 1e6)
    assert many.bound == "matmul"
    assert many.tokens_per_second == pytest.approx(1e6 / roofline.decode_flops(config, 10))


def test_a_steps_shapes_hold_all_flops_but_attention():
    config = nano_config()
    shapes = roofline.step_shapes(config, 2048)
    flops = sum(3 * 2 * s["m"] * s["k"] * s["n"] * s["count"] for s in shapes)
    attention = 6 * config.num_layers * config.num_heads * config.head_size * 128
    assert flops == 2048 * (flops_per_token(config, 128) - attention)


def test_the_models_are_of_the_sizes_named():
    small = small_100m_config()
    assert not small.tie_word_embeddings
    assert small.num_parameters - small.vocab_size * small.hidden_size == pytest.approx(
        1e8, rel=0.01
    )
    assert pts_config().num_parameters == pytest.approx(2.9e6, rel=0.01)
    assert nano_config().num_parameters < 1e6
