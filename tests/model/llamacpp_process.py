"""llama.cpp in a process of its own, asked over pipes: `with LlamaCpp(file, context) as llama`.

Runs in the interpreter that PHIFORGE_LLAMACPP_PYTHON names (one with llama-cpp-python); as a script
it is that process: one JSON request a line in, one JSON answer a line out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("PHIFORGE_LLAMACPP_PYTHON", "")


class LlamaCpp:
    """A GGUF file loaded by llama.cpp with a context of so many tokens."""

    def __init__(self, file: Path, context: int) -> None:
        command = [PYTHON, __file__, str(file), str(context)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()[-2000:]
        return json.loads(line)

    def tokenize(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._ask(op="tokenize", texts=texts, special=special)

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        return self._ask(op="greedy", token_ids=token_ids, num_tokens=num_tokens)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The answer's text to a chat, by the file's own template, of at most 8 tokens."""
        return self._ask(op="chat", messages=messages)


def main(file: str, context: str) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    # Its cache is fp16 unless told otherwise, which no fp32 model's tokens survive.
    fp32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        file, n_ctx=int(context), n_threads=1, type_k=fp32, type_v=fp32, verbose=False
    )

    def tokenize(texts: list[str], special: bool) -> list[list[int]]:
        return [model.tokenize(t.encode(), add_bos=False, special=special) for t in texts]

    def greedy(token_ids: list[int], num_tokens: int) -> list[int]:
        model.reset()
        found: list[int] = []
        for token in model.generate(token_ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == num_tokens:
                break
        return found

    def chat(messages: list[dict[str, str]]) -> str:
        made = model.create_chat_completion(messages, max_tokens=8, temperature=0.0)
        return made["choices"][0]["message"]["content"]

    operations = {"tokenize": tokenize, "greedy": greedy, "chat": chat}
    for line in sys.stdin:
        request = json.loads(line)
        answer = operations[request.pop("op")](**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
