"""What the fault tests compare with: a run that nothing disturbed."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed: what it made and its durable operations per stage."""

    recipe: Path
    run: Path
    hashes: dict[str, str]
    operations: dict[str, int]
