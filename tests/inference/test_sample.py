"""Random streams are functions of their key; drawing follows the distribution that is asked for."""

import numpy as np
import pytest
import torch

from phiforge.inference.engine.sample import (
    BLOCK_STEPS,
    Laws,
    draw,
    keep_likely,
    keep_ranked,
    prompt_digest,
    stream_key,
    token_logprobs,
    uniforms,
)
from phiforge.inference.interface import Sampling


def logits(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


def test_streams_differ_by_seed_prompt_and_index_and_repeat():
    keys = [
        tuple(stream_key(prompt_digest(seed, prompt), index))
        for seed in (0, 1)
        for prompt in ((1, 2), (1, 3), (1,))
        for index in (0, 1)
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == tuple(stream_key(prompt_digest(0, (1, 2)), 0))


def test_blocks_of_a_stream_are_the_stream():
    key = stream_key(prompt_digest(0, (1,)), 0)
    straight = np.random.Generator(np.random.Philox(key=key)).random(3 * BLOCK_STEPS)
    assert np.array_equal(np.concatenate([uniforms(key, b) for b in range(3)]), straight)


@pytest.mark.parametrize("size", [3, 64, 65, 300])
def test_inverse_of_the_distribution_function(size):
    p_v = torch.softmax(logits(1, size)[0], -1)
    u = np.linspace(0, 1 - 1e-9, 997)
    ids, finite = draw(logits(1, size).expand(997, -1), Laws.of(Sampling(), 997), u)
    target = torch.from_numpy(u) * p_v.double().sum()
    expected = torch.searchsorted(p_v.double().cumsum(0), target, right=True)
    assert finite.all()
    assert (ids == expected).float().mean() > 0.99  # sums in another order: ties may fall apart
    assert (ids[1:] >= ids[:-1]).all()
    counts = torch.bincount(ids, minlength=size) / 997
    assert (counts - p_v).abs().max() < 2.5 / 997


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_tokens_of_zero_probability_are_never_drawn(u):
    logits_bv = torch.full((1, 130), -torch.inf)
    logits_bv[0, 70] = logits_bv[0, 71] = 1.0
    ids, finite = draw(logits_bv, Laws.of(Sampling(), 1), np.array([u]))
    assert finite.all()
    assert ids.item() == (71 if u else 70)


def naive_keep(p_v: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(p_v)), key=lambda i: (-p_v[i], i))
    order = order[:top_k] if top_k else order
    total, kept, cumulative = sum(p_v[i] for i in order), [], 0.0
    for i in order:
        if cumulative >= top_p * total and top_p < 1:
            break
        kept.append(i)
        cumulative += p_v[i]
    return {i for i in kept if p_v[i] >= min_p * max(p_v)}


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_filters_keep_what_they_say(top_k, top_p, min_p):
    p_bv = torch.softmax(logits(4, 50), -1)
    laws = Laws.of(Sampling(top_k=top_k, top_p=top_p, min_p=min_p), 4)
    kept = keep_likely(keep_ranked(p_bv, laws) if laws.ranked(50).any() else p_bv, laws)
    for row in range(4):
        expected = naive_keep(p_bv[row].double().numpy(), top_k, top_p, min_p)
        assert set(kept[row].nonzero()[:, 0].tolist()) == expected
        assert torch.equal(kept[row][kept[row] > 0], p_bv[row][kept[row] > 0])


def test_a_row_is_drawn_the_same_in_any_company():
    logits_bv = logits(37, 300)
    u = np.random.Generator(np.random.PCG64(1)).random(37)
    kinds = (
        Sampling(),
        Sampling(top_p=0.9, temperature=0.7),
        Sampling(temperature=0),
        Sampling(top_k=5, min_p=0.1),
        Sampling(temperature=1.3, min_p=0.05),
    )
    laws = Laws.empty(37)
    for row in range(37):
        laws.set(row, kinds[row % len(kinds)])
    together, _ = draw(logits_bv, laws, u)
    for i in range(37):
        one = Laws.of(kinds[i % len(kinds)], 1)
        assert together[i] == draw(logits_bv[i : i + 1], one, u[i : i + 1])[0]


def test_greedy_takes_the_lowest_of_equals():
    ids, _ = draw(torch.tensor([[1.0, 3.0, 3.0]]), Laws.of(Sampling(temperature=0), 1), np.zeros(1))
    assert ids.item() == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_rows_are_reported(temperature):
    logits_bv = logits(3, 100)
    logits_bv[1, 7] = torch.nan
    laws = Laws.of(Sampling(temperature=temperature), 3)
    _, finite = draw(logits_bv, laws, np.full(3, 0.5))
    assert finite.tolist() == [True, False, True]


def test_logprobs_are_those_at_temperature_one():
    logits_bv = logits(3, 100)
    found = token_logprobs(logits_bv, torch.tensor([5, 6, 7]))
    expected = torch.log_softmax(logits_bv.double(), -1)[range(3), [5, 6, 7]]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
