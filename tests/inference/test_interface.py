"""Prompts become token ids; wrong prompts and settings are refused by name."""

import pytest
from plain_loop import Letters

from phiforge.inference.interface import (
    Request,
    Sampling,
    check_token_ids,
    prompt_token_ids,
    stop_strings,
)


def test_the_three_kinds_of_prompt():
    assert prompt_token_ids(Letters(), "ab") == (99, 100)
    assert prompt_token_ids(Letters(), [5, 6]) == (5, 6)
    chat = [{"role": "user", "content": "hi"}]
    assert prompt_token_ids(Letters(), chat) == tuple(
        Letters().encode_chat(chat, add_generation_prompt=True)
    )


@pytest.mark.parametrize("prompt", [["a", "b"], [1.5, 2], [{"role": "user"}, 3], [True]])
def test_anything_else_is_refused(prompt):
    with pytest.raises(ValueError, match="neither text, token ids"):
        prompt_token_ids(Letters(), prompt)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt 3 is empty"),
        ([5, 300], "token id 300 at place 1"),
        ([-1], "token id -1 at place 0"),
        ([5] * 64, "prompt 3 has 64 tokens; the model's context is 64"),
    ],
)
def test_token_ids_are_checked(ids, message):
    with pytest.raises(ValueError, match=message):
        check_token_ids("prompt 3", ids, vocab_size=300, context=64)
    check_token_ids("prompt 3", [5] * 63, vocab_size=300, context=64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("stop", ("",)),
    ],
)
def test_settings_are_checked_and_named(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match=name):
        _ = Request(prompt="a", **{name: value}).sampling


def test_one_bare_stop_string_is_one():
    assert stop_strings("END") == ("END",)
    assert stop_strings(["a", "b"]) == ("a", "b")
