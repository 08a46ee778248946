"""Crash-safe training checkpoints: torch DCP folders with a manifest, the last two kept.

`save(folder, model, optimizer, loop, step)` and `restore(folder, model, optimizer, note)`; each
step's folder holds DCP files, loop.json and manifest.json, and appears by one rename.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from phiforge.core.files import file_hash, sync_file, sync_folder, write_json
from phiforge.train.guard import TrainingError
from phiforge.train.optim import moments

KEEP = 2
_MANIFEST, _LOOP = "manifest.json", "loop.json"


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, loop: Any, step: int
) -> Path:
    """Write folder/step-XXXXXXXX whole or not at all, then drop all but the last two.

    `loop` is anything JSON holds. Raises TrainingError, with the last good checkpoint named, when
    the disk is full or the folder cannot be written.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP says that it runs in one process: it shall
            dcp.save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=True)
        write_json(temporary / _LOOP, loop)
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        rows = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
        write_json(temporary / _MANIFEST, {"step": step, "files": rows})
        sync_file(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _pass_on_interrupt(error)
        raise TrainingError(
            f"cannot write checkpoint {final}: {_reason(error)}. Free disk space or make the "
            f"folder writable, then run again: it goes on from {describe_last(folder)}."
        ) from error
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".tmp")


def describe_last(folder: Path) -> str:
    """The newest checkpoint's path, or words that say there is none."""
    found = checkpoints(folder)
    return str(found[-1]) if found else "the beginning (no checkpoint yet)"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint ("FILE: reason"), or None; every byte is read."""
    manifest = checkpoint / _MANIFEST
    try:
        rows = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{manifest}: missing or unreadable ({type(error).__name__})"
    for name, row in rows.items():
        file = checkpoint / name
        if not file.exists():
            return f"{file}: missing"
        if file.stat().st_size != row["bytes"]:
            return f"{file}: {file.stat().st_size} bytes, its manifest says {row['bytes']}"
        if file_hash(file) != row["sha256"]:
            return f"{file}: its bytes changed since they were written"
    return None


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into model and optimizer; returns its loop state, or None.

    A damaged one is passed over, saying so, and the one before is taken. Raises ValueError when
    there are checkpoints and none is whole, or when one does not fit the model.
    """
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    found = checkpoints(folder)
    problems = []
    for checkpoint in reversed(found):
        problem = damage(checkpoint)
        if problem is None:
            return _load(checkpoint, model, optimizer)
        problems.append(problem)
        note(f"checkpoint damaged, trying the one before: {problem}")
    if problems:
        raise ValueError(
            f"no whole checkpoint in {folder}: {'; '.join(problems)}. Put the file back, or delete "
            f"{folder} to train this stage from its beginning."
        )
    return None


def _load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    tensors = _tensors(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    except CheckpointException as error:
        _pass_on_interrupt(error)
        raise ValueError(
            f"{checkpoint} does not fit this model: {_reason(error)}. It was written by another "
            f"configuration; delete {checkpoint.parent} to train from the beginning."
        ) from error
    torch.set_rng_state(tensors["rng"])
    return json.loads((checkpoint / _LOOP).read_text(encoding="utf-8"))


def _tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Every tensor of the state by name: parameters, AdamW's moments (made when absent), RNG."""
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in moments(optimizer, parameter).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _pass_on_interrupt(error: BaseException) -> None:
    """Ctrl-C inside DCP comes back as a failure of a rank; to the person it is Ctrl-C."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    for cause, _ in failures.values():
        if isinstance(cause, KeyboardInterrupt):
            raise cause


def _reason(error: BaseException) -> str:
    """What went wrong in the words of the operating system, where it was the one to say no.

    DCP reports one failure per rank, and torch's file writer hides a full disk behind an error of
    its own ("unexpected pos"), whose context is the real one.
    """
    failures: dict[int, Any] = getattr(error, "failures", {})
    causes = [failure[0] for failure in failures.values()] or [error]
    reasons = []
    for cause in causes:
        link: BaseException | None = cause
        while link is not None and not isinstance(link, OSError):
            link = link.__cause__ or link.__context__
        found = link or cause
        reasons.append(getattr(found, "strerror", None) or f"{type(found).__name__}: {found}")
    return "; ".join(dict.fromkeys(reasons))
