"""A tokenizer as llama.cpp keeps it: tokens, their kinds, merges, the name of the pre-tokenizer.

`describe(tokenizer, num_rows)` gives a `GgufTokenizer`; `phiforge.model.gguf` writes it. Raises
ValueError for tokenizers that llama.cpp would split otherwise. Nothing is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from phiforge.model import bpe
from phiforge.model.tokenizer import Tokenizer

# Kinds of tokens in GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Our pattern -> llama.cpp's name of the pre-tokenizer with the same regular expression.
_NAMES = {bpe.PATTERN: "dbrx", _O200K: "gpt-4o", "ByteLevel": "gpt-2"}
# {% generation %} marks the loss span for training; other template engines do not know it.
_GENERATION = re.compile(r"{%([-+]?)\s*(end)?generation\s*([-+]?)%}")


@dataclass(frozen=True)
class GgufTokenizer:
    """What the file says about the tokenizer; lists have one entry for each row of the model."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int
    pad_id: int
    chat_template: str | None


def describe(tokenizer: Tokenizer, num_rows: int) -> GgufTokenizer:
    """The tokenizer of a model with `num_rows` embedding rows; rows without a token are unused.

    ValueError when it is not byte-level BPE with a pre-tokenizer that llama.cpp has.
    """
    definition = json.loads(tokenizer.backend.to_str())
    pre = _pre_tokenizer_name(definition)
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [UNUSED] * num_rows
    for token, index in definition["model"]["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for index, added in tokenizer.backend.get_added_tokens_decoder().items():
        tokens[index] = str(added.content)
        kinds[index] = CONTROL if added.special else USER_DEFINED
    template = tokenizer.template.source if tokenizer.template else None
    return GgufTokenizer(
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=[_merge(merge) for merge in definition["model"]["merges"]],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        chat_template=template and _plain_template(template),
    )


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _plain_template(source: str) -> str:
    """The template without generation marks: a block that is always rendered in their place."""

    def block(found: re.Match[str]) -> str:
        return f"{{%{found[1]} {'endif' if found[2] else 'if true'} {found[3]}%}}"

    return _GENERATION.sub(block, source)


def _pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words before the merges."""
    model = definition["model"]
    remedy = "convert the folder with llama.cpp's own convert_hf_to_gguf.py"
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"the tokenizer is {model['type']}, not byte-level BPE (SentencePiece, as phi-3's?); "
            f"{remedy}"
        )
    if definition.get("normalizer"):
        raise ValueError(
            f"the tokenizer normalises text ({definition['normalizer'].get('type')}), which "
            f"llama.cpp does not; {remedy}"
        )
    pattern = _pattern(definition.get("pre_tokenizer") or {})
    if pattern not in _NAMES:
        raise ValueError(
            f"the tokenizer cuts words by {pattern!r}, no pattern known to be llama.cpp's; {remedy}"
        )
    name = _NAMES[pattern]
    if model.get("ignore_merges") and name == "dbrx":
        return "llama-bpe"  # the same pattern; whole words are looked up before merging
    return name


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regular expression of `Split(pattern, isolated)` then `ByteLevel`; None for another.

    `ByteLevel` alone cuts words by GPT-2's own expression and is called by its name.
    """
    if pre_tokenizer.get("type") == "ByteLevel":
        alone = pre_tokenizer["use_regex"] and not pre_tokenizer["add_prefix_space"]
        return "ByteLevel" if alone else None
    steps = pre_tokenizer.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    plain = split["behavior"] == "Isolated" and not split["invert"]
    spaces = byte_level["add_prefix_space"] or byte_level["use_regex"]
    return split["pattern"].get("Regex") if plain and not spaces else None
