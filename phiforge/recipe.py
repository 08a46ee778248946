"""The recipe: one YAML file is one whole run, checked key by key before anything starts.

Call `run("nano", runs="runs", set={"seed": 1})`; `load_recipe(name_or_file)` only checks it.
A run writes runs/NAME/STAGE/ for every stage, and runs/NAME/recipe.yaml as it was resolved.
"""

import copy
import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from phiforge.core.config import Exec, StageConfig
from phiforge.core.files import content_hash
from phiforge.core.progress import clock
from phiforge.core.store import Inputs, Request, Run, StageDir, open_run, read_manifest
from phiforge.stages import BY_NAME, STAGES, Stage
from phiforge.status import facts

_TOP = ("name", "seed", "exec", "model", "adopt", *BY_NAME)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: `configs` has one entry per stage that runs, in table order."""

    name: str
    seed: int
    exec: Exec
    adopt: dict[str, Path]
    configs: dict[str, StageConfig]
    resolved: dict[str, Any]

    def stages(self) -> list[Stage]:
        """The stages this recipe runs, in the order of the stage table."""
        return [stage for stage in STAGES if stage.name in self.configs]


def shipped() -> dict[str, Path]:
    """The recipes in the package: name → file."""
    folder = Path(str(resources.files("phiforge") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """A recipe's file from its path or the name of a shipped one.

    Raises ValueError with the known names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"no recipe file {name} and no shipped recipe of that name ({', '.join(known)}){hint}"
    )


def load_recipe(name: str | Path, set: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override, derive and check a recipe.

    `set` maps dotted paths ("pretrain.steps") to values. Raises ValueError naming file, full path
    of the key, what is allowed and the nearest known key.
    """
    path = find_recipe(name)
    raw = read_yaml(path)
    for key, value in (set or {}).items():
        _override(raw, key, value)
    return resolve(raw, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dictionary; duplicate keys are errors."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a recipe is a mapping of stage names to settings")
    return value


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise yaml.YAMLError(f"line {line}: key {key!r} was given already on line {seen[key]}")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)
# YAML 1.1 reads 1e-3 as text; people write it as a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """The value of a `--set key=value`, read as YAML."""
    return yaml.load(text, Loader=_StrictLoader)


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    if parts[0] not in _TOP:
        raise ValueError(_unknown("--set", (parts[0],), _TOP))
    target = raw
    for part in parts[:-1]:
        child = target.get(part)
        if child is None:
            child = target[part] = {}
        if not isinstance(child, dict):
            raise ValueError(f"--set {key}: {part} is not a block of settings")
        target = child
    target[parts[-1]] = value


def resolve(raw: Mapping[str, Any], where: str) -> Recipe:
    """Derive what is not written (seed, model, midtraining's numbers) and check every key."""
    raw = copy.deepcopy(dict(raw))
    for key in raw:
        if key not in _TOP:
            raise ValueError(_unknown(where, (str(key),), _TOP))
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"{where}: seed is {seed!r}; it must be a whole number")
    name = str(raw.get("name", Path(where).stem)).replace("{seed}", str(seed))
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"{where}: name is {name!r}; use a plain folder name")
    blocks = {stage.name: raw.get(stage.name) for stage in STAGES if stage.name in raw}
    for key, block in blocks.items():
        blocks[key] = {} if block is None else block
        if not isinstance(blocks[key], dict):
            raise ValueError(f"{where}: {key} must be a block of settings, found {block!r}")
    _derive(blocks, raw.get("model"), seed)
    configs = {key: _check(where, key, BY_NAME[key], block) for key, block in blocks.items()}
    try:
        exec = Exec(**(raw.get("exec") or {}))
    except ValidationError as error:
        raise ValueError(_explain(where, "exec", Exec, error)) from None
    resolved = {
        "name": name,
        "seed": seed,
        "exec": exec.model_dump(mode="json"),
        **{key: config.model_dump(mode="json") for key, config in configs.items()},
    }
    adopt = {key: Path(value) for key, value in (raw.get("adopt") or {}).items()}
    for key, folder in adopt.items():
        if key not in BY_NAME:
            raise ValueError(_unknown(where, ("adopt", key), tuple(BY_NAME)))
        if not folder.is_dir():
            raise ValueError(f"{where}: adopt.{key} is {folder}, which is not a folder")
    return Recipe(name, seed, exec, adopt, configs, resolved)


def _derive(blocks: dict[str, Any], model: Any, seed: int) -> None:
    """Fill what follows from other settings, so that a recipe says each thing once."""
    for block in blocks.values():
        block.setdefault("seed", seed)
    pretrain, midtrain = blocks.get("pretrain"), blocks.get("midtrain")
    if pretrain is not None and model is not None:
        pretrain.setdefault("model", model)
    if pretrain is not None and midtrain is not None:
        from phiforge.train.pretrain import derive_midtrain

        blocks["midtrain"] = derive_midtrain(pretrain, midtrain)


def _check(where: str, name: str, stage: Stage, block: dict[str, Any]) -> StageConfig:
    cls = stage.config_class()
    try:
        return cls(**block)
    except ValidationError as error:
        raise ValueError(_explain(where, name, cls, error)) from None


def _explain(where: str, prefix: str, cls: type, error: ValidationError) -> str:
    """A pydantic error as lines that name the full key, the value and the remedy."""
    lines = []
    for item in error.errors():
        path = (prefix, *(str(part) for part in item["loc"]))
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(where, path, _fields_at(cls, item["loc"][:-1])))
        else:
            shown = repr(item.get("input"))[:60]
            given = "" if item["type"] == "missing" else f", found {shown}"
            lines.append(f"{where}: {'.'.join(path)}: {item['msg']}{given}")
    return "\n".join(lines)


def _fields_at(cls: Any, location: Iterable[Any]) -> tuple[str, ...]:
    """The field names of the model that a location of a validation error lies in."""
    for part in location:
        field = getattr(cls, "model_fields", {}).get(part)
        if field is not None:
            cls = field.annotation
        for argument in getattr(cls, "__args__", ()):
            if hasattr(argument, "model_fields"):
                cls = argument
    return tuple(getattr(cls, "model_fields", {}))


def _unknown(where: str, path: tuple[str, ...], known: Iterable[str]) -> str:
    known = tuple(known)
    close = difflib.get_close_matches(path[-1], known, 1)
    hint = f"; did you mean {'.'.join((*path[:-1], close[0]))!r}?" if close else ""
    hint = hint or (f"; known: {', '.join(known)}" if known else "")
    return f"{where}: unknown key {'.'.join(path)!r}{hint}"


def stage_inputs(stage: Stage, recipe: Recipe, run: Path) -> dict[str, Path]:
    """Which folder each input of a stage comes from: an earlier stage's, or an adopted one.

    Raises ValueError when the recipe neither runs nor adopts a stage that is needed.
    """
    found: dict[str, Path] = {}
    for want in stage.reads:
        names = want.rstrip("?").split("|")
        for name in names:
            if name in recipe.adopt:
                found[name] = recipe.adopt[name]
            elif name in recipe.configs:
                found[name] = run / name
            else:
                continue
            break
        else:
            if not want.endswith("?"):
                raise ValueError(
                    f"stage {stage.name} reads {' or '.join(names)}: add that stage to the "
                    f"recipe, or name a finished folder under adopt.{names[0]}"
                )
    return found


def make_request(stage: Stage, recipe: Recipe, inputs: Inputs) -> Request:
    """What the stage is asked to make, with the content hash of each input."""
    _, version = stage.load()
    hashes = {}
    for name, folder in inputs.items():
        manifest = read_manifest(folder) if (folder / "manifest.json").exists() else None
        hashes[name] = manifest["output_hash"] if manifest else content_hash(folder)
    config = recipe.configs[stage.name].model_dump(mode="json")
    return Request(stage.name, version, config, hashes)


def run(
    recipe: str | Path,
    runs: str | Path = "runs",
    set: Mapping[str, Any] | None = None,
    rebuild: Iterable[str] = (),
    until: str | None = None,
) -> Path:
    """Run a recipe: every stage in order, finished ones skipped; returns the run folder.

    `rebuild` names stages to make anew ("all" = every one); what follows from them is made anew
    too where their output changed. `until` stops after that stage.
    Raises ValueError for mistakes in the recipe and StageChanged when a finished stage differs.
    """
    checked = load_recipe(recipe, set)
    rebuild = frozenset(rebuild)
    for name in (*(rebuild - {"all"}), *([until] if until else [])):
        if name not in checked.configs:
            raise ValueError(_unknown("run", (name,), checked.configs))
    path = Path(runs) / checked.name
    # Every input is known to exist before the first stage starts.
    for stage in checked.stages():
        stage_inputs(stage, checked, path)
    with open_run(path, checked.exec) as folder:
        text = yaml.safe_dump(checked.resolved, sort_keys=False, allow_unicode=True)
        (path / "recipe.yaml").write_text(text, encoding="utf-8")
        _walk(folder, checked, rebuild, until)
    return path


def _walk(folder: Run, recipe: Recipe, rebuild: frozenset[str], until: str | None) -> None:
    anew: set[str] = set()
    for stage in recipe.stages():
        inputs = stage_inputs(stage, recipe, folder.path)
        request = make_request(stage, recipe, inputs)
        function, _ = stage.load()
        config = recipe.configs[stage.name]

        def work(out: StageDir, function=function, config=config, inputs=inputs) -> dict[str, Any]:
            return function(config, inputs, out)

        asked = bool({stage.name, "all"} & rebuild)
        action = "run" if asked else folder.decide(request, rebuild=False)[0]
        # What follows from a rebuilt stage is rebuilt too, unless that stage came out the same.
        again = asked or (action == "changed" and bool(anew & inputs.keys()))
        manifest = folder.stage(request, work, inputs, rebuild=again)
        if again:
            anew.add(stage.name)
        print_stage(stage.name, manifest, skipped=action == "skip")
        if stage.name == until:
            return


def print_stage(name: str, manifest: dict[str, Any], skipped: bool) -> None:
    """One aligned line per finished stage: the clock, and the numbers it wants to show."""
    state = "there" if skipped else "done"
    line = f"{name:<12} {state:<5} {clock(manifest.get('seconds', 0)):>6}  "
    print(line + facts(manifest["metrics"]), file=sys.stderr, flush=True)


def explain(
    recipe: str | Path, runs: str | Path = "runs", set: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """For every stage: whether it would run, and why. Nothing is started or written."""
    checked = load_recipe(recipe, set)
    path = Path(runs) / checked.name
    folder = Run(path, checked.exec)
    rows: list[dict[str, Any]] = []
    waits: list[str] = []
    for stage in checked.stages():
        inputs = stage_inputs(stage, checked, path)
        pending = [name for name in waits if name in inputs]
        if pending:
            action, reasons = "run", [f"waits for {', '.join(pending)}"]
        else:
            action, reasons = folder.decide(make_request(stage, checked, inputs), rebuild=False)
        if action != "skip":
            waits.append(stage.name)
        rows.append({"stage": stage.name, "action": action, "reasons": reasons})
    return rows


def run_stage(
    name: str,
    folder: str | Path,
    inputs: Mapping[str, str | Path] | None = None,
    set: Mapping[str, Any] | None = None,
    rebuild: bool = False,
) -> dict[str, Any]:
    """Run one stage alone into folder/NAME and return its manifest.

    `inputs` maps earlier stages to folders; those not given are taken from `folder` itself.
    `set` maps the stage's fields (and "exec.*") to values.
    """
    folder = Path(folder)
    if name not in BY_NAME:
        raise ValueError(_unknown("stage", (name,), BY_NAME))
    stage = BY_NAME[name]
    present = {
        choice: folder / choice
        for want in stage.reads
        for choice in want.rstrip("?").split("|")
        if (folder / choice / "manifest.json").exists()
    }
    raw: dict[str, Any] = {"name": folder.name, name: {}, "adopt": {**present, **(inputs or {})}}
    for key, value in (set or {}).items():
        _override(raw, key if key.startswith("exec.") else f"{name}.{key}", value)
    recipe = resolve(raw, "stage")
    found = stage_inputs(stage, recipe, folder)
    function, _ = stage.load()
    with open_run(folder, recipe.exec) as run:
        request = make_request(stage, recipe, found)
        return run.stage(
            request, lambda out: function(recipe.configs[name], found, out), found, rebuild
        )
