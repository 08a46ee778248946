"""Runs every `phiforge` command and Python example of README.md and docs/, on ci in place of nano.

Run: python tests/documented_commands.py RUNS_FOLDER (which may hold a finished ci run).
Commands stand in ```sh blocks, examples in ```python blocks (a page's are one program); each must
exit with 0. `phiforge chat` gets one question.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[tuple[str, str]]:
    """(page, command line or Python code), in the order of the pages."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), re.M | re.S)
        examples = [block for language, block in blocks if language == "python"]
        if examples:  # one program: what a page's first example makes, the next ones use
            found.append((page.name, "\n".join(examples)))
        for language, block in blocks:
            if language == "python":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0].strip()
                if line.startswith("phiforge "):
                    found.append((page.name, line))
    return found


def on_the_ci_recipe(line: str) -> str:
    line = re.sub(r"\bnano(-full)?-s\d+", "ci", line)
    return re.sub(r"\b(run|explain) nano(-full)?\b", r"\1 ci", line)


def main() -> None:
    runs = Path(sys.argv[1]).resolve()
    done: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").symlink_to(runs)
        for page, written in commands():
            line = on_the_ci_recipe(written)
            line = re.sub(r" --set seed=\d+", "", line)
            if line in done:
                continue
            done.add(line)
            example = "\n" in line
            arguments = ["-c", line] if example else ["-m", *shlex.split(line)]
            process = subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                input="Who are you?\n",
                capture_output=True,
                text=True,
                timeout=300,
            )
            shown = "Python example" if example else line
            print(f"{page}: {shown} → {process.returncode}", flush=True)
            if process.returncode != 0:
                sys.exit(f"{process.stdout}\n{process.stderr}\n{page}: {written}")
    if not done:
        sys.exit("no documented command found")


if __name__ == "__main__":
    main()
