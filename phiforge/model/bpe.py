"""Byte-level byte-pair encoding with Phi-4's pre-tokenizer: train one, or rebuild cl100k's.

Call `learn(texts, vocab_size)` or `from_ranks(rank_file)`; both give a `Vocabulary` that
`backend(vocabulary)` turns into a `tokenizers.Tokenizer`. Writes nothing.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# The older cl100k pattern. The newer one with possessive quantifiers means the same to tiktoken's
# regular-expression engine, but not to the one inside `tokenizers`.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, END_OF_TURN, PAD = "<|endoftext|>", "<|im_end|>", "<|dummy_85|>"
NAMED_SPECIALS = (
    END_OF_TEXT,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|im_start|>",
    END_OF_TURN,
    "<|im_sep|>",
    "<|endofprompt|>",
)
CL100K_RANKS = 100_256


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id (bytes first, then merged tokens), the merges that make them, the specials."""

    tokens: tuple[str, ...]  # in GPT-2's byte alphabet: every byte is one printable character
    merges: tuple[tuple[str, str], ...]
    specials: tuple[str, ...]  # their ids follow the tokens

    def __len__(self) -> int:
        return len(self.tokens) + len(self.specials)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's map from each of the 256 bytes to one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def special_names(num_dummies: int) -> tuple[str, ...]:
    """Phi-4's special tokens for a small vocabulary: the named ones, then `<|dummy_N|>`."""
    return (*NAMED_SPECIALS, *(f"<|dummy_{index}|>" for index in range(num_dummies)))


def phi4_specials() -> tuple[str, ...]:
    """The 96 special tokens of ids 100256..100351, in Phi-4's exact order."""
    dummy = [f"<|dummy_{index}|>" for index in range(88)]
    return (
        dummy[0],
        *NAMED_SPECIALS[:4],
        *dummy[1:4],
        *NAMED_SPECIALS[4:7],
        *dummy[4:13],
        NAMED_SPECIALS[7],
        *dummy[13:],
    )


def _pre_tokenizer(digits_apart: bool = False) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if digits_apart:
        steps.insert(0, pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"))
    return pre_tokenizers.Sequence(steps)


def backend(vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a vocabulary, special tokens added at its end."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(vocabulary.merges)))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in vocabulary.specials]
    )
    return tokenizer


def _number_merges(below: int) -> list[tuple[str, str]]:
    """Merges that make every number 10..below-1 one token.

    Of three digits either the first two or the last two join first, whichever pair is the lower
    number, so both ways on to the whole are there.
    """
    merges = [(str(number)[:-1], str(number)[-1]) for number in range(10, below)]
    return merges + [
        (str(number)[0], str(number)[1:]) for number in range(100, below) if number % 100 >= 10
    ]


def _trained_merges(texts: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """The `num_merges` most useful merges of the texts, none of them over digits."""
    if num_merges <= 0:
        return []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(digits_apart=True)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(byte_alphabet().values()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def _apply(merges: Sequence[tuple[str, str]], word: str) -> list[str]:
    """What byte-pair encoding with these merges makes of one word."""
    rank = {merge: index for index, merge in enumerate(merges)}
    parts = list(word)
    while len(parts) > 1:
        pairs = [(rank.get(pair, len(rank)), at) for at, pair in enumerate(pairwise(parts))]
        best, at = min(pairs)
        if best == len(rank):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _word_merges(merges: list[tuple[str, str]], words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that, appended last, make each word one token and change nothing else before it."""
    added: list[tuple[str, str]] = []
    for word in words:
        parts = _apply(merges + added, word)
        prefix = parts[0]
        for part in parts[1:]:
            added.append((prefix, part))
            prefix += part
    return added


def learn(
    texts: Iterable[str],
    vocab_size: int,
    *,
    whole_numbers_below: int = 100,
    whole_words: Sequence[str] = (),
    num_dummies: int = 8,
) -> Vocabulary:
    """Train on texts a vocabulary of at most `vocab_size` rows, deterministically.

    Merges of whole numbers come first by construction, and no learned merge holds a digit, so a
    number below `whole_numbers_below` is one token wherever it stands. `whole_words` (ASCII
    letters) become one token each through merges appended last. Fewer rows than asked for come
    back when the texts have no further pair that occurs twice.
    """
    if not 1 <= whole_numbers_below <= 1000:
        raise ValueError(
            f"whole_numbers_below: {whole_numbers_below} is not in 1..1000; the pre-tokenizer "
            "cuts numbers into groups of at most three digits"
        )
    specials = special_names(num_dummies)
    numbers = _number_merges(whole_numbers_below)
    num_numbers = len(_results(numbers))
    room = vocab_size - 256 - len(specials) - num_numbers
    if room < 0:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small: 256 bytes, {len(specials)} special tokens and "
            f"{num_numbers} numbers need at least {vocab_size - room}; raise it, or lower "
            "whole_numbers_below or num_dummies"
        )
    learned = _trained_merges(texts, room)
    words = _word_merges(learned, whole_words)
    while learned and len(_results([*learned, *words])) > room:
        learned = learned[:-1]
        words = _word_merges(learned, whole_words)
    if len(_results([*learned, *words])) > room:
        words = []  # hardly more rows than bytes and numbers: whole words do not fit
    merges = [*numbers, *learned, *words]
    alphabet = byte_alphabet()
    tokens = [*(alphabet[byte] for byte in range(256)), *_results(merges)]
    return Vocabulary(tuple(tokens), tuple(merges), specials)


def _results(merges: Sequence[tuple[str, str]]) -> list[str]:
    """The tokens that merges make, in order; two merges may make the same one."""
    return list(dict.fromkeys(left + right for left, right in merges))


def read_ranks(rank_file: Path) -> list[bytes]:
    """Read a tiktoken rank file (lines of base64 token and rank) as tokens in rank order."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(rank_file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError as error:
            raise ValueError(
                f"{rank_file}:{number}: not a tiktoken rank line (base64 token, space, rank); give "
                "the unchanged cl100k_base rank file"
            ) from error
    if sorted(ranks) != list(range(CL100K_RANKS)):
        raise ValueError(
            f"{rank_file}: {len(ranks)} ranks; Phi-4's tokenizer is built from cl100k_base, which "
            f"has {CL100K_RANKS} without holes"
        )
    return [ranks[rank] for rank in range(CL100K_RANKS)]


def _split_of(token: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that makes a token: its encoding with lower ranks alone has two parts."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        candidates = [
            (rank.get(left + right, len(rank)), at)
            for at, (left, right) in enumerate(pairwise(parts))
        ]
        best, at = min(candidates)
        if best >= rank[token]:
            raise ValueError(f"token {token!r} cannot be made of lower ranks: not a BPE rank file")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def from_ranks(rank_file: Path) -> Vocabulary:
    """Phi-4's vocabulary (100,352 rows) from the cl100k_base rank file; merges are recovered."""
    tokens = read_ranks(rank_file)
    rank = {token: index for index, token in enumerate(tokens)}
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in tokens:
        if len(token) > 1:
            left, right = _split_of(token, rank)
            merges.append((spell(left), spell(right)))
    return Vocabulary(tuple(map(spell, tokens)), tuple(merges), phi4_specials())
