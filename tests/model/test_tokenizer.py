"""The tokenizer against tiktoken and transformers, and what it promises by construction."""

import json
import os
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.model.tokenizer import ROLES, Tokenizer, train_tokenizer

TEXTS = [
    f"Tom has {n} apples, the user buys {n * 7} more. The assistant systematically says: "
    f"{n}+{n * 7}={n * 8}.\n    def f(x):\n        return x  # isn't it\n"
    for n in range(300)
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 12+30? "},
    {"role": "assistant", "content": "42\n"},
    {"role": "user", "content": "And 1?"},
]


def train(**settings_: int) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(TEXTS, settings_.pop("vocab_size", 480), **settings_)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


@pytest.mark.parametrize("before", ["", " ", "a", "=", "+", "\n", "$", "(", "é", "x ", "-", "\t"])
@pytest.mark.parametrize("after", ["", " ", "a", "+", ".", "%", "\n", "é"])
def test_every_number_below_100_is_one_token(tokenizer: Tokenizer, before: str, after: str):
    for number in range(100):
        ids = tokenizer.encode(f"{before}{number}{after}")
        assert str(number).encode() in [tokenizer.token_bytes(index) for index in ids]


def test_numbers_below_1000_by_construction():
    larger = train(vocab_size=1400, whole_numbers_below=1000)
    assert all(len(larger.encode(str(number))) == 1 for number in range(1000))
    assert len(larger.encode("1000")) == 2


def test_no_learned_merge_holds_a_digit(tokenizer: Tokenizer):
    tokens = [tokenizer.token_bytes(index) for index in range(256, tokenizer.eod_id)]
    assert sorted(t for t in tokens if any(48 <= byte < 58 for byte in t)) == [
        str(number).encode() for number in range(10, 100)
    ]


def test_vocabulary_size_is_exact_and_specials_come_last(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == 480
    assert tokenizer.backend.get_vocab_size() == 480
    names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    names += ["<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endofprompt|>", "<|dummy_0|>"]
    first = tokenizer.eod_id
    assert [tokenizer.token_bytes(first + at).decode() for at in range(9)] == names
    assert tokenizer.pad_id == first + 8
    assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.eod_id}
    assert tokenizer.pad_id not in tokenizer.stop_ids


def test_role_words_are_one_token(tokenizer: Tokenizer):
    assert [len(tokenizer.encode(role)) for role in ROLES] == [1, 1, 1]


def test_same_texts_give_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "a")
    train().save(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_too_little_text_fills_up_with_dummies():
    with pytest.warns(UserWarning, match="unused dummy"):
        small = train_tokenizer(["ab"], 300, whole_numbers_below=10)
    assert small.vocab_size == 300


def test_too_small_a_vocabulary_names_the_least():
    with pytest.raises(ValueError, match="at least 362"):
        train_tokenizer(TEXTS, 300)


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_text_comes_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert not set(ids) & tokenizer.special_ids


def test_special_names_are_text_unless_allowed(tokenizer: Tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == "<|im_end|>"
    assert tokenizer.encode_batch(["<|im_end|>", "a"]) == [
        tokenizer.encode("<|im_end|>"),
        tokenizer.encode("a"),
    ]


def test_chat_renders_as_the_report_says(tokenizer: Tokenizer):
    assert tokenizer.render_chat(CHAT[:2], add_generation_prompt=True) == (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>"
        "<|im_start|>user<|im_sep|> What is 12+30? <|im_end|><|im_start|>assistant<|im_sep|>"
    )
    assert tokenizer.render_chat(CHAT[:1]).endswith("Be brief.<|im_end|>")


def test_mask_covers_answers_and_their_end(tokenizer: Tokenizer):
    ids, mask = tokenizer.encode_chat_with_mask(CHAT)
    assert ids == tokenizer.encode_chat(CHAT)
    learned = [index for index, learn in zip(ids, mask, strict=True) if learn]
    assert tokenizer.decode(learned, skip_special=False) == "42\n<|im_end|>"
    prompt = tokenizer.encode_chat(CHAT[:2], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert mask[: len(prompt)] == [0] * len(prompt)


pieces = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "assistant", "<|im_sep|>", "hi", " ", "\n", "<|"]
    )
)


@settings(max_examples=80, deadline=None)
@given(contents=st.lists(pieces, min_size=1, max_size=4))
def test_a_message_cannot_end_its_turn(tokenizer: Tokenizer, contents: list[list[str]]):
    roles = ("user", "assistant")
    chat = [{"role": roles[at % 2], "content": "".join(parts)} for at, parts in enumerate(contents)]
    ids, mask = tokenizer.encode_chat_with_mask(chat)
    assert ids.count(tokenizer.eos_id) == len(chat)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render_chat(chat)
    expected = sum(len(tokenizer.encode(message["content"])) + 1 for message in chat[1::2])
    assert sum(mask) == expected


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user<|im_sep|>", "content": "a"}, r"messages\[0\].role"),
        ({"role": "user", "content": None}, r"messages\[0\].content: NoneType"),
        ({"role": "user", "content": "a", "name": "b"}, "exactly 'role' and 'content'"),
    ],
)
def test_a_bad_message_is_named(tokenizer: Tokenizer, message: dict, error: str):
    with pytest.raises(ValueError, match=error):
        tokenizer.encode_chat([message])


def test_folder_round_trip_and_transformers(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for name in ("vocab_size", "eos_id", "eod_id", "pad_id", "bos_id", "stop_ids"):
        assert getattr(again, name) == getattr(tokenizer, name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*TEXTS[:50], "Don't 12345   x\n\n y'LL 99", "<|im_end|>héllo\tÀ\u3000x"]:
        ids = tokenizer.encode(text, allow_special=True)
        assert theirs(text).input_ids == ids == again.encode(text, allow_special=True)
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special=False) == text


def test_chat_template_is_transformers_byte_for_byte(tokenizer: Tokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chats = [CHAT, CHAT[:1], CHAT[1:2], [CHAT[1], CHAT[1]], [{"role": "user", "content": ""}]]
    for chat in chats:
        for prompt in (False, True):
            rendered = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert rendered == tokenizer.render_chat(chat, prompt)
    both = theirs.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (both["input_ids"], both["assistant_masks"]) == tokenizer.encode_chat_with_mask(CHAT)


OLD_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>"
    "<|im_start|>assistant<|im_sep|>'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|im_end|>'}}"
    "{% else %}{{'<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
    "'<|im_end|>'}}{% endif %}{% endfor %}"
)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    path.write_text(json.dumps(config))


def test_the_first_uploads_faults_are_put_right(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    edit(
        tmp_path,
        chat_template=OLD_TEMPLATE,
        eos_token="<|endoftext|>",
        pad_token={"content": "<|endoftext|>"},
        phiforge=None,
    )
    with pytest.warns(UserWarning, match="opens the assistant's turn unasked"):
        again = Tokenizer.load(tmp_path)
    assert (again.eos_id, again.eod_id) == (tokenizer.eos_id, tokenizer.eod_id)
    assert again.pad_id == tokenizer.pad_id
    assert again.encode_chat_with_mask(CHAT) == tokenizer.encode_chat_with_mask(CHAT)


OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_another_templates_mask_without_generation_marks(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    edit(tmp_path, chat_template=OTHER_TEMPLATE)
    other = Tokenizer.load(tmp_path)
    chat = [CHAT[1], {"role": "assistant", "content": "42"}, CHAT[3]]
    ids, mask = other.encode_chat_with_mask(chat)
    assert other.decode(ids, skip_special=False) == other.render_chat(chat)
    learned = [index for index, learn in zip(ids, mask, strict=True) if learn]
    assert other.decode(learned, skip_special=False) == "42<|im_end|>"
    prompt = other.encode_chat(chat[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt


def test_a_sentencepiece_like_folder(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "H", "i", "Hi", "\u2581Hi"]
    merges = [("H", "i"), ("\u2581", "Hi")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|placeholder1|>", "<|end|>")
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    )
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<s>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [
        ours.backend.id_to_token(index) for index in (ours.eos_id, ours.eod_id, ours.pad_id)
    ] == [
        "<|end|>",
        "<|endoftext|>",
        "<|placeholder1|>",
    ]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi é"}]
    ids, mask = ours.encode_chat_with_mask(chat)
    assert ids == theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    learned = [index for index, learn in zip(ids, mask, strict=True) if learn]
    assert b"".join(map(ours.token_bytes, learned)).decode() == "Hi é<|end|>"


def test_a_template_that_rewrites_texts_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    edit(tmp_path, chat_template="{{ messages[0].content[:1] }}")
    with pytest.raises(ValueError, match="rewrites or omits message texts"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "ab"}])


def test_missing_and_broken_files_are_named(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(tmp_path)


# Phi-4's own tokenizer -------------------------------------------------------------------------

CL100K = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # the name tiktoken and litellm give the file


def rank_file() -> Path | None:
    places = [os.environ.get("PHIFORGE_CL100K", "")]
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if folder := os.environ.get(variable):
            places.append(str(Path(folder) / CL100K))
    try:
        from importlib.util import find_spec

        spec = find_spec("litellm")
    except ImportError:
        spec = None
    for folder in (spec and spec.submodule_search_locations) or []:
        places.append(str(Path(folder) / "litellm_core_utils" / "tokenizers" / CL100K))
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


needs_ranks = pytest.mark.skipif(
    rank_file() is None, reason="no cl100k_base rank file: set PHIFORGE_CL100K or install litellm"
)


@pytest.fixture(scope="module")
def phi4() -> Tokenizer:
    path = rank_file()
    assert path is not None
    return Tokenizer.from_tiktoken(path)


@needs_ranks
def test_phi4_vectors(phi4: Tokenizer):
    text = "<|im_start|>Hello<|im_sep|> World<|im_end|><|dummy_85|>"
    expected = [100264, 9906, 100266, 4435, 100265, 100349]
    assert phi4.encode(text, allow_special=True) == expected
    assert [phi4.encode(role) for role in ROLES] == [[9125], [882], [78191]]
    assert (phi4.vocab_size, phi4.eos_id, phi4.eod_id, phi4.pad_id) == (
        100_352,
        100265,
        100257,
        100349,
    )
    assert phi4.encode("<|endofprompt|><|dummy_0|><|dummy_3|><|dummy_4|>", True) == [
        100276,
        100256,
        100263,
        100267,
    ]


@needs_ranks
def test_phi4_equals_tiktoken(phi4: Tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    from phiforge.model.bpe import PATTERN

    ranks = load_tiktoken_bpe(str(rank_file()))
    theirs = tiktoken.Encoding("cl100k", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    random_ = random.Random(0)
    words = [
        "don't",
        "WE'LL",
        "12345",
        "  ",
        "\n\n",
        "\t",
        " x",
        "é",
        "日本",
        "🙂",
        "'S",
        "_",
        "!!",
    ]
    words += ["\r\n", "\u00a0", "ß", "the", " Straße", "{};", " 7", "½", "\u0301", "\x00", "Ⅳ"]
    for _ in range(3000):
        text = "".join(random_.choice(words) for _ in range(random_.randrange(1, 25)))
        text += "".join(chr(random_.randrange(32, 0xD7FF)) for _ in range(random_.randrange(8)))
        assert phi4.encode(text) == theirs.encode_ordinary(text), repr(text)


@needs_ranks
def test_phi4_folder_quirks(phi4: Tokenizer, tmp_path: Path):
    phi4.save(tmp_path)
    edit(tmp_path, pad_token="<|dummy_87|>", eos_token="<|im_end|>")
    assert Tokenizer.load(tmp_path).pad_id == 100349
