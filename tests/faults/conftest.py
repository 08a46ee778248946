"""Fixtures of the fault tests: a warm process for commands, and an undisturbed run to compare."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from micro import Forks, Result, output_hashes, write_recipe
from undisturbed import Undisturbed


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as warm:
        yield warm


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, counts = write_recipe(folder / "micro"), folder / "operations.json"
    result = forks.phiforge(
        "run",
        recipe,
        "--runs",
        folder,
        inject={"judge_by_length": {}, "count_operations": {"file": str(counts)}},
    )
    assert result.code == 0, result.error
    run = folder / "micro"
    return Undisturbed(recipe, run, output_hashes(run), json.loads(counts.read_text()))


@pytest.fixture
def finished(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, to damage."""
    shutil.copytree(undisturbed.run, tmp_path / "micro", ignore=shutil.ignore_patterns("texts"))
    return tmp_path / "micro"


@pytest.fixture
def run(forks: Forks, undisturbed: Undisturbed, tmp_path: Path) -> Callable[..., Result]:
    """`phiforge run micro.yaml --runs tmp_path MORE`, with faults given as keywords."""

    def command(*more: str, **inject: dict) -> Result:
        faults = {"judge_by_length": {}, **inject}
        return forks.phiforge("run", undisturbed.recipe, "--runs", tmp_path, *more, inject=faults)

    return command
