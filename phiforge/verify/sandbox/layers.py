"""The protections that are active here, and those that are missing with the reason.

`Sandbox().layers` after the probe; `rows(layers)` for people. Nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layers:
    """What a sandbox found out about this machine when it started."""

    backend: str  # "native", "bubblewrap" or "sandlock"
    active: dict[str, str]  # layer -> detail
    missing: dict[str, str]  # layer -> why not
    isolates_files: bool
    isolates_network: bool

    @property
    def enough(self) -> bool:
        """Whether foreign code may run without an explicit unsafe flag."""
        return self.isolates_files and self.isolates_network

    def lines(self) -> list[str]:
        """One line a layer, the active ones first."""
        width = max(map(len, [*self.active, *self.missing]))
        rows = [f"+ {name:{width}}  {detail}" for name, detail in self.active.items()]
        return rows + [f"- {name:{width}}  {why}" for name, why in self.missing.items()]
