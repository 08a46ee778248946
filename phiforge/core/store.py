"""The run folder: runs/NAME/STAGE/ with a manifest each; finished stages are skipped, never lost.

Call `with open_run(path) as run: run.stage(...)`. A stage writes into STAGE.partial/; its
manifest.json comes last, then one rename. Whatever kills the process, the same command goes on.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phiforge.core.config import Exec
from phiforge.core.environment import code_version, environment
from phiforge.core.files import (
    file_hash,
    naming,
    remove_leftovers,
    sync_folder,
    write_json,
)
from phiforge.core.progress import Bar, MetricsLog, progress

Inputs = Mapping[str, Path]
Metrics = dict[str, Any]
MANIFEST = "manifest.json"
# Written while a stage runs and full of times: kept, but no part of what the stage computed.
_UNHASHED = {MANIFEST, "metrics.jsonl"}
# What a running stage needs and a finished one does not: gone before the folder gets its name.
_SCRATCH = {MANIFEST, "request.json", "state"}


class StageDir:
    """What a stage gets as `out`: where to write, keep state, log and show progress."""

    def __init__(self, name: str, path: Path, exec: Exec):
        self.name, self.path, self.exec = name, path, exec
        self.state = path / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.metrics_log = MetricsLog(path / "metrics.jsonl")

    @staticmethod
    def scratch(path: str | Path, exec: Exec | None = None) -> "StageDir":
        """A stage folder outside any run, for notebooks, tests and single-stage commands."""
        path = Path(path)
        return StageDir(path.name, path, exec or Exec())

    def progress(
        self, total: float, unit: str, label: str | None = None
    ) -> AbstractContextManager[Bar]:
        """A progress bar named after the stage."""
        return progress(total, unit, label or self.name)

    def log(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics_log.write(**fields)

    def note(self, text: str) -> None:
        """Print one plain line for the person who watches."""
        print(f"{self.name:<12} {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Request:
    """What a stage is asked to make: everything its fingerprint covers."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over stage, version, config and the content hashes of the inputs."""
        return hashlib.sha256(canonical(self.payload()).encode()).hexdigest()

    def payload(self) -> dict[str, Any]:
        """The fields covered by the fingerprint, as JSON values."""
        return {
            "stage": self.stage,
            "version": self.version,
            "config": self.config,
            "inputs": self.inputs,
        }


def canonical(value: Any) -> str:
    """One JSON text per value. Raises ValueError for NaN and for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"this cannot enter a fingerprint: {error}") from None


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The fields in which two payloads differ, as 'path: old → new' lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{prefix}.{key}" if prefix else key
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), path)
        return lines
    if old == new:
        return []
    shown = [text if len(text) < 70 else text[:67] + "..." for text in (str(old), str(new))]
    if prefix.startswith("inputs."):
        return [f"{prefix}: its contents changed ({shown[0][:12]} → {shown[1][:12]})"]
    return [f"{prefix}: {shown[0]} → {shown[1]}"]


class StageChanged(ValueError):
    """A finished stage was made from other settings or inputs than are asked for now."""


class Run:
    """An open, locked run folder."""

    def __init__(self, path: Path, exec: Exec):
        self.path, self.exec = path, exec

    def folder(self, stage: str) -> Path:
        """Where a finished stage lies."""
        return self.path / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None. Raises ValueError when it is damaged."""
        return read_manifest(self.folder(stage))

    def decide(self, request: Request, rebuild: bool) -> tuple[str, list[str]]:
        """What would happen to a stage: ("skip" | "resume" | "run" | "changed", reasons)."""
        if rebuild:
            return "run", ["--rebuild asks for it"]
        manifest = self.manifest(request.stage)
        if manifest is None:
            started = _read_request(self._partial(request.stage))
            if started == request.payload():
                return "resume", ["it was started with these settings and not finished"]
            return "run", ["it has not been made yet"]
        if manifest["fingerprint"] == request.fingerprint:
            return "skip", ["same settings, same inputs"]
        old = manifest.get("request", {})
        return "changed", differences(old, request.payload())

    def stage(
        self,
        request: Request,
        function: Callable[[StageDir], Metrics],
        inputs: Inputs,
        rebuild: bool = False,
    ) -> dict[str, Any]:
        """Make one stage, or skip it when it is there, and return its manifest.

        Raises StageChanged when a finished stage differs and `rebuild` is false.
        """
        self._recover(request.stage)
        action, reasons = self.decide(request, rebuild)
        if action == "changed":
            raise StageChanged(
                f"{self.folder(request.stage)} was made with other settings:\n  "
                + "\n  ".join(reasons)
                + f"\nRun again with --rebuild {request.stage} to make it anew "
                "(and what follows from it), or choose another run name."
            )
        if action == "skip":
            manifest = self.manifest(request.stage)
            assert manifest is not None
            check_outputs(self.folder(request.stage), manifest)
            return manifest
        return self._make(request, function, inputs)

    def _make(
        self, request: Request, function: Callable[[StageDir], Metrics], inputs: Inputs
    ) -> dict[str, Any]:
        partial = self._partial(request.stage)
        resumed = _read_request(partial) == request.payload()
        if partial.exists() and not resumed:
            _say_why_dropped(partial, request)
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        remove_leftovers(partial)
        write_json(partial / "request.json", request.payload())
        out = StageDir(request.stage, partial, self.exec)
        earlier = _seconds_so_far(out.state)
        started = datetime.now(UTC)
        begin = time.monotonic()
        with _count_seconds(out.state, earlier), naming(partial):
            metrics = function(out)
        seconds = earlier + time.monotonic() - begin
        manifest = {
            "stage": request.stage,
            "version": request.version,
            "status": "done",
            "fingerprint": request.fingerprint,
            "request": request.payload(),
            "config": request.config,
            "inputs": {
                name: {"path": _relative(inputs[name], self.path), "sha256": request.inputs[name]}
                for name in request.inputs
            },
            "outputs": [],
            "code": code_version(),
            "environment": environment(),
            "exec": self.exec.model_dump(),
            "metrics": _plain(metrics),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "resumed": resumed,
        }
        self._commit(request.stage, manifest)
        return manifest

    def _commit(self, stage: str, manifest: dict[str, Any]) -> None:
        """Write the manifest, which says that the stage is whole; only then may its state go."""
        partial = self._partial(stage)
        for file in sorted(p for p in partial.rglob("*") if p.is_file()):
            if file.relative_to(partial).parts[0] in _SCRATCH:
                continue
            # A file whose bytes are not on disk must not be named by a manifest that is.
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            row = {
                "path": file.relative_to(partial).as_posix(),
                "bytes": file.stat().st_size,
                "sha256": file_hash(file),
            }
            manifest["outputs"].append(row)
        manifest["output_hash"] = output_hash(manifest["outputs"])
        write_json(partial / MANIFEST, manifest)
        self._recover(stage)

    def _recover(self, stage: str) -> None:
        """Finish a commit: swap a partial folder that has its manifest into place."""
        partial, final = self._partial(stage), self.folder(stage)
        previous = self.path / f"{stage}.previous"
        if (partial / MANIFEST).exists():
            # Until the manifest was there, a kill or a full disk had to leave a stage to resume.
            shutil.rmtree(partial / "state", ignore_errors=True)
            (partial / "request.json").unlink(missing_ok=True)
            if final.exists():
                if previous.exists():
                    shutil.rmtree(previous)
                os.rename(final, previous)
            os.rename(partial, final)
            sync_folder(self.path)
        elif previous.exists() and not final.exists():
            os.rename(previous, final)
        if previous.exists():
            shutil.rmtree(previous)

    def _partial(self, stage: str) -> Path:
        return self.path / f"{stage}.partial"


@contextmanager
def open_run(path: str | Path, exec: Exec | None = None) -> Iterator[Run]:
    """Lock a run folder (made when absent) for the block.

    Raises ValueError when another process holds it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise ValueError(
                f"{path} is in use by {holder}; wait until it ends, or use another run name"
            ) from None
        with naming(path / ".lock"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            lock.flush()
        yield Run(path, exec or Exec())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None when there is none yet.

    Raises ValueError naming the file when it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{path} is missing although {folder} holds files; "
                f"run again with --rebuild {folder.name}"
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for key in ("stage", "fingerprint", "outputs", "output_hash", "metrics"):
            manifest[key]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged manifest ({error}); run again with --rebuild {folder.name}"
        ) from None
    return manifest


def check_outputs(folder: Path, manifest: dict[str, Any], hashes: bool = False) -> None:
    """Raise ValueError when an output is missing, truncated or, with `hashes`, altered."""
    for row in manifest["outputs"]:
        file = folder / row["path"]
        remedy = f"run again with --rebuild {manifest['stage']}"
        if not file.exists():
            raise ValueError(f"{file}: missing output of stage {manifest['stage']}; {remedy}")
        if file.stat().st_size != row["bytes"]:
            raise ValueError(
                f"{file}: {file.stat().st_size} bytes, but its manifest says {row['bytes']}; "
                f"the file was truncated or changed; {remedy}"
            )
        if hashes and file_hash(file) != row["sha256"]:
            raise ValueError(f"{file}: its contents changed since it was written; {remedy}")


def output_hash(outputs: list[dict[str, Any]]) -> str:
    """One hash for what a stage made: names and bytes, without logs and times."""
    digest = hashlib.sha256()
    for row in outputs:
        if row["path"] not in _UNHASHED:
            digest.update(f"{row['path']}\0{row['sha256']}\n".encode())
    return digest.hexdigest()


def _say_why_dropped(partial: Path, request: Request) -> None:
    """Unfinished work of other settings goes; the person who watches learns why."""
    begun = _read_request(partial)
    reasons = ["its request.json cannot be read"]
    if begun is not None:
        reasons = differences(begun, request.payload())
    shown = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")
    text = f"begun with other settings, so made from its beginning: {shown}"
    print(f"{request.stage:<12} {text}", file=sys.stderr, flush=True)


def _read_request(partial: Path) -> dict[str, Any] | None:
    try:
        return json.loads((partial / "request.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _seconds_so_far(state: Path) -> float:
    try:
        return float((state / "seconds").read_text())
    except (OSError, ValueError):
        return 0.0


@contextmanager
def _count_seconds(state: Path, earlier: float) -> Iterator[None]:
    """Keep the time spent, so that a resumed stage reports the whole of it."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if state.is_dir():
            try:
                (state / "seconds").write_text(f"{earlier + time.monotonic() - begin:.2f}")
            except OSError as error:
                print(f"could not keep the time spent: {error}", file=sys.stderr)


def _relative(path: Path, base: Path) -> str:
    return os.path.relpath(path, base) if path.is_relative_to(base) else str(path)


def _plain(value: Any) -> Any:
    """Metrics as JSON values; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
