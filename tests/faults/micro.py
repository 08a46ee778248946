"""A whole recipe small enough to run in seconds, on text files of its own, and what to compare.

`write_recipe(folder)` gives the recipe's file; `Forks()` runs commands on it, see forks.py;
`output_hashes(run)` names what every stage made. Nothing is written elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Settings that the tests share; compile is off because a compiled graph costs a minute to make.
RECIPE = """
name: micro
seed: 0
exec: {{device: cpu, threads: 1, workers: 1, compile: "off"}}
curate:
  sources:
    - {{name: docs, path: {texts}}}
synthesize:
  families: {{ordering: {{count: 40}}}}
  context: 64
  recall: {{documents: 12, copies: 4, long_documents: 6, long_copies: 2, long_worksheets: 2}}
  chats: {{per_family: 12, recall: 2, identity: 2}}
  train_count: 8
  test_count: 4
  test_bogus_count: 2
tokenizer: {{vocab_size: 400}}
pack: {{}}
model:
  {{preset: nano, hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 2,
    num_kv_heads: 1}}
pretrain:
  context: 64
  steps: 6
  tokens_per_step: 128
  lr: 4e-3
  warmup_steps: 2
  validation_tokens: 128
  checkpoint_every: 2
  mixture:
    - {{source: problems, share: 0.6}}
    - {{source: recall, share: 0.3}}
    - {{source: docs, share: 0.1}}
midtrain: {{steps: 2, tokens_per_step: 256, checkpoint_every: 1, long_share: 0.3}}
sft: {{context: 256, tokens_per_step: 1024, lr: 1e-3, checkpoint_every: 1}}
pivotal:
  num_questions: 4
  n_filter: 6
  method: paper
  n_rollouts: 6
  max_tokens: 6
  band: [0.0, 1.0]
  gap: 0.2
  min_count: 1
  paths_per_question: 1
dpo-pivotal: {{lr: 1e-4, pairs_per_step: 2, checkpoint_every: 1}}
evaluate:
  problems_per_family: 2
  bogus_per_family: 2
  max_tokens: 6
  few_shot: 1
  recall: {{num: 1, lengths: [1.0]}}
  bits_per_byte: {{max_tokens: 256}}
report: {{}}
"""


@dataclass(frozen=True)
class Result:
    """What a command came to: exit code (negative: a signal), standard output and error."""

    code: int
    out: str
    error: str


class Forks:
    """A warm process that runs commands in forks; use as a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PHIFORGE_TRACEBACK", None)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "forks.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def phiforge(self, *arguments: str | Path, inject: dict[str, Any] | None = None) -> Result:
        """Run `phiforge ARGUMENTS` with faults of inject.py: name → its arguments."""
        return Result(**self._ask(arguments=[str(a) for a in arguments], inject=_rows(inject)))

    def start(self, *arguments: str | Path, inject: dict[str, Any] | None = None) -> int:
        """Start a command in the background and return its process id."""
        rows = [*_rows(inject), ("background", {})]
        return self._ask(arguments=[str(a) for a in arguments], inject=rows)["started"]

    def kill(self, pid: int) -> None:
        """kill -9 a command started in the background."""
        os.kill(pid, signal.SIGKILL)
        self._ask(wait=pid)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _rows(inject: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    return list((inject or {}).items())


def write_recipe(folder: Path) -> Path:
    """Make the recipe and the texts it reads."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(4):
        lines = (f"Note {i}, line {j}: {i} plus {j} is {i + j}.\n" for j in range(12))
        (texts / f"note{i}.txt").write_text("".join(lines))
    recipe = folder / "micro.yaml"
    recipe.write_text(RECIPE.format(texts=texts))
    return recipe


def output_hashes(run: Path) -> dict[str, str]:
    """STAGE/FILE → SHA-256 of all that the stages made, but for what holds clocks."""
    found = {}
    for manifest in sorted(run.glob("*/manifest.json")):
        if manifest.parent.name == "report":
            continue
        for row in json.loads(manifest.read_text())["outputs"]:
            if row["path"] != "metrics.jsonl":
                found[f"{manifest.parent.name}/{row['path']}"] = row["sha256"]
    return found
