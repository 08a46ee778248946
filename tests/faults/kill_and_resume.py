"""Kills the ci recipe at ten random instants; every output must equal an undisturbed run's.

Run: python tests/faults/kill_and_resume.py FOLDER [--kills 10] [--seed 0] [--recipe ci]
Writes FOLDER/straight, FOLDER/killed-N and a log of each; exits 1 when any output differs.
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

from micro import output_hashes


def start(folder: Path, recipe: str) -> subprocess.Popen:
    """The run in a process group of its own; what it says is kept beside its folder."""
    command = [sys.executable, "-m", "phiforge", "run", recipe, "--runs", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(folder: Path, process: subprocess.Popen) -> None:
    """Wait for the end; leave with the last lines of the log when the run failed."""
    if process.wait() != 0:
        lines = folder.with_suffix(".log").read_text(errors="replace").splitlines()
        sys.exit(f"{folder}: the run failed with {process.returncode}:\n" + "\n".join(lines[-15:]))


def at_work(folder: Path, process: subprocess.Popen, started: float) -> None:
    """Wait until imports are over: a run writes recipe.yaml before its first stage."""
    while process.poll() is None:
        if any(f.stat().st_mtime > started for f in folder.glob("*/recipe.yaml")):
            return
        time.sleep(0.01)


def straight_run(folder: Path, recipe: str) -> float:
    """The seconds that the stages took together."""
    finish(folder, start(folder, recipe))
    manifests = folder.glob("*/*/manifest.json")
    return sum(json.loads(file.read_text())["seconds"] for file in manifests)


def killed_run(folder: Path, recipe: str, kills: int, seconds: float, rng: random.Random) -> int:
    """Kill -9 the whole process group up to `kills` times, then let it end; how many it took."""
    for number in range(1, kills + 1):
        started = time.time()
        process = start(folder, recipe)
        at_work(folder, process, started)
        # Short enough that a run takes several kills; work since the last checkpoint comes again.
        wait = rng.uniform(0.0, 0.35) * seconds
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            finish(folder, process)
            return number - 1
        partial = [p.name for p in folder.glob("*/*.partial")] or ["between two stages"]
        print(f"{folder.name}: kill {number} after {wait:.1f} s, {' '.join(partial)}", flush=True)
    finish(folder, start(folder, recipe))
    return kills


def compare(straight: Path, killed: Path) -> None:
    """Exit when a file of any stage but the report differs, is missing or is one too many."""
    expected, found = (output_hashes(next(f.iterdir())) for f in (straight, killed))
    assert any(name.endswith(".safetensors") for name in expected), "no weights were written"
    wrong = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if wrong:
        sys.exit(f"{killed}: differ after kills: " + ", ".join(wrong))
    stages = {name.split("/")[0] for name in expected}
    print(f"{killed.name}: {len(expected)} files of {len(stages)} stages are identical", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="ci")
    arguments = parser.parse_args()
    straight = arguments.folder / "straight"
    seconds = straight_run(straight, arguments.recipe)
    print(f"undisturbed run: {seconds:.0f} s", flush=True)
    rng = random.Random(arguments.seed)
    left, number = arguments.kills, 0
    while left > 0:
        number += 1
        killed = arguments.folder / f"killed-{number}"
        left -= killed_run(killed, arguments.recipe, left, seconds, rng)
        compare(straight, killed)


if __name__ == "__main__":
    main()
