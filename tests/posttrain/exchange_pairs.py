"""A byte-level tokenizer and pairs that text cannot carry; shared by the exchange tests."""

import functools
import warnings

from phiforge.core.records import Pair
from phiforge.model.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["Tom has 12 apples. Then Tom buys 7 more apples.", "12+7=19", "Answer: 19"] * 4


@functools.cache
def tokenizer() -> Tokenizer:
    """400 rows: every byte is a token, and so are some words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(TEXTS, 400)


def byte(value: int) -> int:
    """The token of one byte."""
    found = tokenizer()
    return next(i for i in range(found.vocab_size) if found.token_bytes(i) == bytes([value]))


def pair(name: str, prompt: list[int], chosen: list[int], rejected: list[int], **metadata) -> Pair:
    decode = functools.partial(tokenizer().decode, skip_special=False)
    return Pair(
        id=name,
        prompt=decode(prompt),
        chosen=decode(chosen),
        rejected=decode(rejected),
        prompt_token_ids=prompt,
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
        metadata=metadata,
    )


def plain() -> Pair:
    """A pair that is the same as text."""
    found = tokenizer()
    seven, nine = found.encode("7")[0], found.encode("9")[0]
    metadata = {"problem_id": "q1", "p_before": 0.5, "p_chosen": 0.75, "p_rejected": 0.125}
    prompt = found.encode("Tom has 12 apples. Then Tom buys ")
    return pair("plain", prompt, [seven], [nine], **metadata, num_prompt_tokens=4, family="sum")


def special() -> Pair:
    """A chat's prompt; the chosen side ends the turn."""
    found = tokenizer()
    prompt = found.encode_chat([{"role": "user", "content": "12+7="}], add_generation_prompt=True)
    return pair("special", prompt, [found.eos_id], found.encode("19")[:1], problem_id="q2")


def lone_bytes() -> Pair:
    """A character split by the pair: E2 88 | 91 (a sum sign) against E2 88 | 9A (a root)."""
    prompt = [*tokenizer().encode("12"), byte(0xE2), byte(0x88)]
    return pair("bytes", prompt, [byte(0x91)], [byte(0x9A)], problem_id="q3")


def unmerged() -> Pair:
    """A prompt of single letters, which the tokenizer itself would have merged."""
    prompt = [byte(letter) for letter in b"Tom has "]
    return pair("unmerged", prompt, [byte(ord("1"))], [byte(ord("7"))], problem_id="q4")


def merging() -> Pair:
    """A token that merges with the end of its prompt: T | o with m to come."""
    return pair("merging", [byte(ord("T"))], [byte(ord("o"))], [byte(ord("9"))], problem_id="q5")


def long() -> Pair:
    """A prompt of more than 32 tokens."""
    prompt = tokenizer().encode("Then Tom buys 7 more apples. " * 3 + "12+7=")
    assert 32 < len(prompt) < 60
    chosen, rejected = tokenizer().encode("1")[0], tokenizer().encode("7")[0]
    return pair("long", prompt, [chosen], [rejected], problem_id="q6")


def all_pairs() -> list[Pair]:
    return [plain(), special(), lone_bytes(), unmerged(), merging(), long()]
