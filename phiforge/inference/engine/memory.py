"""Memory of the engine's caches: how much there is, and zeros that cost nothing until written.

`free_bytes(device)`, `zeros(shape, dtype, device)`. Nothing is written.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that may still be had on a device; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not (hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names):
        return 8 << 30  # macOS does not say; take a small machine
    return min(_available_bytes(), _container_bytes())


def _available_bytes() -> int:
    """What the kernel could give: free pages and those of files it may drop."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # no Linux: only free pages are known
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """A tensor of zeros; on a CPU its pages take memory only once they are written.

    Raises MemoryError, with the size of `name`, when it cannot be had.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # numpy asks the system for fresh pages (calloc); torch.zeros would write every one
        raw = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise MemoryError(
            f"{name} needs {num_bytes / 2**30:.1f} GiB on {device}, which are not free "
            f"({free_bytes(device) / 2**30:.1f} GiB are): lower max_cache_tokens or rows"
        ) from error
