"""phiforge as a contestant: the engine, or the training loop of phiforge.train itself.

Started by `phiforge bench` as `python -m phiforge.bench.ours`; reads JSON lines, see
`peers.protocol`. The training loop writes its metrics into the folder settings["scratch"].
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phiforge.bench.peers import protocol
from phiforge.core.config import Exec
from phiforge.core.store import StageDir
from phiforge.model import huggingface
from phiforge.train.batch import Rows, StepBatch, rows_step
from phiforge.train.cost import choose_compile
from phiforge.train.loop import LoopConfig, train
from phiforge.train.pretrain import language_model_loss

_NO_END = 10**9  # steps: the loop ends when the pipe does


class Sampler:
    """An engine over a model folder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from phiforge.inference.engine import Engine  # training needs none
        from phiforge.model.tokenizer import Tokenizer

        torch.set_num_threads(settings["threads"])
        names = ("device", "rows", "mode", "weights", "kernels")
        options = {name: settings[name] for name in names}
        tokenizer = Tokenizer.load(settings["model"])
        tokenizer.stop_ids = frozenset()  # fixed lengths: no contestant stops at an end token
        self.engine = Engine.from_folder(settings["model"], tokenizer=tokenizer, **options)
        self.about = {"engine": self.engine.name, "torch": torch.__version__}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """All prompts and samples in one call."""
        started = time.perf_counter()
        completions = self.engine.generate(
            request["prompts"],
            n=request["n"],
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            seed=request["seed"],
        )
        seconds = time.perf_counter() - started
        samples = [sample.token_ids for row in completions for sample in row]
        return {
            "seconds": seconds,
            "tokens": sum(map(len, samples)),
            "token_ids": samples if request["temperature"] == 0 else None,
            **_device_memory(),
        }


class Finished(Exception):
    """The pipe is closed: leave the training loop."""


class Trainer:
    """The training loop, driven from inside: it asks for the next batch, and waits for a request.

    Everything between two batches is the loop's own work: forward, backward, clipping, optimizer,
    the checks and the log line.
    """

    def __init__(self, channel: protocol.Channel, settings: dict[str, Any]) -> None:
        self.channel, self.settings = channel, settings
        self.batches = _read_batches(Path(settings["batches"]), settings["micro_rows"])
        exec = Exec(
            device=settings["device"],
            threads=settings["threads"],
            compile=settings["compile"],
            kernels=settings["kernels"],
            micro_tokens=settings["micro_rows"] * settings["context"],
        )
        self.out = StageDir.scratch(settings["scratch"], exec)
        if settings["compile"] == "on":
            device = torch.device(settings["device"])
            compiled, why = choose_compile(exec, device, settings["planned_tokens"], True)
            if not compiled:  # the row's name says that it is
                raise RuntimeError(f"the step cannot be compiled here: {why}")
        self.model = huggingface.load_model(settings["model"], "float32")
        self.config = LoopConfig(
            dtype=settings["dtype"],
            lr=settings["lr"],
            betas=settings["betas"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            clip=settings["clip"],
            schedule="constant",
            spike_sigma=0.0,  # a skipped step would part ours from the others
            checkpoint_every=_NO_END,
        )
        self.left = 0
        self.num_tokens = 0
        self.started = self.cpu_started = 0.0

    def run(self) -> None:
        """Train until the pipe closes."""
        with contextlib.suppress(Finished):
            train(
                self.model,
                self.config,
                _NO_END,
                self.next_batch,
                language_model_loss,
                self.out,
                context=self.settings["context"],
                planned_tokens=self.settings["planned_tokens"],
            )

    def next_batch(self, step: int) -> StepBatch:
        """The loop's batch function: answers when the steps asked for are done."""
        if self.left == 0:
            if step > 0:
                self.answer()
            self.wait_for_request()
        self.left -= 1
        batch = self.batches[step % len(self.batches)]
        self.num_tokens += batch.num_tokens
        return batch

    def wait_for_request(self) -> None:
        """Block on the pipe, then start the clock."""
        request = next(self.channel, None)
        if request is None:
            raise Finished
        self.left, self.num_tokens = request["steps"], 0
        protocol.reset_peak()
        self.cpu_started = time.process_time()
        self.started = time.perf_counter()

    def answer(self) -> None:
        """Stop the clock, then tell."""
        if self.settings["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        cpu_seconds = time.process_time() - self.cpu_started
        lines = self.out.metrics_log.path.read_text().splitlines()
        self.channel.answer(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "tokens": self.num_tokens,
                "losses": [row["loss"] for row in map(json.loads, lines) if "loss" in row],
                "peak_bytes": protocol.peak_bytes(),
                **_device_memory(),
            }
        )
        self.out.metrics_log.path.write_text("")


def _read_batches(path: Path, micro_rows: int) -> list[StepBatch]:
    arrays = np.load(path)
    names = ("token_ids", "targets", "documents", "positions")
    tensors = [torch.from_numpy(arrays[name]) for name in names]
    rows = [Rows(*(t[i] for t in tensors)) for i in range(len(tensors[0]))]
    return [rows_step(row, micro_rows * row.token_ids_bt.shape[1]) for row in rows]


def _device_memory() -> dict[str, int]:
    """Peak memory of a GPU in use, in place of the process's; counts anew afterwards."""
    if not torch.cuda.is_initialized():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_bytes": peak}


def main() -> None:
    """Answer requests; training turns the loop inside out, so it takes the pipe itself."""
    channel = protocol.Channel()
    try:
        settings = next(channel, None)
        if settings is None:
            return
        if settings["task"] == "engine":
            protocol.answer_runs(channel, Sampler(settings), lambda s, request: s.run(request))
            return
        trainer = Trainer(channel, settings)
        channel.answer({"about": {"torch": torch.__version__}})
        trainer.run()
    except Exception as error:
        channel.fail(error)


if __name__ == "__main__":
    main()
