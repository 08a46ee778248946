"""Device, dtype, threads and rank: the only place that reads the process environment for them.

Call `resolve_device("auto")`, `resolve_dtype("bf16")`, `set_threads(exec)`, `rank()`.
"""

import os
from typing import TYPE_CHECKING

from phiforge.core.config import Exec

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_workers(exec: Exec) -> int:
    """Data processes to start: `exec.workers`, or one per core."""
    return exec.workers or num_cores()


def rank() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun sets them; (0, 1) outside torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def set_threads(exec: Exec) -> int:
    """Set torch's CPU threads from `exec` and return the number."""
    import torch

    threads = exec.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or num_cores()
    torch.set_num_threads(threads)
    return threads


def resolve_device(name: str) -> "torch.device":
    """The torch device for "auto", "cpu" or "cuda".

    Raises ValueError when "cuda" is asked for and torch sees none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("exec.device is 'cuda' but torch sees no GPU; use 'auto' or 'cpu'")
    return torch.device(name)


def resolve_dtype(name: str) -> "torch.dtype":
    """The torch dtype for "bf16" or "fp32" (long names too)."""
    import torch

    names = {
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp32": torch.float32,
        "float32": torch.float32,
    }
    if name not in names:
        raise ValueError(f"dtype is {name!r}; use one of {', '.join(names)}")
    return names[name]
