"""Checks what this machine offers: Python, torch, bf16, compiler, kernels, GPU, sandbox, extras.

Call `examine()` or `phiforge doctor`; a row is a check, its state (ok, note, missing), detail.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from phiforge.core.distributed import num_cores

Row = dict[str, str]

EXTRAS = {
    "transformers": ("transformers", "any causal LM of transformers"),
    "hub": ("huggingface_hub", "model and data set names of the hub"),
    "ray": ("ray", "data work on many machines"),
    "gguf": ("gguf", "export for llama.cpp"),
    "trl": ("trl", "the DPO parity test"),
}


def examine() -> list[Row]:
    """Run every check; the order is the order in which a newcomer needs them."""
    checks: tuple[Callable[[], list[Row]], ...] = (
        _python,
        _torch,
        _compiler,
        _sandbox,
        _memory,
        _disk,
        _extras,
    )
    return [row for check in checks for row in check()]


def _row(check: str, state: str, detail: str) -> Row:
    return {"check": check, "state": state, "detail": detail}


def _python() -> list[Row]:
    ok = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [_row("python", "ok" if ok else "missing", detail + ("" if ok else "; needs 3.11"))]


def _torch() -> list[Row]:
    if importlib.util.find_spec("torch") is None:
        return [_row("torch", "missing", "pip install 'torch>=2.8,<2.14'")]
    import torch

    rows = [_row("torch", "ok", f"{torch.__version__}, {num_cores()} CPU cores")]
    flags = _cpu_flags()
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        rows.append(_row("bf16", "ok", "the processor multiplies bf16 natively"))
    else:
        rows.append(_row("bf16", "note", "no native bf16 here: set dtype fp32, it is faster"))
    if torch.cuda.is_available():
        rows.append(_row("gpu", "ok", torch.cuda.get_device_name(0)))
    else:
        rows.append(_row("gpu", "note", "none; everything runs on the CPU"))
    return rows


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _compiler() -> list[Row]:
    found = (
        shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    )
    if not found:
        detail = "no C++ compiler: torch's kernels in place of ours, no torch.compile; install g++"
        return [_row("compiler", "note", detail)]
    return [_row("compiler", "ok", found), *_kernels()]


def _kernels() -> list[Row]:
    """Compiles our kernels if that was not done yet: seconds, once."""
    from phiforge.core.native.build import describe, unavailable

    rows = []
    for name, use in (("decoder", "the engine"), ("training", "the training step")):
        library = describe(name)
        if library:
            rows.append(_row(f"kernels: {name}", "ok", f"{use} runs on {library.simd}"))
        else:
            rows.append(_row(f"kernels: {name}", "note", f"torch instead: {unavailable(name)}"))
    return rows


def _sandbox() -> list[Row]:
    """Starts one, which tries every layer: half a second."""
    from phiforge.verify.sandbox import Sandbox, SandboxUnavailable

    try:
        with Sandbox() as sandbox:
            layers = sandbox.layers
    except SandboxUnavailable as error:
        return [_row("sandbox", "missing", str(error))]
    rows = [_row("sandbox", "ok", f"{layers.backend}: {', '.join(layers.active)}")]
    return rows + [_row(f"sandbox: {name}", "note", why) for name, why in layers.missing.items()]


def _memory() -> list[Row]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return [_row("memory", "note", "could not be read")]
    state = "ok" if total >= 4 else "note"
    return [_row("memory", state, f"{total:.1f} GiB; the nano recipe needs 4")]


def _disk() -> list[Row]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return [_row("disk", "ok" if free >= 2 else "note", f"{free:.1f} GiB free here; nano needs 2")]


def _extras() -> list[Row]:
    rows = []
    for extra, (module, use) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        detail = use if there else f"{use}: pip install 'phiforge[{extra}]'"
        rows.append(_row(f"[{extra}]", "ok" if there else "note", detail))
    return rows
