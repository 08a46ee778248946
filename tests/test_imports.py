"""The house plan: a module imports only lower floors or its own room; light imports stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import phiforge

ROOT = Path(phiforge.__file__).parent
FLOORS = {
    "core": 0, "model": 1, "inference": 2, "verify": 3, "data": 4, "synth": 5, "train": 6,
    "posttrain": 7, "feedback": 7, "evals": 7, "guard": 7,
    "stages": 8, "status": 8, "compare": 8, "recipe": 8, "report": 8, "doctor": 8,
    "serve": 9, "bench": 9, "cli": 10, "__main__": 11,
}  # fmt: skip


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phiforge."):
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "phiforge":
            found |= {f"phiforge.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("phiforge.")}
    return found


def test_imports_go_down_the_floors_only():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0]
        if room == "__init__":
            continue
        assert room in FLOORS, f"{path} is in no room of the house plan"
        for name in imports_of(path):
            other = room_of(name)
            if other.startswith("__") or other == room:
                continue
            if (
                room in ("stages", "status", "compare", "recipe", "report", "doctor")
                and FLOORS[other] == 8
            ):
                continue
            if FLOORS[other] >= FLOORS[room]:
                wrong.append(f"{path.relative_to(ROOT)} (floor {FLOORS[room]}) imports {name}")
    assert not wrong, "\n".join(wrong)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_phiforge_needs_no_torch():
    modules = modules_after("import phiforge; phiforge.__all__")
    assert not modules & {"torch", "numpy", "pydantic", "tokenizers"}


def test_command_line_loads_no_heavy_library():
    modules = modules_after("import phiforge.cli")
    assert not modules & {"torch", "numpy", "pydantic", "transformers"}


def test_every_public_name_resolves():
    for name in phiforge.__all__:
        assert getattr(phiforge, name) is not None
