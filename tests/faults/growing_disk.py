"""Runs the micro recipe on a disk that is too small, and grows it only after it was full.

Run: unshare -rm python tests/faults/growing_disk.py DISK RECIPE; DISK is covered by a tmpfs for
this process alone. Prints one JSON object: {"stops": [message, ...], "hashes": {...}}.
"""

import json
import subprocess
import sys
from pathlib import Path

from forks import import_everything, run_fork
from micro import output_hashes

START_KIB, GROWTH, MOST_KIB = 48, 1.25, 64 * 1024


def main(disk: Path, recipe: Path) -> None:
    import_everything()
    size = START_KIB
    _mount("-t", "tmpfs", "-o", f"size={size}k", "none", str(disk))
    arguments = ["run", str(recipe), "--runs", str(disk)]
    stops = []
    while True:
        result = run_fork(arguments, [("judge_by_length", {})])
        if result["code"] == 0:
            break
        stops.append({"code": result["code"], "error": result["error"].strip(), "kib": size})
        size = int(size * GROWTH)
        if size > MOST_KIB or len(stops) > 60:
            break
        _mount("-o", f"remount,size={size}k", str(disk))
    print(json.dumps({"stops": stops, "hashes": output_hashes(disk / "micro")}))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
