"""Talks to a model in the terminal: questions in, answers as they are made.

`phiforge chat runs/nano-s0` or `chat("runs/nano-s0")`; `echo "12+7=?" | phiforge chat FOLDER` takes
one question per line, each a conversation of its own. Nothing is written.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from phiforge.inference.interface import Request, prompt_token_ids
from phiforge.model.folders import find_model

if TYPE_CHECKING:
    from phiforge.inference.engine import Engine

LEAST_ROOM_TOKENS = 32  # of the context, left for an answer before old turns are dropped
HELP = """/reset  forget the conversation
/help   this list
/quit   leave (so do Ctrl-D, and Ctrl-C between answers; Ctrl-C in an answer stops it)"""
_UNPRINTABLE = {
    code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}  # a model must not be able to send the terminal commands


def chat(
    model: str | Path,
    system: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 256,
    seed: int = 0,
    *,
    dtype: str = "float32",
    device: str = "auto",
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> None:
    """Talks until the input ends or `/quit`.

    `model` is a run folder (its last model), a model folder or a Hub name; `source` and `target`
    default to standard input and output. The k-th question takes sample k under `seed`. Raises
    ValueError for a folder without a model, and whatever loading raises.
    """
    from phiforge.core.distributed import resolve_device
    from phiforge.inference.engine import Engine
    from phiforge.model.huggingface import load

    folder = find_model(model)
    loaded, tokenizer = load(folder, dtype=dtype, device=resolve_device(device))
    lines: TextIO = sys.stdin if source is None else source
    out: TextIO = sys.stdout if target is None else target
    engine = Engine(loaded, tokenizer, rows=1)
    talk = Conversation(engine, system, temperature, max_tokens, seed, out)
    if lines.isatty():
        out.write(f"{folder}  (/help for commands)\n")
        talk.run(_typed_lines(lines, out))
    else:
        talk.run(lines, apart=True)


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(
        self,
        engine: Engine,
        system: str | None,
        temperature: float,
        max_tokens: int,
        seed: int,
        target: TextIO,
    ) -> None:
        self._engine, self._target = engine, target
        self._temperature, self._max_tokens, self._seed = temperature, max_tokens, seed
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)
        self._num_questions = 0

    def run(self, lines: Iterator[str] | TextIO, apart: bool = False) -> None:
        """Answers line by line; `apart` forgets the conversation before each."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text == "/reset" or apart:
                self.messages = list(self._start)
            if text == "/help":
                self._say(HELP + "\n")
            elif text.startswith("/") and text != "/reset" and " " not in text:
                self._say(f"{text} is no command\n{HELP}\n")
            elif text and text != "/reset":
                self._answer(text)

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        try:
            self._make_room()
            answer = self._stream()
        except ValueError as error:  # too long for the model, or no chat template: talk goes on
            self.messages.pop()
            self._say(f"({error})\n")
            return
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self) -> str:
        """Prints the answer as it comes; Ctrl-C ends it."""
        request = Request(
            prompt=self.messages,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self._seed,
            index=self._num_questions,
        )
        stream = self._engine.submit(request)
        self._num_questions += 1
        try:
            for token in stream:
                self._say(token.text)
        except KeyboardInterrupt:
            stream.cancel()
            self._say(" … (stopped; Ctrl-C again leaves)")
        self._say("\n")
        return stream.completion.text

    def _make_room(self) -> None:
        """Drops the oldest question and answer, and says so, until an answer has room."""
        context = self._engine.context
        room = min(LEAST_ROOM_TOKENS, self._max_tokens, context // 2)
        oldest = len(self._start)
        while len(self.messages) > oldest + 2:
            length = len(prompt_token_ids(self._engine.tokenizer, self.messages))
            if length + room <= context:
                return
            del self.messages[oldest : oldest + 2]
            self._say(f"(the context of {context} tokens is full: the oldest turn is forgotten)\n")

    def _say(self, text: str) -> None:
        self._target.write(text.translate(_UNPRINTABLE))
        self._target.flush()


def _typed_lines(source: TextIO, target: TextIO) -> Iterator[str]:
    """Lines as they are typed, edited with readline where Python has it; Ctrl-C or Ctrl-D ends."""
    own = source is sys.stdin and target is sys.stdout
    if own:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import gives `input` editing and history)
    while True:
        try:
            if own:
                line = input("> ")
            else:
                target.write("> ")
                target.flush()
                line = source.readline()
                if not line:
                    return
        except (EOFError, KeyboardInterrupt):
            target.write("\n")
            return
        yield line
