"""The decoder: parity with `transformers` in fp32, masks, caches, dtypes, LongRoPE's switch.

Run `pytest tests/model/test_phi.py`. It writes nothing.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phiforge.model.config import LongRope, PhiConfig
from phiforge.model.huggingface_config import config_json
from phiforge.model.huggingface_weights import tensor_names
from phiforge.model.phi import Phi, causal_mask
from phiforge.model.rope import inverse_frequencies, rope_table, rotate

BASE = PhiConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=96,
    bos_token_id=95,
    eos_token_ids=(94,),
)
LONG_ROPE = LongRope(short_factor=(1.0, 1.1), long_factor=(1.5, 6.0))
VARIANTS: dict[str, PhiConfig] = {
    "plain": BASE,
    "multi-head": BASE.replace(num_kv_heads=4),
    "multi-query": BASE.replace(num_kv_heads=1),
    "tied": BASE.replace(tie_word_embeddings=True),
    "head-dim": BASE.replace(head_dim=16),
    "base-250k": BASE.replace(rope_theta=250_000.0),
    "partial-rotary": BASE.replace(partial_rotary_factor=0.5),
    "sliding-window": BASE.replace(sliding_window=7),
    "longrope": BASE.replace(
        partial_rotary_factor=0.5, rope_scaling=LONG_ROPE, original_max_position_embeddings=16
    ),
    "mini": BASE.replace(
        partial_rotary_factor=0.5,
        rope_scaling=LONG_ROPE,
        original_max_position_embeddings=16,
        sliding_window=11,
        tie_word_embeddings=True,
    ),
}


def build(config: PhiConfig, seed: int = 0) -> Phi:
    return Phi(config).initialize(torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 94, (rows, length), generator=torch.Generator().manual_seed(seed))


def peer(model: Phi, layout: str = "phi3") -> Any:
    """The same model in `transformers`, eager attention, weights copied under its names."""
    transformers = pytest.importorskip("transformers")
    config_class = {"phi3": transformers.Phi3Config, "llama": transformers.LlamaConfig}[layout]
    model_class = {"phi3": transformers.Phi3ForCausalLM, "llama": transformers.LlamaForCausalLM}
    config = config_class(**config_json(model.config, layout, "float32"))
    config._attn_implementation = "eager"
    theirs = model_class[layout](config).eval()
    ours = dict(model.named_parameters())
    state = {
        name: torch.cat([ours[part].detach() for part in parts])
        for name, parts in tensor_names(model.config, layout).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    return theirs


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- parity with transformers -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("length", [13, 40])
def test_logits_loss_and_every_gradient(name: str, length: int) -> None:
    """13 and 40 tokens lie on both sides of LongRoPE's switch (16) and of the windows (7, 11)."""
    model = build(VARIANTS[name])
    model.set_max_length(length)
    theirs = peer(model)
    token_ids_bt = tokens(3, length)

    logits_btv = model(token_ids_bt)
    output = theirs(input_ids=token_ids_bt, labels=token_ids_bt, use_cache=False)
    assert_close(logits_btv, output.logits)

    loss = F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), token_ids_bt[:, 1:].flatten())
    assert_close(loss, output.loss)
    loss.backward()
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for their_name, parts in tensor_names(model.config, "phi3").items():
        ours = torch.cat([gradients[part] for part in parts])  # type: ignore[misc]
        assert_close(ours, their_gradients[their_name])


@pytest.mark.parametrize("name", ["plain", "tied", "head-dim", "base-250k"])
def test_same_logits_as_llama(name: str) -> None:
    model = build(VARIANTS[name])
    token_ids_bt = tokens(2, 30)
    with torch.no_grad():
        assert_close(model(token_ids_bt), peer(model, "llama")(token_ids_bt).logits)


def test_fused_and_unfused_peers_agree() -> None:
    """No permutation: what is left is the order of sums in matrices of another width."""
    model = build(BASE)
    token_ids_bt = tokens(2, 30)
    with torch.no_grad():
        fused = peer(model, "phi3")(token_ids_bt).logits
        unfused = peer(model, "llama")(token_ids_bt).logits
    assert_close(fused, unfused, 3e-6)


def greedy(model: Phi, prompt: list[int], num_tokens: int) -> list[int]:
    """The plainest generation: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("name", ["plain", "tied", "sliding-window", "longrope", "mini"])
@pytest.mark.parametrize("prompt_length", [4, 24])
def test_greedy_generation(name: str, prompt_length: int) -> None:
    """Prompts on both sides of the window; lengths on one side each of LongRoPE's switch."""
    model = build(VARIANTS[name])
    num_tokens = 12 if prompt_length == 4 else 24
    model.set_max_length(prompt_length + num_tokens)
    prompt = tokens(1, prompt_length)
    ours = greedy(model, prompt[0].tolist(), num_tokens)
    theirs = peer(model)
    theirs.generation_config.eos_token_id = None
    output = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    assert ours == output[0].tolist()


# --- LongRoPE ---------------------------------------------------------------------------------


def test_longrope_factors_follow_the_maximum_length_not_the_row() -> None:
    model = build(VARIANTS["longrope"])
    token_ids_bt = tokens(1, 10)
    with torch.no_grad():
        default = model(token_ids_bt)
        model.set_max_length(17)
        long = model(token_ids_bt)
        model.set_max_length(16)
        short = model(token_ids_bt)
    assert model.max_length == 16
    assert torch.equal(default, long)
    assert not torch.allclose(long, short)


def test_longrope_row_beyond_max_length_is_refused() -> None:
    model = build(VARIANTS["longrope"])
    model.set_max_length(16)
    with pytest.raises(ValueError, match=r"17 tokens.*max_length 16.*set_max_length\(17\)"):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match="max_length is 0"):
        model.set_max_length(0)


def test_plain_rope_extrapolates_without_asking() -> None:
    model = build(BASE)
    assert model(tokens(1, 100)).shape == (1, 100, 97)


def test_positions_shift_nothing_under_plain_rope() -> None:
    """RoPE is relative: the same offset on every position leaves the logits alone."""
    model = build(BASE)
    token_ids_bt = tokens(2, 20)
    shifted = torch.arange(20).expand(2, -1) + 5
    with torch.no_grad():
        assert_close(model(token_ids_bt), model(token_ids_bt, positions_bt=shifted))


def test_rotation_backward_is_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    cos, sin = rope_table(inverse_frequencies(VARIANTS["longrope"], False), torch.arange(5), 1.2)
    cos, sin = cos.double(), sin.double()
    x_bthe = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    def by_autograd(x: Tensor) -> Tensor:
        first, second, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    weights = torch.randn(x_bthe.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((by_autograd(x_bthe) * weights).sum(), x_bthe)
    x_float = x_bthe.detach().float().requires_grad_()
    rotated = rotate(x_float, cos.float(), sin.float())
    (found,) = torch.autograd.grad((rotated * weights.float()).sum(), x_float)
    assert_close(rotated, by_autograd(x_bthe).float(), 1e-6)
    assert_close(found, expected.float(), 1e-6)


# --- masks and caches -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "sliding-window", "partial-rotary"])
def test_packed_documents_equal_separate_documents(name: str) -> None:
    model = build(VARIANTS[name])
    lengths = [5, 12, 9]
    pieces = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    padding = torch.zeros(1, 4, dtype=torch.long)
    token_ids_bt = torch.cat([*pieces, padding], dim=1)
    documents = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 4
    positions = [i for n in lengths for i in range(n)] + [0] * 4
    packed = model(
        token_ids_bt,
        documents_bt=torch.tensor([documents], dtype=torch.int32),
        positions_bt=torch.tensor([positions]),
    )
    assert torch.isfinite(packed).all()
    separate = torch.cat([model(piece) for piece in pieces], dim=1)
    assert_close(packed[:, :26], separate)

    weights = torch.randn(separate.shape, generator=torch.Generator().manual_seed(3))
    parameters = list(model.parameters())
    whole = torch.autograd.grad((packed[:, :26] * weights).sum(), parameters)
    parts = torch.autograd.grad((separate * weights).sum(), parameters)
    for ours, theirs in zip(whole, parts, strict=True):
        assert_close(ours, theirs, 1e-4)


def test_causal_mask_by_hand() -> None:
    documents_bt = torch.tensor([[0, 0, 0, 1, -1]])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(causal_mask(5, documents_bt, window=2)[0], expected)
    assert torch.equal(causal_mask(3)[0], torch.ones(3, 3, dtype=torch.bool).tril())


@dataclass
class ConcatenatingCache:
    """The simplest cache: keeps every key and value, returns all."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def update(self, layer: int, k_bkte: Tensor, v_bkte: Tensor) -> tuple[Tensor, Tensor]:
        for kept, new in ((self.keys, k_bkte), (self.values, v_bkte)):
            kept[layer] = torch.cat([kept[layer], new], dim=2) if layer in kept else new
        return self.keys[layer], self.values[layer]


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("chunks", [[9, 1, 1, 4], [1] * 15])
def test_cache_equals_no_cache(name: str, chunks: list[int]) -> None:
    model = build(VARIANTS[name])
    token_ids_bt = tokens(2, sum(chunks))
    cache, start, parts = ConcatenatingCache(), 0, []
    whole_mask = causal_mask(sum(chunks), window=model.config.sliding_window)
    with torch.no_grad():
        for size in chunks:
            end = start + size
            parts.append(
                model(
                    token_ids_bt[:, start:end],
                    positions_bt=torch.arange(start, end).expand(2, -1),
                    mask_bts=whole_mask[:, start:end, :end].expand(2, -1, -1),
                    cache=cache,
                )
            )
            start = end
        assert_close(torch.cat(parts, dim=1), model(token_ids_bt))


def test_rows_that_attend_to_nothing_stay_finite() -> None:
    model = build(BASE)
    mask_bts = causal_mask(6).clone().expand(2, -1, -1).clone()
    mask_bts[1] = False
    with torch.no_grad():
        logits_btv = model(tokens(2, 6), mask_bts=mask_bts)
    assert torch.isfinite(logits_btv).all()
    assert_close(logits_btv[:1], model(tokens(2, 6)[:1]))


def test_contradicting_arguments_are_refused() -> None:
    model, token_ids_bt = build(BASE), tokens(1, 4)
    with pytest.raises(ValueError, match="mask_bts and positions_bt"):
        model(token_ids_bt, cache=ConcatenatingCache())
    documents_bt = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="not both"):
        model(token_ids_bt, documents_bt=documents_bt, mask_bts=causal_mask(4))


# --- dtypes, initialisation, use --------------------------------------------------------------


def test_bf16_compute_keeps_fp32_parameters_and_gradients() -> None:
    model, token_ids_bt = build(BASE), tokens(2, 20)
    full = model(token_ids_bt)
    model.compute_dtype = torch.bfloat16
    half = model(token_ids_bt)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
    half.float().logsumexp(-1).sum().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_bf16_compute_equals_a_bf16_model() -> None:
    """What trains with fp32 master weights computes exactly what the saved bf16 model computes."""
    token_ids_bt = tokens(2, 20)
    master, served = build(BASE), build(BASE).to(torch.bfloat16)
    master.compute_dtype = torch.bfloat16
    for parameter in master.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(master(token_ids_bt), served(token_ids_bt))


def test_bf16_stays_near_transformers() -> None:
    model = build(BASE)
    theirs = peer(model).to(torch.bfloat16)
    token_ids_bt = tokens(2, 30)
    with torch.no_grad():
        exact = model(token_ids_bt)
        ours = (model.to(torch.bfloat16)(token_ids_bt).float() - exact).abs().mean()
        other = (theirs(token_ids_bt).logits.float() - exact).abs().mean()
    assert ours < 1.5 * other


def test_hidden_then_head_is_forward() -> None:
    for name in ("plain", "tied"):
        model = build(VARIANTS[name])
        x_btd = model.hidden(tokens(2, 9))
        assert x_btd.shape == (2, 9, 32)
        assert torch.equal(model.head(x_btd), model(tokens(2, 9)))


def test_initialize_depends_on_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = build(BASE, seed=7).state_dict()
    torch.manual_seed(6)
    second = build(BASE, seed=7).state_dict()
    other = build(BASE, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert first["layers.1.mlp.down.weight"].std() == pytest.approx(0.1, rel=0.1)
    assert first["lm_head.weight"].std() == pytest.approx(0.2, rel=0.1)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Phi(BASE)
    assert torch.equal(torch.rand(3), expected)


def test_tied_model_has_one_table_with_both_gradients() -> None:
    model = build(VARIANTS["tied"])
    assert "lm_head.weight" not in model.state_dict()
    model(tokens(1, 5)).sum().backward()
    assert model.embedding.weight.grad is not None
    assert bool((model.embedding.weight.grad.abs().sum(-1) > 0).all())


def test_parameter_names_are_the_promised_ones() -> None:
    layer = "attention_norm attention.query attention.key attention.value attention.output"
    layer += " mlp_norm mlp.gate mlp.up mlp.down"
    expected = ["embedding.weight", "norm.weight", "lm_head.weight"]
    expected += [f"layers.{i}.{name}.weight" for i in range(2) for name in layer.split()]
    assert sorted(build(BASE).state_dict()) == sorted(expected)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    model = build(VARIANTS["sliding-window"])
    token_ids_bt, documents_bt = tokens(2, 20), torch.zeros(2, 20, dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits_btv = compiled(token_ids_bt, documents_bt=documents_bt)
    assert_close(logits_btv, model(token_ids_bt, documents_bt=documents_bt))
    logits_btv.sum().backward()
