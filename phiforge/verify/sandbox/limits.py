"""What one run may use: time, memory, output, files, processes.

`Limits()` suits short programs; `dataclasses.replace(limits, cpu_seconds=30)` for others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one run; reaching one ends it and `Outcome.ended` says which.

    Raises ValueError for a bound that no program could keep.
    """

    cpu_seconds: int = 5  # of each process
    wall_seconds: float = 20.0
    memory_bytes: int = 512 * MIB  # address space of each process, resident memory of all
    output_bytes: int = MIB  # of stdout and of stderr, each
    disk_bytes: int = 16 * MIB  # of all files together
    num_files: int = 256
    num_processes: int = 16  # processes and threads

    def __post_init__(self) -> None:
        smallest = {
            "cpu_seconds": 1,
            "wall_seconds": 0.01,
            "memory_bytes": 64 * MIB,  # the interpreter itself needs about 40
            "output_bytes": 1,
            "disk_bytes": 4096,
            "num_files": 8,
            "num_processes": 1,
        }
        for name, value in asdict(self).items():
            if not value >= smallest[name]:
                raise ValueError(f"limits.{name} is {value}; it must be at least {smallest[name]}")
        for name in ("cpu_seconds", "memory_bytes", "disk_bytes", "num_files", "num_processes"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"limits.{name} is {getattr(self, name)}; it must be an integer")
