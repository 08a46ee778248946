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
from phiforge.core.files import atomic_path, content_hash
from phiforge.core.progress import clock
from phiforge.core.store import Inputs, Request, Run, StageDir, open_run, read_manifest
from phiforge.core.strict_yaml import read_yaml
from phiforge.core.usage import UsageError, explain_validation, unknown_name
from phiforge.stages import BY_NAME, STAGES, Stage
from phiforge.status import facts

_TOP = ("name", "seed", "exec", "model", "adopt", *BY_NAME)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: `configs` has one entry per stage that runs, in table order.

    `adopt` maps stages that do not run to the folders that stand in for them.
    """

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

    Raises UsageError with the known names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(
        f"no recipe file {name} and no shipped recipe of that name ({', '.join(known)}){hint}"
    )


def load_recipe(name: str | Path, set: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override, derive and check a recipe.

    `set` maps dotted paths ("pretrain.steps") to values. Raises UsageError naming file, full path
    of the key, what is allowed and the nearest known key.
    """
    path = find_recipe(name)
    raw = read_yaml(path)
    for key, value in (set or {}).items():
        _override(raw, key, value)
    return resolve(raw, str(path))


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one value at a dotted path; `mixture[0].share` or `mixture.0.share` reaches a list."""
    *path, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    top = path[0] if path else last
    if top not in _TOP:
        raise UsageError(unknown_name("--set", (top,), _TOP))
    target: Any = raw
    for part in path:
        if isinstance(target, list):
            target = target[_list_index(key, part, target)]
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
    if isinstance(target, list):
        target[_list_index(key, last, target)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise UsageError(f"--set {key}: {'.'.join(path)} is {target!r}, no block of settings")


def _list_index(key: str, part: str, found: list[Any]) -> int:
    if part.isdigit() and int(part) < len(found):
        return int(part)
    raise UsageError(
        f"--set {key}: {part!r} is no entry of a list of {len(found)}; "
        f"use 0 to {len(found) - 1}, or set the whole list"
    )


def resolve(raw: Mapping[str, Any], where: str) -> Recipe:
    """Derive what is not written (seed, model, midtraining's numbers) and check every key."""
    raw = copy.deepcopy(dict(raw))
    for key in raw:
        if key not in _TOP:
            raise UsageError(unknown_name(where, (str(key),), _TOP))
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"{where}: seed is {seed!r}; it must be a whole number")
    name = _name(where, raw.get("name", Path(where).stem), seed)
    blocks = {key: _block(where, key, raw[key]) for key in BY_NAME if key in raw}
    configs = _configs(where, blocks, raw.get("model"), seed)
    exec = _exec(where, _block(where, "exec", raw.get("exec")))
    adopt = _adopted(where, _block(where, "adopt", raw.get("adopt")))
    # An adopted stage does not run; its block may still say what midtraining inherits.
    configs = {key: config for key, config in configs.items() if key not in adopt}
    read = {choice for key in configs for want in BY_NAME[key].reads for choice in _choices(want)}
    for key in adopt:
        if key not in read:
            raise UsageError(
                f"{where}: adopt.{key} has no effect: no stage of this recipe reads {key}"
            )
    resolved = {
        "name": name,
        "seed": seed,
        "exec": exec.model_dump(mode="json"),
        **(
            {"adopt": {key: str(folder.resolve()) for key, folder in adopt.items()}}
            if adopt
            else {}
        ),
        **{key: config.model_dump(mode="json") for key, config in configs.items()},
    }
    return Recipe(name, seed, exec, adopt, configs, resolved)


def _name(where: str, given: Any, seed: int) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise UsageError(f"{where}: name is {given!r}; it must be text")
    name = str(given).replace("{seed}", str(seed))
    if not name.strip() or "/" in name or name.startswith("."):
        raise UsageError(f"{where}: name is {name!r}; use a plain folder name")
    return name


def _block(where: str, key: str, value: Any) -> dict[str, Any]:
    """A block of settings; one that is written without any is empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key} must be a block of settings, found {value!r}")
    return value


def _configs(
    where: str, blocks: dict[str, dict[str, Any]], model: Any, seed: int
) -> dict[str, StageConfig]:
    """Every stage's settings; what follows from other settings is filled in first."""
    moved: dict[tuple, tuple] = {}
    if model is not None:
        pretrain = blocks.get("pretrain")
        if pretrain is None or "model" in pretrain:
            reason = "there is no pretrain stage" if pretrain is None else "pretrain.model is given"
            raise UsageError(f"{where}: model has no effect: {reason}")
        pretrain["model"] = model
        moved["pretrain", "model"] = ("model",)
    configs: dict[str, StageConfig] = {}
    for key, block in blocks.items():
        if key == "midtrain" and "pretrain" in configs:
            from phiforge.train.pretrain import derive_midtrain

            written = configs["pretrain"].model_dump(mode="json", exclude_unset=True)
            block = derive_midtrain(written, block)
        cls = BY_NAME[key].config_class()
        try:
            configs[key] = cls.model_validate({"seed": seed, **block})
        except ValidationError as error:
            raise UsageError(explain_validation(where, (key,), cls, error, moved)) from None
    return configs


def _exec(where: str, block: dict[str, Any]) -> Exec:
    try:
        return Exec.model_validate(block)
    except ValidationError as error:
        raise UsageError(explain_validation(where, ("exec",), Exec, error)) from None


def _adopted(where: str, block: dict[str, Any]) -> dict[str, Path]:
    adopt: dict[str, Path] = {}
    for key, value in block.items():
        if key not in BY_NAME:
            raise UsageError(unknown_name(where, ("adopt", str(key)), BY_NAME))
        if not isinstance(value, str | Path):
            raise UsageError(f"{where}: adopt.{key} is {value!r}, which is not a folder")
        adopt[key] = Path(value).expanduser()
        if not adopt[key].is_dir():
            raise UsageError(f"{where}: adopt.{key} is {value}, which is not a folder")
    return adopt


def _choices(want: str) -> list[str]:
    """The stages that one entry of `Stage.reads` may mean."""
    return want.rstrip("?").split("|")


def stage_inputs(stage: Stage, recipe: Recipe, run: Path) -> dict[str, Path]:
    """Which folder each input of a stage comes from: an earlier stage's, or an adopted one.

    Raises UsageError when the recipe neither runs nor adopts a stage that is needed.
    """
    found: dict[str, Path] = {}
    for want in stage.reads:
        names = _choices(want)
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
                raise UsageError(
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
    Raises UsageError for mistakes in the recipe and StageChanged when a finished stage differs.
    """
    checked = load_recipe(recipe, set)
    rebuild = frozenset(rebuild)
    asked = [*(("--rebuild", name) for name in sorted(rebuild - {"all"})), ("--until", until)]
    for option, name in asked:
        if name is not None and name not in checked.configs:
            raise UsageError(unknown_name(option, (name,), checked.configs, "stage of this recipe"))
    path = Path(runs) / checked.name
    # Every input is known to exist before the first stage starts.
    for stage in checked.stages():
        stage_inputs(stage, checked, path)
    with open_run(path, checked.exec) as folder:
        text = yaml.safe_dump(checked.resolved, sort_keys=False, allow_unicode=True)
        with atomic_path(path / "recipe.yaml") as file:
            file.write_text(text, encoding="utf-8")
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
    state = "kept" if skipped else "done"
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
    `set` maps the stage's fields (and "exec.*") to values; a recipe.yaml in `folder` is not read.
    Raises UsageError for mistakes in names, inputs and values.
    """
    folder = Path(folder)
    if name not in BY_NAME:
        raise UsageError(unknown_name("phiforge", (name,), BY_NAME, "stage"))
    stage = BY_NAME[name]
    reads = [choice for want in stage.reads for choice in _choices(want)]
    for key in inputs or {}:
        if key not in reads:
            known = reads or ["nothing"]
            raise UsageError(unknown_name("--input", (key,), known, f"input of {name}"))
    present = {key: folder / key for key in reads if (folder / key / "manifest.json").exists()}
    raw: dict[str, Any] = {"name": name, name: {}, "adopt": {**present, **(inputs or {})}}
    for key, value in (set or {}).items():
        whole = key.startswith(("exec.", f"{name}."))
        _override(raw, key if whole else f"{name}.{key}", value)
    recipe = resolve(raw, f"stage {name}")
    found = stage_inputs(stage, recipe, folder)
    function, _ = stage.load()
    with open_run(folder, recipe.exec) as run:
        request = make_request(stage, recipe, found)
        return run.stage(
            request, lambda out: function(recipe.configs[name], found, out), found, rebuild
        )
