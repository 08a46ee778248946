"""Models of `transformers`: an independent check of our engine, and a generator of their own."""

import sys
from types import SimpleNamespace

import pytest
import torch
from plain_loop import KERNELS, Letters, make_model

from phiforge.inference.engine import Engine
from phiforge.inference.engine.sample import NonFiniteLogits
from phiforge.inference.interface import Generator
from phiforge.inference.transformers import TransformersModel, scoring, wrap_tokenizer
from phiforge.inference.transformers.model import _announce
from phiforge.model.huggingface import save
from phiforge.model.tokenizer import train_tokenizer

PROMPTS = [tuple(range(30, 30 + k)) for k in (1, 7, 64, 90)] + [(200, 17, 5)]
PATH = tuple(range(40, 100))
# A path's prefixes, a prompt that only begins like them, one prompt twice.
PREFIXES = [PATH[:k] for k in range(60, 2, -14)] + [(*PATH[:30], 7, 8), (200, 17, 5), (200, 17, 5)]
LAWS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.05},
]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_answers_are_those_of_transformers(kernels, tmp_path):
    model = make_model(sliding_window=100)
    save(model, None, tmp_path / "model", dtype="float32")
    theirs = loaded(tmp_path / "model")
    mine = Engine(model, Letters(), rows=3, kernels=kernels)
    found = mine.generate(PROMPTS, max_tokens=40, temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        row = torch.tensor([prompt])
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
        expected = theirs.generate(row, attention_mask=torch.ones_like(row), **settings)[
            0, len(prompt) :
        ]
        assert completion.token_ids == tuple(expected.tolist())


# ------------------------------------------------------------------- the same weights, two engines


@pytest.fixture(scope="module", params=[None, 20], ids=["full", "sliding"])
def pair(request, tmp_path_factory):
    """Our engine and a `transformers` model on the same weights."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    model = make_model(sliding_window=request.param)
    save(model, None, folder, dtype="float32")
    return Engine(model, Letters(), rows=8), loaded(folder)


def same(mine, theirs) -> None:
    """The same tokens, texts and ends; log-probabilities up to rounding."""
    for row, expected in zip(theirs, mine, strict=True):
        for a, b in zip(row, expected, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            assert (a.logprobs is None) == (b.logprobs is None)
            if b.logprobs is not None:
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_samples_are_our_engines(pair, law):
    engine, model = pair
    settings = {"n": 2, "first_index": 3, "seed": 7, "max_tokens": 30, "logprobs": True, **law}
    theirs = TransformersModel(model, Letters(), rows=8)
    generator: Generator = theirs
    prompts = [*PROMPTS, *PREFIXES]
    counted: list[int] = []
    found = generator.generate(prompts, progress=counted.append, **settings)
    same(engine.generate(prompts, **settings), found)
    assert sum(counted) == 2 * len(prompts)
    ends = {c.finish_reason for row in found for c in row}
    assert ends == ({"stop", "length"} if law["temperature"] else {"length"})
    assert theirs.num_generated_tokens > 0


def test_rows_change_nothing(pair):
    engine, model = pair
    settings = {"n": 3, "max_tokens": 6, "temperature": 0.9}
    expected = engine.generate(PREFIXES, **settings)
    for rows in (1, 4, 64):
        same(
            expected, TransformersModel(model, Letters(), rows=rows).generate(PREFIXES, **settings)
        )


def test_stop_strings_and_the_context_end_answers_as_the_engines(pair):
    engine, model = pair
    theirs = TransformersModel(model, Letters())
    plain = engine.generate(PROMPTS, max_tokens=30, temperature=0.8, n=3)
    stops = sorted({c.text[2:4] for row in plain for c in row if c.text[2:4].isascii()})[:4]
    stops = [stop for stop in stops if len(stop) == 2]
    assert stops
    settings = {"max_tokens": 30, "temperature": 0.8, "n": 3, "stop": stops}
    expected = engine.generate(PROMPTS, **settings)
    assert expected != plain
    same(expected, theirs.generate(PROMPTS, **settings))
    long = [tuple(range(3, 192))]  # of 192 tokens, 189 are taken
    (row,) = theirs.generate(long, max_tokens=30, temperature=0.0)
    same(engine.generate(long, max_tokens=30, temperature=0.0), [row])
    assert len(row[0].token_ids) <= 3


def test_a_forbidden_first_token_is_the_engines(pair):
    engine, model = pair
    theirs = TransformersModel(model, Letters(), rows=8)
    likely = engine.generate(PREFIXES, max_tokens=1, temperature=0.0)
    banned = [{row[0].token_ids[0], 5} for row in likely]
    banned[-1] = set()  # beside the same prompt with a ban
    for temperature in (0.0, 1.0):
        settings = {"n": 3, "max_tokens": 12, "temperature": temperature, "logprobs": True}
        found = theirs.generate(PREFIXES, forbidden_first=banned, **settings)
        same(engine.generate(PREFIXES, forbidden_first=banned, **settings), found)
        firsts = [{c.token_ids[0] for c in row} for row in found]
        assert not any(first & ban for first, ban in zip(firsts, banned, strict=True))
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        theirs.generate(PREFIXES[:2], forbidden_first=[[1]])
    with pytest.raises(ValueError, match="token id 300 is unknown"):
        theirs.generate(PREFIXES[:1], forbidden_first=[[300]])
    with pytest.raises(ValueError, match="none of the 300 tokens is left"):
        theirs.generate(PREFIXES[:1], forbidden_first=[range(300)])


def test_a_path_is_computed_once_for_all_its_prefixes(pair):
    _, model = pair
    theirs = TransformersModel(model, Letters(), rows=16)
    theirs.generate([PATH[:end] for end in range(1, 61)], n=4, max_tokens=3)
    assert theirs.num_prefilled_tokens == len(PATH)
    theirs.generate([PATH, (*PATH, 7, 8)], n=4, max_tokens=3, first_index=9)
    assert theirs.num_prefilled_tokens == len(PATH) + 2, "kept from call to call"


def test_what_is_kept_is_bounded_and_forgotten_with_the_weights(tmp_path):
    model = make_model()
    save(model, None, tmp_path / "model", dtype="float32")
    theirs = TransformersModel(loaded(tmp_path / "model"), Letters(), prefix_tokens=100)
    for prompt in (PROMPTS[3], PATH, PATH, PROMPTS[3], PATH):
        theirs.generate([prompt], max_tokens=1)
    assert theirs.num_prefilled_tokens == 90 + 60 + 90 + 60, "150 tokens do not fit into 100"
    before = theirs.generate([PATH], max_tokens=8, temperature=0.0)
    done = theirs.num_prefilled_tokens
    with torch.no_grad():
        theirs.model.get_input_embeddings().weight.mul_(-1.0)
        model.embedding.weight.mul_(-1.0)
    after = theirs.generate([PATH], max_tokens=8, temperature=0.0)
    assert theirs.num_prefilled_tokens == done + len(PATH)
    assert after != before
    same(Engine(model, Letters()).generate([PATH], max_tokens=8, temperature=0.0), after)


@pytest.mark.parametrize("most_logits", [1 << 25, 300 * 40])
def test_scores_are_the_engines(pair, most_logits, monkeypatch):
    engine, model = pair
    monkeypatch.setattr(scoring, "_LOGITS", most_logits)  # the second: a few tokens a pass
    theirs = TransformersModel(model, Letters(), rows=5)
    prompts = [*PROMPTS, *PREFIXES]
    completions = [[(3 * k + i) % 300 for i in range(k)] for k in range(len(prompts))]
    expected = engine.score(prompts, completions)
    found = theirs.score(prompts, completions)
    assert [len(row) for row in found] == [len(row) for row in completions]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_scores_at_a_temperature_are_those_of_the_sampler(pair):
    _, model = pair
    theirs = TransformersModel(model, Letters())
    (row,) = theirs.score([PATH[:20]], [PATH[20:25]], temperature=0.5)
    with torch.no_grad():
        logits = model(torch.tensor([PATH[:25]])).logits[0, 19:24]
    expected = torch.log_softmax(logits / 0.5, dim=-1)[range(5), list(PATH[20:25])]
    assert row == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="temperature is 0"):
        theirs.score([PATH], [[1]], temperature=0)


# ------------------------------------------------------------------------------ any architecture

SHARED = {
    "llama": SMALL,
    "qwen2": SMALL,
    "mistral": {**SMALL, "sliding_window": 12},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 12},
    "gpt2": {"vocab_size": 300, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ALONE = {
    "lfm2": ({**SMALL, "layer_types": ["conv", "full_attention"]}, True),
    "mamba": (
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        True,
    ),
    "rwkv": (
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
        False,
    ),
}


def random_model(kind: str, settings: dict):
    """A small model of some architecture, sure of some of its tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"eos_token_id": 1, "bos_token_id": 0, **settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model.eval()


def check_against_plain_passes(theirs: TransformersModel) -> None:
    """Every log-probability, drawn or scored, is a plain pass's over its whole row."""
    prompts = [PATH[:k] for k in (1, 2, 17, 30, 35)] + [(200, 17, 5), (*PATH[:17], 9, 8)]
    found = theirs.generate(prompts, n=2, max_tokens=20, temperature=0.8, logprobs=True)
    scores = theirs.score(prompts, [row[0].token_ids for row in found])
    for prompt, row, scored in zip(prompts, found, scores, strict=True):
        for completion in row:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = theirs.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits.float(), dim=-1)
            expected = expected[range(len(logits)), list(completion.token_ids)].tolist()
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
            if completion is row[0]:
                assert scored == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", SHARED)
def test_architectures_share_their_prompts(kind):
    theirs = TransformersModel(random_model(kind, SHARED[kind]), Letters(), rows=6)
    check_against_plain_passes(theirs)
    assert theirs.num_prefilled_tokens == 35 + 3 + 2, "a path once, and what is not on it"


@pytest.mark.parametrize("kind", ALONE)
def test_other_architectures_go_prompt_by_prompt_and_say_so_once(kind, capsys):
    settings, cached = ALONE[kind]
    _announce.cache_clear()
    theirs = TransformersModel(random_model(kind, settings), Letters(), rows=6)
    check_against_plain_passes(theirs)
    theirs.generate([PATH], max_tokens=1)
    said = [line for line in capsys.readouterr().err.splitlines() if "no shared prompts" in line]
    assert len(said) == 1
    assert ("whole rows at every token" in said[0]) == (not cached)


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"vocab_size": 300, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration, an encoder-decoder"):
        TransformersModel(T5ForConditionalGeneration(T5Config(**settings)), Letters())


def test_rope_that_looks_at_the_whole_batch_ends_where_it_would():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    settings = {**SMALL, "rope_parameters": rope, "original_max_position_embeddings": 64}
    theirs = TransformersModel(random_model("phi3", settings), Letters())
    assert theirs.context == 64
    (row,) = theirs.generate([PATH], max_tokens=20, temperature=0.0)
    assert len(row[0].token_ids) <= 4


def test_damaged_weights_are_named(pair):
    _, model = pair
    head = model.get_output_embeddings().weight
    before = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    theirs = TransformersModel(model, Letters())
    try:
        with pytest.raises(NonFiniteLogits, match="prompt 0, sample 0, token 0"):
            theirs.generate([PATH], max_tokens=2)
        with pytest.raises(NonFiniteLogits, match="completion 0"):
            theirs.score([PATH], [[1]])
    finally:
        with torch.no_grad():
            head.copy_(before)


def test_a_model_in_training_is_asked_without_dropout_and_trains_on(pair):
    _, model = pair
    theirs = TransformersModel(model, Letters())
    expected = theirs.generate([PATH], max_tokens=5)
    model.train()
    try:
        assert theirs.generate([PATH], max_tokens=5) == expected
        assert model.training
    finally:
        model.eval()


# ------------------------------------------------------------------------------------- tokenizers


def test_a_folder_answers_as_our_engine_reads_it(tmp_path):
    tokenizer = train_tokenizer(["some words and äöü to learn from"] * 3, 380, num_dummies=2)
    model = make_model(vocab_size=tokenizer.vocab_size)
    save(model, tokenizer, tmp_path / "model", dtype="float32")
    mine = Engine.from_folder(tmp_path / "model")
    theirs = TransformersModel.from_folder(tmp_path / "model", dtype="float32")
    prompts = ["some words", [5, 6], [{"role": "user", "content": "learn <|im_end|>"}]]
    settings = {"n": 3, "max_tokens": 20, "temperature": 0.9}
    same(mine.generate(prompts, **settings), theirs.generate(prompts, **settings))
    assert theirs.tokenizer.stop_ids == mine.tokenizer.stop_ids
    assert theirs.name == "transformers Phi3ForCausalLM float32 cpu"


def test_a_byte_level_tokenizer_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    ours = train_tokenizer(["some words and äöü to learn from"] * 3, 380, num_dummies=2)
    ours.save(tmp_path)
    wrapped = wrap_tokenizer(AutoTokenizer.from_pretrained(tmp_path), 384, [7, 999])
    text = "words äö \U0001f600 <|im_end|>"
    ids = wrapped.encode(text)
    assert ids == ours.encode(text)
    assert b"".join(map(wrapped.token_bytes, ids)) == text.encode()
    assert wrapped.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}]
    assert wrapped.encode_chat(chat, True) == ours.encode_chat(chat, True)
    assert wrapped.stop_ids == {7, ours.eos_id}


def sentencepiece_like():
    """Llama's kind: a leading blank, bytes where there is no piece, <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab |= {"▁": 259, "h": 260, "i": 261, "hi": 262, "▁hi": 263}
    merges = [("h", "i"), ("▁", "hi")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}hi{% endif %}"
    )
    return tokenizer


def test_a_sentencepiece_tokenizer_of_transformers():
    tokenizer = sentencepiece_like()
    wrapped = wrap_tokenizer(tokenizer, 264)
    assert tokenizer("hi")["input_ids"] == [1, 263]
    assert wrapped.encode("hi") == [263], "a text is what it says"
    assert wrapped.encode_chat([{"role": "user", "content": "hi"}], True).count(1) == 1
    ids = wrapped.encode("hi é")
    assert b"".join(map(wrapped.token_bytes, ids)) == " hi é".encode()
    assert wrapped.stop_ids == {2}
    assert wrapped.decode([263, 2]) == "hi"


class Foreign:
    """A tokenizer without a `tokenizers` backend, with GPT-2's way to spell bytes."""

    eos_token_id, all_special_ids = 1, (0, 1)
    byte_decoder = {"a": 97, "Ġ": 32, "Ã": 195, "¤": 164}  # noqa: RUF012
    tokens = ("<s>", "</s>", "a", "Ġa", "Ã", "¤", "<0x0A>", "▁b", b"\xff")

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [2 for _ in text]

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
        assert tokenize
        assert not return_dict
        return [0, *[2 for m in messages for _ in m["content"]], *[3] * add_generation_prompt]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return "".join("a" for i in ids if i > 1 or not skip_special_tokens)

    def convert_ids_to_tokens(self, index):
        return self.tokens[index] if index < len(self.tokens) else None


def test_a_foreign_tokenizer():
    wrapped = wrap_tokenizer(Foreign(), 10, [8])
    assert wrapped.encode("aa") == [2, 2], "no <s> before it"
    assert wrapped.encode_chat([{"role": "user", "content": "a"}], True) == [0, 2, 3]
    assert wrapped.decode([2, 1]) == "a"
    assert wrapped.stop_ids == {1, 8}
    found = [wrapped.token_bytes(index) for index in range(10)]
    assert found == [b"<s>", b"</s>", b"a", b" a", b"\xc3", b"\xa4", b"\n", b" b", b"\xff", b""]


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no answer would end"):
        wrap_tokenizer(SimpleNamespace(eos_token_id=None), 10)


def test_end_tokens_of_the_generation_config_end_answers():
    model = random_model("llama", SMALL)
    model.generation_config.eos_token_id = [1, 263]
    assert TransformersModel(model, sentencepiece_like()).tokenizer.stop_ids == {1, 2, 263}


def test_the_extra_is_named_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'phiforge\[transformers\]'"):
        TransformersModel(SimpleNamespace(), Letters())
