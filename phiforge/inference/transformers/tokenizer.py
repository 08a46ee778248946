"""Any tokenizer as the PromptTokenizer that generation needs.

`wrap_tokenizer(tokenizer, vocab_size, stop_ids)`: a fast tokenizer of `transformers` becomes a
phiforge Tokenizer on the same backend; others are asked through their own methods. Nothing is
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phiforge.inference.interface import PromptTokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEEDED = ("stop_ids", "encode", "encode_chat", "decode", "token_bytes")


def wrap_tokenizer(
    tokenizer: Any, vocab_size: int, stop_ids: Iterable[int] = ()
) -> PromptTokenizer:
    """A PromptTokenizer of `tokenizer`, whose own end token and `stop_ids` end an answer.

    What is one already stays as it is. `encode` adds no token, as our engine's does not: a text
    prompt is what it says, a chat gets its template's special tokens, once.
    """
    if all(hasattr(tokenizer, name) for name in _NEEDED):
        return tokenizer
    ids = {index for index in stop_ids if 0 <= index < vocab_size}
    eos = getattr(tokenizer, "eos_token_id", None)
    ids |= set() if eos is None else {int(eos)}
    if not ids:
        raise ValueError(
            "tokenizer: neither it nor the model's generation_config names an end token "
            "(eos_token_id), so no answer would end; set one"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ForeignTokenizer(tokenizer, frozenset(ids))
    return _on_backend(tokenizer, backend, vocab_size, ids)


def _on_backend(tokenizer: Any, backend: Any, vocab_size: int, ids: set[int]) -> PromptTokenizer:
    from phiforge.model.tokenizer import Tokenizer

    eos = tokenizer.eos_token or backend.id_to_token(min(ids))
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # several named ones
        template = template.get("default")
    highest = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(
        backend,
        eos=eos,
        eod=eos,
        pad=tokenizer.pad_token or eos,
        bos=tokenizer.bos_token,
        template=template,
        vocab_size=max(vocab_size, highest),
        stop=ids,
    )


class ForeignTokenizer:
    """A tokenizer without a `tokenizers` backend (SentencePiece, tiktoken, one's own)."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self.stop_ids = tokenizer, stop_ids
        self.special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        # GPT-2's alphabet: each byte of a token is spelled as a printable character.
        self._byte_of: Mapping[str, int] = getattr(tokenizer, "byte_decoder", None) or {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any that the tokenizer would put around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_chat(self, messages: Any, add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a chat by the tokenizer's own template."""
        found = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
        return list(found)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(
            [int(index) for index in ids],
            skip_special_tokens=skip_special,
            clean_up_tokenization_spaces=False,
        )

    def token_bytes(self, index: int) -> bytes:
        """The bytes one token stands for."""
        token = self._tokenizer.convert_ids_to_tokens(int(index))
        if token is None:
            return b""
        if isinstance(token, bytes):
            return token
        if index in self.special_ids:
            return token.encode()
        if self._byte_of and all(letter in self._byte_of for letter in token):
            return bytes(self._byte_of[letter] for letter in token)
        if found := _BYTE.fullmatch(token):
            return bytes.fromhex(found[1])
        return token.replace("▁", " ").encode()
