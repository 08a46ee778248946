"""The report: one self-contained HTML page, a pure function of a run's manifests and small files.

A recipe runs it as its last stage, into RUN/report/index.html. `build("runs/nano")` makes it again
at any time, of an unfinished run too, into RUN/report.html: a stage's own files never change.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from phiforge.core.config import StageConfig
from phiforge.core.files import atomic_path
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.report.page import render
from phiforge.report.run_data import RunData, load_run

__all__ = ["VERSION", "ReportConfig", "RunData", "build", "load_run", "render", "run"]

VERSION = 1
PAGE = "index.html"


class ReportConfig(StageConfig):
    """Settings of the report: how many examples it shows."""

    transcripts: int = Field(
        default=6, ge=0, description="Transcripts per checkpoint and suite, half right, half wrong."
    )
    pivotal_paths: int = Field(default=8, ge=0, description="Answers shown with pivotal tokens.")
    problems: int = Field(default=2, ge=0, description="Example problems per family.")


def run(config: ReportConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Write the page of the run that `out` lies in, into `out.path`."""
    page = _write(out.path.parent, out.path / PAGE, config, inputs)
    return {"bytes": page.stat().st_size}


def build(
    run_folder: str | Path, config: ReportConfig | None = None, target: str | Path | None = None
) -> Path:
    """Write the page of a finished or unfinished run to `target` (RUN/report.html); its path.

    Raises ValueError when the folder holds no stage.
    """
    folder = Path(run_folder)
    page = Path(target) if target is not None else folder / "report.html"
    return _write(folder, page, config or ReportConfig(), {})


def _write(folder: Path, target: Path, config: ReportConfig, inputs: Mapping[str, Path]) -> Path:
    data = load_run(folder, inputs)
    text = render(
        data,
        transcripts=config.transcripts,
        pivotal_paths=config.pivotal_paths,
        problems=config.problems,
    )
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target
