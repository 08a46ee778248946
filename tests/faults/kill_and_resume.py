"""Kills the ci recipe at ten random instants; every output must equal an undisturbed run's.

Run: python tests/faults/kill_and_resume.py FOLDER [--kills 10] [--seed 0]
Writes FOLDER/straight and FOLDER/killed; exits 1 when any output of any stage differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "phiforge", "run", "ci", "--runs", str(folder)]


def straight_run(folder: Path) -> float:
    begin = time.monotonic()
    subprocess.run(
        command(folder), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    return time.monotonic() - begin


def killed_run(folder: Path, kills: int, seconds: float, rng: random.Random) -> None:
    """Start the same command again and again; kill -9 its whole process group each time."""
    for number in range(1, kills + 1):
        process = subprocess.Popen(
            command(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Each attempt lives long enough to get somewhere and short enough to be killed often.
        wait = rng.uniform(0.1, 0.35) * seconds
        try:
            process.wait(wait)
            print(f"the run ended before kill {number}", flush=True)
            return
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stages = sorted(p.name for p in (folder / "ci").iterdir() if p.is_dir())
        print(f"kill {number:>2} after {wait:5.1f} s; folders: {' '.join(stages)}", flush=True)
    subprocess.run(
        command(folder), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def output_hashes(run: Path) -> dict[str, str]:
    found = {}
    for manifest in sorted(run.glob("*/manifest.json")):
        if manifest.parent.name == "report":  # shows clocks
            continue
        for row in json.loads(manifest.read_text())["outputs"]:
            if row["path"] != "metrics.jsonl":  # holds clocks
                found[f"{manifest.parent.name}/{row['path']}"] = row["sha256"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seconds = straight_run(arguments.folder / "straight")
    print(f"undisturbed run: {seconds:.0f} s", flush=True)
    killed = arguments.folder / "killed"
    killed_run(killed, arguments.kills, seconds, random.Random(arguments.seed))
    expected = output_hashes(arguments.folder / "straight" / "ci")
    found = output_hashes(killed / "ci")
    assert any(name.endswith(".safetensors") for name in expected), "no weights were written"
    wrong = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if wrong:
        sys.exit("differ after kills: " + ", ".join(wrong))
    print(
        f"{len(expected)} files of {len({n.split('/')[0] for n in expected})} stages are identical"
    )


if __name__ == "__main__":
    main()
