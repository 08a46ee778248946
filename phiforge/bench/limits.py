"""What this machine can do at most: memory read per second, matrix products per second.

A contestant of its own, `python -m phiforge.bench.limits`, asked once a round; see
`peers.protocol`. It writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phiforge.bench.peers import protocol
from phiforge.core.distributed import resolve_dtype

_BUFFER_BYTES = {"cpu": 2**29, "cuda": 2**32}  # far beyond any cache
_LEAST_SECONDS = 0.08  # per product
_MAX_ROWS = 2**25  # most numbers of one product's result: the head of a whole batch is cut


class Limits:
    """A buffer to read, and the device; threads are what OMP_NUM_THREADS says."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.device = torch.device(settings["device"])
        count = settings.get("buffer_bytes", _BUFFER_BYTES[self.device.type]) // 8
        self.buffer = torch.ones(count, dtype=torch.int64, device=self.device)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "chip": name}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bytes per second read by all threads, and FLOP/s of the shapes asked for, per dtype."""
        matmul = {}
        for dtype in request["dtypes"]:
            matmul[dtype] = matmul_rate(request["shapes"], resolve_dtype(dtype), self.device)
        return {"bytes_per_second": self.read_rate(), "matmul": matmul}

    def read_rate(self) -> float:
        """A sum over the buffer; on a GPU also a copy, which reads as much as it writes."""
        num_bytes = self.buffer.numel() * 8
        rates = [num_bytes / best_seconds(self.buffer.sum, self.device)]
        if self.device.type == "cuda":
            # A sum of 64-bit integers need not reach the memory's rate there.
            half = self.buffer.numel() // 2
            source, target = self.buffer[:half], self.buffer[half : 2 * half]
            rates.append(num_bytes / best_seconds(lambda: target.copy_(source), self.device))
            floats = self.buffer.view(torch.float32)
            rates.append(num_bytes / best_seconds(floats.sum, self.device))
        return max(rates)


def matmul_rate(
    shapes: Sequence[dict[str, Any]], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """FLOP/s over all shapes, weighted by their FLOPs, and per shape.

    A shape is m rows by k inputs by n outputs, `count` times; with `backward` also the products for
    the input's and the weight's gradients.
    """
    flops, seconds, each = 0.0, 0.0, []
    for shape in shapes:
        k, n = shape["k"], shape["n"]
        m = max(1, min(shape["m"], _MAX_ROWS // n))
        products = _products(m, k, n, shape["backward"], dtype, device)
        taken = sum(best_seconds(product, device) for product in products)
        rate = 2.0 * m * k * n * len(products) / taken
        whole = 2.0 * shape["m"] * k * n * len(products) * shape["count"]
        flops, seconds = flops + whole, seconds + whole / rate
        each.append({"m": m, "k": k, "n": n, "flops_per_second": rate})
    return {"flops_per_second": flops / seconds, "shapes": each}


def _products(
    m: int, k: int, n: int, backward: bool, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], Tensor]]:
    generator = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x_mk, weight_nk, grad_mn = made(m, k), made(n, k), made(m, n)
    products: list[Callable[[], Tensor]] = [lambda: x_mk @ weight_nk.t()]
    if backward:
        products += [lambda: grad_mn @ weight_nk, lambda: grad_mn.t() @ x_mk]
    return products


def best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Shortest time of one call among those that fit into a fixed time, two at least."""
    call()
    best, started = float("inf"), time.perf_counter()
    repeats = 0
    while repeats < 2 or time.perf_counter() - started < _LEAST_SECONDS:
        best = min(best, _seconds(call, device))
        repeats += 1
    return best


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    protocol.serve(Limits, lambda state, request: state.run(request))
