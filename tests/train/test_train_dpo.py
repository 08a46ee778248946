"""DPO: equal to TRL to 1e-5, single-token form equals the general one, reference cached."""

import json
from pathlib import Path

import pytest
import torch
from tiny_training import VOCAB, tiny_model

from phiforge.core.records import Pair, write_records
from phiforge.model import huggingface
from phiforge.model.phi import Phi
from phiforge.train.dpo import DPOConfig, completion_logprobs, preference_loss, run
from phiforge.train.losses import MARGIN_LOSSES, PREFERENCE_LOSSES
from phiforge.train.pairs import (
    PairSteps,
    Reference,
    TokenPair,
    cut,
    epoch_order,
    host_prefixes,
    make_batch,
    path_chains,
    separate_tokens,
    tokenize,
)

PAD = VOCAB - 1
BETA = 0.1
SMOOTHING = {"robust": 0.1}


def random_ids(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, PAD, (length,), generator=generator).tolist())


def response_pairs() -> list[TokenPair]:
    """Four pairs of prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(6, 4, 7), (9, 3, 3), (3, 8, 2), (12, 1, 5)]
    return [
        TokenPair(f"p{i}", *(random_ids(generator, n) for n in size))
        for i, size in enumerate(sizes)
    ]


def pivotal_pairs() -> list[TokenPair]:
    """Five single-token pairs along one path, and one of another path."""
    generator = torch.Generator().manual_seed(6)
    path = random_ids(generator, 30)
    pairs = [
        TokenPair(f"t{n}", path[:n], (path[n],), ((path[n] + 1) % PAD,)) for n in (4, 9, 15, 20, 28)
    ]
    return [*pairs, TokenPair("other", random_ids(generator, 11), (3,), (4,))]


def policy_and_reference() -> tuple[Phi, Phi]:
    """A tiny model, and the same with noise added: the policy."""
    reference, policy = tiny_model(), tiny_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.add_(noise, alpha=0.02)
    return policy, reference


def reference_of(model: Phi, pairs: list[TokenPair]) -> Reference:
    zeros = torch.zeros(len(pairs))
    return Reference(*completion_logprobs(model, make_batch(pairs, Reference(zeros, zeros), PAD)))


def loss_and_gradients(
    model: Phi, pairs: list[TokenPair], reference: Reference, loss: str, **changes: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    batch = make_batch(pairs, reference, PAD)
    found = preference_loss(model, batch, loss, BETA, SMOOTHING.get(loss, 0.0))
    mean = found.total / len(pairs)
    mean.backward()
    return mean.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def plain_logprob(model: Phi, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    logits = model(torch.tensor([prompt + completion]))[0].float().log_softmax(-1)
    start = len(prompt) - 1
    return sum(logits[start + i, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("pairs", [response_pairs(), pivotal_pairs()], ids=["long", "single"])
def test_logprobs_equal_one_sequence_at_a_time(pairs: list[TokenPair]) -> None:
    model = tiny_model()
    found = reference_of(model, pairs)
    for i, pair in enumerate(pairs):
        assert found.chosen_p[i].item() == pytest.approx(
            plain_logprob(model, pair.prompt, pair.chosen), abs=1e-4
        )
        assert found.rejected_p[i].item() == pytest.approx(
            plain_logprob(model, pair.prompt, pair.rejected), abs=1e-4
        )


def test_one_forward_serves_all_pairs_of_a_path() -> None:
    pairs = pivotal_pairs()
    zeros = torch.zeros(len(pairs))
    batch = make_batch(pairs, Reference(zeros, zeros), PAD)
    assert batch.single_token
    assert int((batch.documents_bt >= 0).sum()) == 28 + 11
    assert batch.place_n.tolist()[: len(pairs)] == batch.place_n.tolist()[len(pairs) :]


@pytest.mark.parametrize("loss", sorted(MARGIN_LOSSES))
def test_single_token_form_equals_general(loss: str) -> None:
    from dataclasses import replace

    policy, start = policy_and_reference()
    pairs = pivotal_pairs()
    reference = reference_of(start, pairs)
    found, gradients = loss_and_gradients(policy, pairs, reference, loss)
    batch = replace(make_batch(pairs, reference, PAD), single_token=False)
    policy.zero_grad()
    general = preference_loss(policy, batch, loss, BETA, SMOOTHING.get(loss, 0.0)).total / len(
        pairs
    )
    general.backward()
    torch.testing.assert_close(found, general.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in policy.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, name


def test_one_softmax_for_both_sides_equals_one_each(monkeypatch) -> None:
    """Log-probabilities and gradients of a loss that needs them; half the rows of the head."""
    from dataclasses import replace

    from phiforge.train import dpo

    policy, start = policy_and_reference()
    pairs = pivotal_pairs()
    rows: list[int] = []
    whole = dpo.token_losses

    def counting(x_nd, *rest):
        rows.append(len(x_nd))
        return whole(x_nd, *rest)

    monkeypatch.setattr(dpo, "token_losses", counting)
    batch = make_batch(pairs, reference_of(start, pairs), PAD)
    results = []
    for part in (batch, replace(batch, single_token=False)):
        policy.zero_grad()
        preference_loss(policy, part, "apo_zero", BETA).total.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        results.append((*completion_logprobs(policy, part), gradient))
    for one, each in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(one, each, rtol=0, atol=1e-6)
    error = (results[0][2] - results[1][2]).norm() / results[1][2].norm()
    assert error < 1e-5
    assert rows[1:] == [6, 6, 12, 12]


def test_losses_of_the_margin_read_two_rows_of_the_head(monkeypatch) -> None:
    from phiforge.train import dpo

    policy, start = policy_and_reference()
    batch = make_batch(pivotal_pairs(), reference_of(start, pivotal_pairs()), PAD)
    monkeypatch.setattr(dpo, "token_losses", None)
    for loss in sorted(MARGIN_LOSSES):
        preference_loss(policy, batch, loss, BETA, SMOOTHING.get(loss, 0.0)).total.backward()
        touched = policy.lm_head.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        assert touched == sorted(set(batch.target_n.tolist()))
        policy.zero_grad()


def pairs_along_paths(num_paths: int, length: int, each: int) -> list[TokenPair]:
    """`each` single-token pairs at random places of every path, in order."""
    generator = torch.Generator().manual_seed(8)
    pairs = []
    for n in range(num_paths):
        path = random_ids(generator, length)
        places = torch.randperm(length - 1, generator=generator)[:each] + 1
        pairs += [
            TokenPair(f"{n}/{i}", path[:i], (path[i],), ((path[i] + 1) % PAD,))
            for i in sorted(places.tolist())
        ]
    return pairs


def test_pairs_of_a_path_cost_its_length_once() -> None:
    """Over a whole epoch: each path's tokens up to its last pair, and once more only for a path
    that the end of a step cuts in two."""
    pairs = pairs_along_paths(num_paths=40, length=300, each=5)
    zeros = torch.zeros(len(pairs))
    reference = Reference(zeros, zeros)
    paths = sum(max(len(p.prompt) for p in pairs[i : i + 5]) for i in range(0, len(pairs), 5))

    def computed(pairs_per_step: int) -> int:
        steps = PairSteps(pairs, reference, pairs_per_step, 4096, PAD, seed=0)
        parts = [p for i in range(steps.steps_per_epoch) for p in steps.batch(i).parts]
        return sum(int((part.documents_bt >= 0).sum()) for part in parts)

    whole_chains = computed(5)
    assert whole_chains == paths
    assert separate_tokens(pairs) > 5 * whole_chains
    assert computed(32) - paths <= 300 * (len(pairs) // 32)
    assert computed(1) == sum(len(p.prompt) for p in pairs)


# The pairs of response_pairs() under policy_and_reference(), as TRL 1.16 computed them
# (test_equals_trl below repeats that): loss, and norm of the gradient of layer 0's query matrix.
GOLDEN = json.loads((Path(__file__).parent / "trl_golden.json").read_text())


@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_equals_stored_trl_numbers(loss: str) -> None:
    policy, start = policy_and_reference()
    pairs = response_pairs()
    found, gradients = loss_and_gradients(policy, pairs, reference_of(start, pairs), loss)
    assert found.item() == pytest.approx(GOLDEN[loss]["loss"], abs=1e-5)
    norm = gradients["layers.0.attention.query.weight"].norm().item()
    assert norm == pytest.approx(GOLDEN[loss]["query_gradient_norm"], rel=1e-5)


def trl_loss_and_gradients(policy: Phi, start: Phi, loss: str, folder: Path) -> tuple[float, dict]:
    """What TRL's trainer computes for response_pairs(): loss and gradients by Llama names."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    models = []
    for name, model in (("policy", policy), ("start", start)):
        huggingface.save(model, None, folder / name, layout="llama", dtype="float32")
        models.append(
            transformers.AutoModelForCausalLM.from_pretrained(
                folder / name, dtype=torch.float32, attn_implementation="eager"
            )
        )

    class PreTokenised(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    rows = [
        {
            "prompt_ids": list(p.prompt),
            "chosen_ids": list(p.chosen),
            "rejected_ids": list(p.rejected),
        }
        for p in response_pairs()
    ]
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=BETA,
        loss_type=[loss],
        label_smoothing=SMOOTHING.get(loss, 0.0),
        report_to=[],
    )
    trainer = PreTokenised(
        model=models[0],
        ref_model=models[1],
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_any_tokenizer(transformers),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    value = trainer._compute_loss(trainer.model, batch, False)
    value.backward()
    gradients = {n: p.grad for n, p in models[0].named_parameters() if p.grad is not None}
    return value.item(), gradients


def _any_tokenizer(transformers):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=str(PAD), eos_token="1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_equals_trl(loss: str, tmp_path: Path) -> None:
    policy, start = policy_and_reference()
    expected, expected_gradients = trl_loss_and_gradients(policy, start, loss, tmp_path)
    pairs = response_pairs()
    found, gradients = loss_and_gradients(policy, pairs, reference_of(start, pairs), loss)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    for ours, theirs in (
        ("layers.0.attention.query.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.1.mlp.down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("embedding.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        error = (gradients[ours] - expected_gradients[theirs]).norm()
        assert error / expected_gradients[theirs].norm() < 1e-5, ours


def test_micro_batched_equals_whole() -> None:
    policy, start = policy_and_reference()
    pairs = response_pairs() + pivotal_pairs()
    reference = reference_of(start, pairs)
    results = []
    for micro_tokens in (10, 40, 10_000):
        steps = PairSteps(pairs, reference, len(pairs), micro_tokens, PAD, seed=0)
        step = steps.batch(0)
        policy.zero_grad()
        for part in step.parts:
            found = preference_loss(policy, part, "sigmoid", BETA)
            (found.total / step.num_units).backward()
        results.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for result in results[1:]:
        assert (result - results[0]).norm() / results[0].norm() < 1e-4


def test_host_prefixes() -> None:
    sequences = [(1, 2), (1, 2, 3), (1, 2), (1, 3), (2,), (1, 2, 3, 4), (1,)]
    hosts, host_of = host_prefixes(sequences)
    assert sorted(hosts) == [(1, 2, 3, 4), (1, 3), (2,)]
    for ids in sequences:
        assert hosts[host_of[ids]][: len(ids)] == ids


def test_cut_and_order_take_every_pair_once() -> None:
    pairs = response_pairs() + pivotal_pairs()
    groups = list(cut(pairs, 40))
    assert [i for group in groups for i in group] == list(range(len(pairs)))
    assert len(groups) > 1
    orders = [epoch_order(path_chains(pairs), seed=0, epoch=e) for e in (0, 1)]
    assert all(sorted(order) == list(range(len(pairs))) for order in orders)
    assert orders[0] != orders[1]
    path = [orders[0].index(i) for i in range(4, 9)]
    assert path == list(range(path[0], path[0] + 5))


class FakeTokenizer:
    """Characters as tokens; chats as [role first letter, content, .]."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages, add_generation_prompt: bool = False) -> list[int]:
        ids = [i for m in messages for i in (ord(m["role"][0]), *self.encode(m["content"]), 0)]
        return [*ids, ord("a")] if add_generation_prompt else ids


def test_tokenize_keeps_token_ids_and_ends_texts() -> None:
    tokenizer = FakeTokenizer()
    ids = Pair(
        id="i",
        prompt="x",
        chosen="y",
        rejected="z",
        prompt_token_ids=[5, 6],
        chosen_token_ids=[7],
        rejected_token_ids=[8],
    )
    assert tokenize(ids, tokenizer) == TokenPair("i", (5, 6), (7,), (8,))
    text = tokenize(Pair(id="t", prompt="x", chosen="y", rejected="z"), tokenizer)
    assert text == TokenPair("t", (120,), (121, 0), (122, 0))
    chat = Pair(
        id="c",
        prompt=[{"role": "user", "content": "x"}],
        chosen=[{"role": "assistant", "content": "y"}],
        rejected="z",
    )
    assert tokenize(chat, tokenizer) == TokenPair("c", (117, 120, 0, 97), (121, 0), (122, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_token_ids": [1]}, "all three or none"),
        ({"rejected": "y"}, "the same tokens"),
        ({"prompt": ""}, "at least one token"),
    ],
)
def test_bad_pairs_are_named(changes: dict, words: str) -> None:
    pair = Pair(**{"id": "bad", "prompt": "x", "chosen": "y", "rejected": "z", **changes})
    with pytest.raises(ValueError, match=f"pair bad: .*{words}"):
        tokenize(pair, FakeTokenizer())


def test_smoothing_without_effect_is_an_error() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        DPOConfig(loss="hinge", label_smoothing=0.1)


def saved_inputs(tmp_path: Path, tokenizer, pairs: list[TokenPair]) -> dict[str, Path]:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    huggingface.save(model, tokenizer, tmp_path / "sft" / "model", dtype="float32")
    (tmp_path / "pivotal").mkdir()
    records = [
        Pair(
            id=p.id,
            prompt="",
            chosen="",
            rejected="",
            prompt_token_ids=list(p.prompt),
            chosen_token_ids=list(p.chosen),
            rejected_token_ids=list(p.rejected),
        )
        for p in pairs
    ]
    write_records(tmp_path / "pivotal" / "pairs.jsonl", records)
    return {"sft": tmp_path / "sft", "pivotal": tmp_path / "pivotal"}


def test_stage_learns_the_pairs_and_resumes(stage, tmp_path, tokenizer, monkeypatch) -> None:
    inputs = saved_inputs(tmp_path, tokenizer, pivotal_pairs())
    config = DPOConfig(lr=1e-3, epochs=10, pairs_per_step=3, checkpoint_every=4, dtype="fp32")
    out = stage("straight")
    metrics = run(config, inputs, out)
    assert metrics["pairs"] == metrics["single_token_pairs"] == 6
    assert metrics["steps"] == 20
    assert 28 + 11 <= metrics["policy_tokens_per_epoch"] < metrics["policy_tokens_separately"]
    assert metrics["policy_tokens_separately"] == 2 * (5 + 10 + 16 + 21 + 29 + 12)
    assert metrics["accuracy"] == 1.0
    assert metrics["margin"] > 0.01
    first = json.loads((out.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)

    batch = PairSteps.batch

    def interrupted(self: PairSteps, step: int):
        if step == 13:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PairSteps, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, inputs, stage("resumed"))
    reference = (stage("resumed").path / "reference.safetensors").read_bytes()
    run(config, inputs, stage("resumed"))
    assert (stage("resumed").path / "reference.safetensors").read_bytes() == reference
    a, b = (
        (stage(n).path / "model" / "model.safetensors").read_bytes()
        for n in ("straight", "resumed")
    )
    assert a == b


def test_damaged_reference_is_computed_again(stage, tmp_path, tokenizer, capsys) -> None:
    inputs = saved_inputs(tmp_path, tokenizer, pivotal_pairs())
    out = stage()
    (out.path / "reference.safetensors").write_bytes(b"nothing")
    run(DPOConfig(lr=1e-5), inputs, out)
    assert "reference.safetensors is damaged" in capsys.readouterr().err


def test_no_pairs_pass_the_weights(stage, tmp_path, tokenizer, capsys) -> None:
    inputs = saved_inputs(tmp_path, tokenizer, [])
    out = stage()
    assert run(DPOConfig(), inputs, out)["pairs"] == 0
    assert "no pairs" in capsys.readouterr().err
    a, b = (f / "model" / "model.safetensors" for f in (tmp_path / "sft", out.path))
    assert a.read_bytes() == b.read_bytes()


def test_too_long_pair_is_named(stage, tmp_path, tokenizer) -> None:
    inputs = saved_inputs(tmp_path, tokenizer, [TokenPair("long", (1,) * 80, (2,), (3,))])
    with pytest.raises(ValueError, match="pair long has 80 tokens; the model was made for 64"):
        run(DPOConfig(), inputs, stage())
