"""What the report reads of a run: manifests, metrics logs and the small files stages leave.

Call `load_run("runs/nano")`; `RunData` reads a file when it is asked for. Writes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from phiforge.core.store import read_manifest
from phiforge.stages import STAGES

TRAINING = ("pretrain", "midtrain", "sft", "dpo-pivotal", "dpo-judge")
Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """A run folder's stages: their folders and, where they are finished, their manifests."""

    name: str
    path: Path
    folders: dict[str, Path]
    manifests: dict[str, dict[str, Any]]

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics of a finished stage; empty when it is not there."""
        return self.manifests.get(stage, {}).get("metrics", {})

    def log(self, stage: str) -> list[Row]:
        """The lines of a stage's metrics.jsonl, of an unfinished stage too."""
        return self.rows(stage, "metrics.jsonl")

    def rows(self, stage: str, file: str, limit: int | None = None) -> list[Row]:
        """The first `limit` JSON lines of a stage's file; empty when there is none.

        Raises ValueError with FILE:LINE for a line that is not JSON, unless it is the last one of
        an unfinished stage, which a kill may have cut.
        """
        path = self.folders.get(stage, self.path / stage) / file
        if not path.is_file():
            return []
        found: list[Row] = []
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, limit), 1):
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError as error:
                    if stage not in self.manifests and not line.endswith("\n"):
                        break
                    raise ValueError(
                        f"{path}:{number}: not valid JSON ({error.msg}); "
                        f"run again with --rebuild {stage}"
                    ) from None
        return found

    def json(self, stage: str, file: str) -> Any:
        """A stage's JSON file, or None when there is none; ValueError when it is damaged."""
        path = self.folders.get(stage, self.path / stage) / file
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: not valid JSON ({error.msg}); run again with --rebuild {stage}"
            ) from None

    @cached_property
    def scores(self) -> dict[str, Any]:
        """scores.json of the evaluation; empty when there is none."""
        return self.json("evaluate", "scores.json") or {}

    @cached_property
    def recipe_text(self) -> str:
        """The recipe as it was resolved; empty when the run has none."""
        path = self.path / "recipe.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def transcript_files(self) -> list[str]:
        """The transcript files of the evaluation, relative to its folder, in checkpoint order."""
        folder = self.folders.get("evaluate", self.path / "evaluate")
        found = {p.stem: f"transcripts/{p.name}" for p in folder.glob("transcripts/*.jsonl")}
        order = [c["name"] for c in self.scores.get("checkpoints", [])]
        known = [name for name in order if name in found]
        return [found[name] for name in (*known, *sorted(found.keys() - set(known)))]


def load_run(path: str | Path, adopted: Mapping[str, Path] | None = None) -> RunData:
    """The stages of a run folder; `adopted` names folders that lie elsewhere.

    Raises ValueError when there is no stage at all or a manifest is damaged.
    """
    path = Path(path)
    folders: dict[str, Path] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        partial = path / f"{stage.name}.partial"
        folder = (adopted or {}).get(stage.name, path / stage.name)
        if stage.name == "report":
            continue
        if (folder / "manifest.json").exists():
            manifest = read_manifest(folder)
            assert manifest is not None
            folders[stage.name], manifests[stage.name] = folder, manifest
        elif partial.is_dir():
            folders[stage.name] = partial
        elif folder.is_dir():
            folders[stage.name] = folder
    if not folders:
        raise ValueError(
            f"{path}: no stage of a run in this folder; give a folder such as runs/NAME, "
            "or run a recipe first"
        )
    return RunData(path.resolve().name, path, folders, manifests)
