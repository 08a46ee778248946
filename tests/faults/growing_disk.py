"""Runs the micro recipe on a disk that is too small, and grows it only after it was full.

Run: unshare -rm python tests/faults/growing_disk.py DISK RECIPE; DISK is covered by a tmpfs for
this process alone. Prints one JSON object: {"stops": [message, ...], "hashes": {...}}.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from forks import import_everything, run_fork
from micro import output_hashes

START_KIB, GROWTH, DISK_KIB = 48, 1.25, 16 * 1024


def main(disk: Path, recipe: Path) -> None:
    import_everything()
    free = START_KIB
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "none", str(disk)]
    subprocess.run(mount, check=True)
    # A file takes the rest of the disk and gives it back bit by bit.
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(1024 * (DISK_KIB - free)))
    arguments = ["run", str(recipe), "--runs", str(disk)]
    stops = []
    while True:
        result = run_fork(arguments, [("judge_by_length", {})])
        if result["code"] == 0:
            break
        stops.append({"code": result["code"], "error": result["error"].strip(), "kib": free})
        free = int(free * GROWTH)
        if free > DISK_KIB:
            break
        os.truncate(ballast, 1024 * (DISK_KIB - free))
    print(json.dumps({"stops": stops, "hashes": output_hashes(disk / "micro")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
