"""The tokenizer: text to token ids and back, chats with loss masks, Hugging Face folders.

Call `Tokenizer.load(folder)`, `Tokenizer.from_tiktoken(rank_file)` or `train_tokenizer(texts,
vocab_size)`. `save(folder)` writes a folder that `transformers.AutoTokenizer` loads.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from phiforge.model import bpe
from phiforge.model.chat import PHI4_TEMPLATE, Rendered, Template

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")
_ENDS_OF_TURN = (bpe.END_OF_TURN, "<|end|>", "<|eot_id|>")
_ENDS_OF_TEXT = (bpe.END_OF_TEXT, "<|end_of_text|>", "</s>")
_RESERVED = re.compile(r"<\|(dummy_|placeholder|reserved|finetune_right_pad)|<pad>|\[PAD\]")
_CHATS = (
    ({"role": "user", "content": "a"},),
    ({"role": "system", "content": "a"}, {"role": "user", "content": "b"}),
    (
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "c"},
    ),
)


class Tokenizer:
    """A byte-level (or any Hugging Face) tokenizer with its chat format and its end tokens.

    `vocab_size` counts model rows, padding rows included. `eos_id` ends a turn, `eod_id` ends a
    document, `pad_id` is a token that nothing else uses; `stop_ids` is where generation stops.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos: str,
        eod: str,
        pad: str,
        bos: str | None = None,
        template: str | None = PHI4_TEMPLATE,
        vocab_size: int | None = None,
        stop: Iterable[int] = (),
        context: int | None = None,
    ) -> None:
        self.backend = backend
        self.eos, self.eod, self.pad, self.bos = eos, eod, pad, bos
        self.context = context
        self.eos_id, self.eod_id, self.pad_id = map(self._id, (eos, eod, pad))
        self.bos_id = None if bos is None else self._id(bos)
        self.stop_ids = frozenset({self.eos_id, self.eod_id, *stop})
        rows = backend.get_vocab_size(with_added_tokens=True)
        highest = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size = max(rows, highest) if vocab_size is None else vocab_size
        if self.vocab_size < highest:
            raise ValueError(
                f"vocab_size: {self.vocab_size} rows, but the highest token id is {highest - 1}; "
                "the model and the tokenizer do not belong together"
            )
        self.template = None
        if template is not None:
            names = {"bos_token": bos or "", "eos_token": eos, "pad_token": pad}
            self.template = Template(template, tuple(names.items()))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._specials = {str(added[index].content): index for index in self.special_ids}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __len__(self) -> int:
        return self.vocab_size

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(f"special token {token!r} is not in the vocabulary")
        return index

    @cached_property
    def _plain(self) -> Backend:
        """The same model without special tokens: their strings are ordinary text to it."""
        plain = Backend(self.backend.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(self.backend, part) is not None:
                setattr(plain, part, getattr(self.backend, part))
        ordinary = [
            token
            for index, token in sorted(self.backend.get_added_tokens_decoder().items())
            if index not in self.special_ids
        ]
        plain.add_tokens(ordinary)
        return plain

    # text ---------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens' names are ordinary text unless `allow_special`."""
        tokenizer = self.backend if allow_special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all threads."""
        tokenizer = self.backend if allow_special else self._plain
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; special tokens (dummies too) are left out unless told otherwise.

        Bytes that are no whole UTF-8 character become U+FFFD; rows beyond the vocabulary vanish.
        """
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    @cached_property
    def _bytes(self) -> list[bytes]:
        byte_of = {char: bytes([byte]) for byte, char in bpe.byte_alphabet().items()}
        byte_level = "ByteLevel" in str(self.backend.decoder)
        added = set(self.backend.get_added_tokens_decoder())
        table = [b""] * self.vocab_size
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = token.encode()
            elif byte_level:
                table[index] = b"".join(byte_of[char] for char in token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                table[index] = bytes([int(token[3:5], 16)])
            else:
                table[index] = token.replace("\u2581", " ").encode()
        return table

    def token_bytes(self, index: int) -> bytes:
        """The bytes one token stands for; a special token's are its name's, a padding row's none.

        Joined over a text's tokens they are the text's UTF-8 bytes.
        """
        return self._bytes[index]

    # chats --------------------------------------------------------------------------------------

    def _template(self) -> Template:
        if self.template is None:
            raise ValueError(
                "this tokenizer has no chat template (a base model's?); prompt it with plain text, "
                "or add chat_template to tokenizer_config.json"
            )
        return self.template

    def render_chat(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The chat as text, as `transformers`' `apply_chat_template` renders it."""
        return self._template().render(messages, add_generation_prompt)

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a chat; a special token's name inside a message stays ordinary text."""
        rendered = self._template().spans(messages, add_generation_prompt)
        return [index for index, _ in self._encode_rendered(rendered)]

    def encode_chat_with_mask(self, messages: Messages) -> tuple[list[int], list[int]]:
        """(ids, mask) of a chat: 1 on assistant texts and the token that ends them, else 0."""
        rendered = self._template().spans(messages)
        spans = self._assistant_spans(rendered)
        encoded = self._encode_rendered(rendered)
        mask = [
            int(any(first <= start and end <= last for first, last in spans))
            for _, (start, end) in encoded
        ]
        return [index for index, _ in encoded], mask

    def _assistant_spans(self, rendered: Rendered) -> list[tuple[int, int]]:
        """Where the model speaks: what the template marks, else contents and their end token."""
        if self._template().has_generation:
            return list(rendered.generated)
        spans = []
        for role, (start, end) in zip(rendered.roles, rendered.contents, strict=True):
            if role != "assistant":
                continue
            found = self._special_pattern.search(rendered.text, end)
            if found is None or rendered.text[end : found.start()].strip():
                raise ValueError(
                    "chat template: no special token ends the assistant's turn, so its loss span "
                    "is unknown; mark it with {% generation %} … {% endgeneration %}"
                )
            spans.append((start, found.end()))
        return spans

    def _encode_rendered(self, rendered: Rendered) -> list[tuple[int, tuple[int, int]]]:
        """(token id, characters it stands for); special tokens count only outside messages."""
        encoded: list[tuple[int, tuple[int, int]]] = []
        at = 0

        def add_text(end: int) -> None:
            piece = self._plain.encode(rendered.text[at:end], add_special_tokens=False)
            for index, (first, last) in zip(piece.ids, piece.offsets, strict=True):
                encoded.append((index, (at + first, at + last)))

        for found in self._special_pattern.finditer(rendered.text):
            start, end = found.span()
            if any(first < end and start < last for first, last in rendered.contents):
                continue
            add_text(start)
            encoded.append((self._specials[found[0]], (start, end)))
            at = end
        add_text(len(rendered.text))
        return encoded

    # folders ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, and for a trained
        or rebuilt vocabulary the GPT-2 files vocab.json and merges.txt, as Phi-4's release has."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        byte_level = "ByteLevel" in str(self.backend.decoder)
        if byte_level:
            self.backend.model.save(str(folder))
        names = {"eos_token": self.eos, "pad_token": self.pad, "bos_token": self.bos}
        names = {key: name for key, name in names.items() if name is not None}
        added = {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in sorted(self.backend.get_added_tokens_decoder().items())
        }
        # The generic class keeps tokenizer.json as it is; transformers 5 rebuilds what calls itself
        # GPT2Tokenizer with GPT-2's own pre-tokenizer, which splits numbers otherwise.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.context or 1 << 30,
            "phiforge": {"eod_token": self.eod, "vocab_size": self.vocab_size},
            "extra_special_tokens": {},
            **names,
        }
        if self.template is not None:
            config["chat_template"] = self.template.source
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", names)

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Load a Hugging Face tokenizer folder, its end-token quirks put right.

        End of turn is the chat format's own end token, whatever `eos_token` says; the padding
        token is never an end token; Phi-4's folders get its own template, whose older form opened
        the assistant's turn unasked. ValueError when tokenizer.json is missing or broken.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give a folder that holds a tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path}: cannot be read ({error}); get the file again") from error
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        vocab = backend.get_vocab(with_added_tokens=True)
        own = config.get("phiforge", {})
        rows = own.get("vocab_size") or max(
            model.get("vocab_size") or 0, max(vocab.values(), default=-1) + 1
        )
        configured_eos = _name(config.get("eos_token"))
        eos = next((name for name in _ENDS_OF_TURN if name in vocab), configured_eos)
        eod = own.get("eod_token") or next(
            (name for name in _ENDS_OF_TEXT if name in vocab), configured_eos or eos
        )
        eos = eos or eod
        if eos is None or eod is None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: no eos_token; add one")
        bos = _name(config.get("bos_token"))
        bos = bos if bos in vocab else None
        ids = generation.get("eos_token_id", model.get("eos_token_id"))
        stop = [ids] if isinstance(ids, int) else list(ids or [])
        context = config.get("model_max_length")
        return Tokenizer(
            backend,
            eos=eos,
            eod=eod,
            pad=_choose_pad(backend, _name(config.get("pad_token")), {eos, eod, bos}, folder),
            bos=bos,
            template=_choose_template(folder, config, vocab),
            vocab_size=rows,
            stop=[index for index in stop if index < rows],
            context=context if isinstance(context, int) and context < 1 << 30 else None,
        )

    @staticmethod
    def from_tiktoken(rank_file: str | Path) -> "Tokenizer":
        """Phi-4's own tokenizer (100,352 rows) from the cl100k_base rank file."""
        return _from_vocabulary(bpe.from_ranks(Path(rank_file)), pad=bpe.PAD, context=16_384)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    whole_numbers_below: int = 100,
    whole_words: Sequence[str] = ROLES,
    num_dummies: int = 8,
) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` rows with Phi-4's pre-tokenizer.

    Every number below `whole_numbers_below` and every word of `whole_words` (after a special
    token, without a space) is one token by construction. Special tokens have the last ids, under
    Phi-4's names; the first dummy is the padding token. The same texts give the same bytes.
    """
    if num_dummies < 1:
        raise ValueError(f"num_dummies: {num_dummies} is below 1; one dummy is the padding token")
    vocabulary = bpe.learn(
        texts,
        vocab_size,
        whole_numbers_below=whole_numbers_below,
        whole_words=whole_words,
        num_dummies=num_dummies,
    )
    missing = vocab_size - len(vocabulary)
    if missing:
        warnings.warn(
            f"vocab_size: the texts yield only {len(vocabulary)} of {vocab_size} rows (no further "
            f"pair occurs twice); {missing} rows hold unused dummy tokens",
            stacklevel=2,
        )
        names = bpe.special_names(num_dummies + missing)
        vocabulary = bpe.Vocabulary(vocabulary.tokens, vocabulary.merges, names)
    return _from_vocabulary(vocabulary, pad="<|dummy_0|>")


def _from_vocabulary(vocabulary: bpe.Vocabulary, pad: str, context: int | None = None) -> Tokenizer:
    return Tokenizer(
        bpe.backend(vocabulary),
        eos=bpe.END_OF_TURN,
        eod=bpe.END_OF_TEXT,
        bos=bpe.END_OF_TEXT,
        pad=pad,
        context=context,
    )


def _choose_pad(
    backend: Backend, configured: str | None, taken: set[str | None], folder: Path
) -> str:
    """A padding token that ends nothing: Phi-4's own, the configured one, a reserved one."""
    vocab = backend.get_vocab(with_added_tokens=True)
    if bpe.PAD in vocab and bpe.END_OF_TURN in vocab:
        return bpe.PAD  # copies of Phi-4 differ, and <|dummy_87|> is </think> in its successor
    if configured in vocab and configured not in taken:
        return configured  # pyright: ignore[reportReturnType]
    specials = [
        str(token.content)
        for _, token in sorted(backend.get_added_tokens_decoder().items())
        if token.special and token.content not in taken
    ]
    reserved = [name for name in specials if _RESERVED.search(name)]
    unknown = [name for name in ("<unk>", "[UNK]") if name in vocab and name not in taken]
    for name in reserved + unknown:
        return name
    chosen = next(name for name in taken if name is not None)
    warnings.warn(
        f"{folder}: no token is free for padding, so padding is {chosen!r}; phiforge masks padding "
        "explicitly, other programs may mask that token's loss",
        stacklevel=3,
    )
    return chosen


def _choose_template(
    folder: Path, config: Mapping[str, Any], vocab: Mapping[str, int]
) -> str | None:
    """The folder's chat template; Phi-4's own in place of one that renders as it did."""
    jinja = folder / "chat_template.jinja"
    source = jinja.read_text() if jinja.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    phi4 = all(name in vocab for name in ("<|im_start|>", "<|im_sep|>", bpe.END_OF_TURN))
    if source is None or not phi4:
        return PHI4_TEMPLATE if phi4 else source
    ours, theirs = Template(PHI4_TEMPLATE), Template(source)
    try:
        prompted = all(theirs.render(chat, True) == ours.render(chat, True) for chat in _CHATS)
        unprompted = all(theirs.render(chat) == ours.render(chat) for chat in _CHATS)
    except ValueError:
        return source
    if prompted and not unprompted:
        warnings.warn(
            f"{folder}: its chat template opens the assistant's turn unasked (a known fault of "
            "Phi-4's first upload); using the corrected template",
            stacklevel=3,
        )
    return PHI4_TEMPLATE if prompted else source


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); get the file again") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
