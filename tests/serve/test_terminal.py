"""The terminal chat: which model it finds, its commands, and how an answer is stopped."""

import io

import pytest
import torch

from phiforge.inference.engine import Engine
from phiforge.inference.interface import Request
from phiforge.model.config import PhiConfig
from phiforge.model.folders import find_model
from phiforge.model.huggingface import save
from phiforge.model.phi import Phi
from phiforge.model.tokenizer import Tokenizer, train_tokenizer
from phiforge.serve.terminal import HELP, Conversation, chat


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a few words to learn from, words and words"] * 3, 390, num_dummies=2)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    config = PhiConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=128,
    )
    return Engine(Phi(config).initialize(torch.Generator().manual_seed(0)), tokenizer)


def talk(engine, lines, system=None, apart=False, **settings):
    target = io.StringIO()
    settings = {"temperature": 1.0, "max_tokens": 12, "seed": 0} | settings
    conversation = Conversation(engine, system, target=target, **settings)
    conversation.run(iter(lines), apart=apart)
    return conversation, target.getvalue()


def test_answers_are_the_engines_and_join_the_conversation(engine):
    conversation, said = talk(engine, ["hello", "again"], system="be brief")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    for index in (0, 1):
        request = Request(prompt=conversation.messages[: 2 + 2 * index], max_tokens=12, index=index)
        stream = engine.submit(request)
        list(stream)
        assert conversation.messages[2 + 2 * index]["content"] == stream.completion.text
    assert said.count("\n") >= 2


def test_commands(engine):
    conversation, said = talk(engine, ["hello", "/reset", "/help", "/what", "", "/quit", "never"])
    assert conversation.messages == []
    assert said.count(HELP) == 2
    assert "/what is no command" in said


def test_piped_questions_stand_apart(engine):
    conversation, _ = talk(engine, ["one", "two"], apart=True)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[0]["content"] == "two"


def test_a_full_context_drops_the_oldest_turn_and_says_so(engine):
    conversation, said = talk(engine, ["some words " * 6] * 5, max_tokens=30)
    assert "the oldest turn is forgotten" in said
    assert len(conversation.messages) < 10


def test_an_impossible_question_is_explained_and_the_talk_goes_on(engine):
    conversation, said = talk(engine, ["words " * 300, "hi"])
    assert "the model's context is 128" in said
    assert len(conversation.messages) == 2


def test_interrupt_stops_the_answer_only(engine):
    class Interrupting(io.StringIO):
        interrupted = False

        def write(self, text):
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().write(text)

    target = Interrupting()
    conversation = Conversation(engine, None, 1.0, 12, 0, target)
    conversation.run(iter(["hello"]))
    assert "(stopped; Ctrl-C again leaves)" in target.getvalue()
    conversation.run(iter(["more"]))
    assert len(conversation.messages) == 4


def test_terminal_commands_in_an_answer_are_not_sent(engine):
    conversation, _ = talk(engine, [])
    conversation._say("a\x1b[2Jb\x07\n")
    assert conversation._target.getvalue() == "a[2Jb\n"


def test_finds_the_last_model_of_a_run(tmp_path):
    for stage in ("pretrain", "sft"):
        (tmp_path / stage / "model").mkdir(parents=True)
        (tmp_path / stage / "model" / "config.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path / "sft" / "model"
    assert find_model(tmp_path / "pretrain") == tmp_path / "pretrain" / "model"
    assert find_model(tmp_path / "sft" / "model") == tmp_path / "sft" / "model"
    assert find_model("owner/name") == "owner/name"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model here.*dpo-pivotal/model"):
        find_model(tmp_path / "empty")


def test_chat_reads_a_pipe_and_answers_each_line(engine, tokenizer, tmp_path):
    save(engine.model, tokenizer, tmp_path / "sft" / "model")
    target = io.StringIO()
    chat(tmp_path, max_tokens=8, source=io.StringIO("one\ntwo\n"), target=target, device="cpu")
    first = target.getvalue()
    assert first.count("\n") >= 2
    again = io.StringIO()
    chat(tmp_path, max_tokens=8, source=io.StringIO("one\ntwo\n"), target=again, device="cpu")
    assert again.getvalue() == first
