"""A plain PyTorch training loop, shared by the peers that are torch models.

`Trainer(model, settings, no_decay)` with `loss(batch)` filled in; `run({"steps": n})` takes n steps
on the batches of settings["batches"] (an .npz file) and gives seconds, tokens and losses.
"""

import contextlib
import time

import numpy as np
import torch


class Trainer:
    """fp32 parameters, fused AdamW, clipping, bf16 by autocast: what their own recipes do."""

    def __init__(self, model, settings, no_decay):
        torch.set_num_threads(settings["threads"])
        self.model, self.settings = model, settings
        self.device = torch.device(settings["device"])
        self.optimizer = make_optimizer(model, settings, no_decay)
        self.batches = np.load(settings["batches"])
        self.num_batches = len(self.batches["token_ids"])
        self.step = 0

    def loss(self, batch):
        """Mean loss over the batch's targets."""
        raise NotImplementedError

    def run(self, request):
        """Take `steps` optimizer steps; the loss is read each step, as a training log does."""
        losses, num_tokens = [], 0
        wait(self.device)
        started = time.perf_counter()
        for _ in range(request["steps"]):
            loss, tokens = self.train_step()
            losses.append(loss)
            num_tokens += tokens
        wait(self.device)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": num_tokens,
            "losses": losses,
            **device_memory(self.device),
        }

    def train_step(self):
        """One step over micro-batches of `micro_rows` rows: loss, and tokens computed."""
        batch = {
            name: torch.from_numpy(self.batches[name][self.step % self.num_batches]).long()
            for name in ("token_ids", "targets", "positions")
        }
        self.step += 1
        rows = self.settings["micro_rows"]
        num_targets = int((batch["targets"] != -100).sum())
        total = 0.0
        for start in range(0, len(batch["token_ids"]), rows):
            part = {k: v[start : start + rows].to(self.device) for k, v in batch.items()}
            share = int((batch["targets"][start : start + rows] != -100).sum()) / num_targets
            with self.autocast():
                loss = self.loss(part) * share
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, batch["token_ids"].numel()

    def autocast(self):
        """bf16 matrix products, or nothing."""
        if self.settings["dtype"] == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def make_optimizer(model, settings, no_decay):
    """AdamW with the same two groups as phiforge's: norms and the input embedding undecayed."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or name.endswith(no_decay)
        (plain if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"], fused=True
    )


def wait(device):
    """Let a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_memory(device):
    """Peak memory of a GPU in place of the process's; counts anew afterwards."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_bytes": peak}
