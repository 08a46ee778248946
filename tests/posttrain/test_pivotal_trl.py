"""PivotalDPOTrainer: the ids reach the model, loss and gradients equal ours, plain TRL corrupts."""

from pathlib import Path

import pytest
import torch
from exchange_pairs import all_pairs, byte, lone_bytes, long, pair, plain, special, tokenizer

from phiforge.core.records import Pair, write_records
from phiforge.model import huggingface
from phiforge.model.config import PhiConfig
from phiforge.model.phi import Phi
from phiforge.posttrain.pivotal.exchange import export
from phiforge.train.dpo import completion_logprobs, preference_loss
from phiforge.train.pairs import Reference, make_batch, tokenize

pytestmark = pytest.mark.slow
BETA = 0.1


@pytest.fixture(scope="module")
def ours():
    """The module under test, where TRL is installed."""
    pytest.importorskip("trl")
    torch.set_num_threads(1)
    from phiforge.posttrain.pivotal import trl as module

    return module


def tiny_phi(noise: float = 0.0) -> Phi:
    config = PhiConfig(
        vocab_size=tokenizer().vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=64,
    )
    model = Phi(config).initialize(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(generator=generator), alpha=noise)
    return model


def as_phi3(model: Phi, folder: Path):
    """The model as transformers has it: Phi3ForCausalLM with fused matrices."""
    import transformers

    huggingface.save(model, tokenizer(), folder, dtype="float32")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(found).__name__ == "Phi3ForCausalLM"
    return found


def trainer_of(kind, folder: Path, train_dataset, **changes):
    """A trainer of one step over the whole data set: policy = reference + noise."""
    import transformers
    from trl import DPOConfig

    arguments = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "beta": BETA,
        "report_to": [],
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return kind(
        model=as_phi3(tiny_phi(noise=0.02), folder / "policy"),
        ref_model=as_phi3(tiny_phi(), folder / "start"),
        args=DPOConfig(**arguments),
        train_dataset=train_dataset,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
    )


def sequences_of(pairs: list[Pair]) -> list[list[int]]:
    """What the model must read: prompt and side, nothing more."""
    sides = [(p.prompt_token_ids, p.chosen_token_ids) for p in pairs]
    sides += [(p.prompt_token_ids, p.rejected_token_ids) for p in pairs]
    return sorted([*prompt, *side] for prompt, side in sides)


def read_by_the_model(trainer) -> list[list[int]]:
    """The sequences of the first training step, as the policy's forward pass gets them."""
    seen: list[list[int]] = []

    def record(module, args, kwargs) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(ids[mask.bool()].tolist())

    handle = trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    handle.remove()
    return sorted(seen)


def test_the_ids_reach_the_model_as_they_are(ours, tmp_path):
    pairs = all_pairs()
    trainer = trainer_of(
        ours.PivotalDPOTrainer, tmp_path, ours.pair_dataset(pairs), max_length=8, num_train_epochs=1
    )
    assert read_by_the_model(trainer) == sequences_of(pairs)


def text_dataset(pairs: list[Pair]):
    import datasets

    return datasets.Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    )


def test_plain_trl_on_text_trains_something_else(ours, tmp_path):
    """Why the subclass is there: an end token after the pivotal one, a byte that becomes three
    other tokens, a long prompt that is dropped without a word."""
    import trl

    found = tokenizer()
    pairs = [plain(), lone_bytes(), long()]
    trainer = trainer_of(trl.DPOTrainer, tmp_path, text_dataset(pairs), max_length=32)
    rows = trainer.train_dataset
    assert len(rows) == 2, "the long pair is expected to be dropped"
    end = found._id(trainer.processing_class.eos_token)
    assert rows[0]["chosen_ids"] == [*plain().chosen_token_ids, end]
    lost = found.encode("\ufffd")
    assert len(lost) > 1
    assert rows[1]["chosen_ids"][-len(lost) - 1 :] == [*lost, end]
    assert rows[1]["prompt_ids"] != lone_bytes().prompt_token_ids


def single_token_pairs() -> list[Pair]:
    """Four pairs along one path, and the pairs that text cannot carry."""
    path = tokenizer().encode("Tom has 12 apples. Then Tom buys 7 more apples. 12+7=19")
    along = [
        pair(f"path{n}", path[:n], [path[n]], [path[n] + 1 if path[n] < 300 else 5])
        for n in (2, 5, 9, len(path) - 1)
    ]
    return [*along, special(), lone_bytes(), long()]


def our_loss_and_gradients(pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    policy, start = tiny_phi(noise=0.02), tiny_phi()
    rows = [tokenize(p, tokenizer()) for p in pairs]
    zeros = torch.zeros(len(rows))
    pad = tokenizer().pad_id
    values = completion_logprobs(start, make_batch(rows, Reference(zeros, zeros), pad))
    batch = make_batch(rows, Reference(*values), pad)
    assert batch.single_token
    loss = preference_loss(policy, batch, "sigmoid", BETA).total / len(rows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


def fused(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our gradients under Phi-3's names."""
    found = {
        "model.embed_tokens.weight": gradients["embedding.weight"],
        "lm_head.weight": gradients["lm_head.weight"],
    }
    for i in range(2):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, parts in (
            ("self_attn.qkv_proj", ("attention.query", "attention.key", "attention.value")),
            ("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),
            ("self_attn.o_proj", ("attention.output",)),
            ("mlp.down_proj", ("mlp.down",)),
        ):
            matrices = [gradients[f"{ours}{part}.weight"] for part in parts]
            found[f"{theirs}{name}.weight"] = torch.cat(matrices)
    return found


def test_loss_and_gradients_equal_ours(ours, tmp_path):
    pairs = single_token_pairs()
    trainer = trainer_of(ours.PivotalDPOTrainer, tmp_path, ours.pair_dataset(pairs))
    rows = [trainer.train_dataset[i] for i in range(len(pairs))]
    value = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    value.backward()
    expected, gradients = our_loss_and_gradients(pairs)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    theirs = dict(trainer.model.named_parameters())
    for name, gradient in fused(gradients).items():
        error = (theirs[name].grad - gradient).norm() / gradient.norm()
        assert error < 1e-5, name


def test_columns_from_every_file(ours, tmp_path):
    import datasets

    pairs = all_pairs()
    expected = ours.pair_dataset(pairs).to_list()
    source = tmp_path / "pairs.jsonl"
    write_records(source, pairs)
    assert ours.pair_dataset(source).to_list() == expected
    for format in ("trl", "token-ids"):
        for ending in ("jsonl", "parquet"):
            path = tmp_path / f"{format}.{ending}"
            export(source, format, path)
            assert ours.pair_dataset(path).to_list() == expected
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "trl.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.to_list() == expected


def test_an_eval_set_and_a_stream_pass_as_they_are(ours, tmp_path):
    import datasets

    rows = ours.pair_dataset(all_pairs()).to_list()
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = trainer_of(ours.PivotalDPOTrainer, tmp_path, stream, max_length=8)
    assert list(trainer.train_dataset) == rows
    assert read_by_the_model(trainer) == sequences_of(all_pairs())
    bad = datasets.IterableDataset.from_generator(lambda: iter([{**rows[0], "chosen_ids": []}]))
    with pytest.raises(ValueError, match="chosen_ids is \\[\\]"):
        list(trainer._prepare_dataset(bad))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen_token_ids": [4000]}, "token id 4000, the model has 400 tokens"),
        ({"prompt_token_ids": [5] * 80}, "row 0 has 81 tokens, the model was made for 64"),
    ],
)
def test_what_the_model_cannot_take_is_named(ours, tmp_path, changes, words):
    given = Pair(**{**vars(plain()), **changes})
    with pytest.raises(ValueError, match=words):
        trainer_of(ours.PivotalDPOTrainer, tmp_path, ours.pair_dataset([given]))


def test_bad_rows_and_columns_are_named(ours, tmp_path):
    with pytest.raises(ValueError, match="lacks prompt_ids, chosen_ids, rejected_ids"):
        trainer_of(ours.PivotalDPOTrainer, tmp_path, text_dataset([plain()]))
    same = ours.pair_dataset([plain()]).map(lambda row: {"rejected_ids": row["chosen_ids"]})
    with pytest.raises(ValueError, match="row 0: chosen_ids and rejected_ids are the same"):
        trainer_of(ours.PivotalDPOTrainer, tmp_path, same)
    path = tmp_path / "broken.jsonl"
    export([plain(), special()], "trl", path)
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second.replace("rejected_ids", "rejected"))
    with pytest.raises(ValueError, match=r"broken.jsonl:2: rejected_ids is None"):
        ours.pair_dataset(path)
    with pytest.raises(ValueError, match="no pair to train on"):
        ours.pair_dataset([])


def test_a_collator_that_cuts_is_refused(ours, tmp_path, monkeypatch):
    class Cutting(ours.DataCollatorForPreference):
        def __call__(self, rows, return_tensors=None):
            return super().__call__([{**r, "prompt_ids": r["prompt_ids"][-4:]} for r in rows])

    def trainer(**arguments):
        return ours.PivotalDPOTrainer(**arguments, data_collator=Cutting(pad_token_id=0))

    with pytest.raises(ValueError, match="data collator does not hand"):
        trainer_of(trainer, tmp_path, ours.pair_dataset([long()]))


def test_another_trl_is_named(ours, monkeypatch):
    """As TRL 0.x: other column names; and one that would add a token."""

    class Old(ours.DataCollatorForPreference):
        def torch_call(self, examples):
            return examples[0]["prompt_input_ids"]

    class Adding(ours.DataCollatorForPreference):
        def torch_call(self, examples):
            row = {**examples[0], "chosen_ids": [*examples[0]["chosen_ids"], byte(0)]}
            return super().torch_call([row])

    for kind, words in ((Old, "fails on them"), (Adding, "changes them")):
        monkeypatch.setattr(ours, "DataCollatorForPreference", kind)
        with pytest.raises(ImportError, match=f"does not take the columns.*{words}.*needs TRL"):
            ours.PivotalDPOTrainer(model=None, train_dataset=None)
