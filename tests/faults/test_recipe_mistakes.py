"""Mistakes in a recipe: full path of the key, what was found, the nearest known one; no traceback.

Whatever a value is replaced by, loading gives a ValueError or a recipe, never another exception.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from micro import Forks, write_recipe

from phiforge.recipe import load_recipe, resolve, shipped


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "micro")


MISTAKES = {
    "pretran.steps=1": "unknown key 'pretran'; did you mean 'pretrain'?",
    "pretrain.stpes=1": "unknown key 'pretrain.stpes'; did you mean 'pretrain.steps'?",
    "pretrain.mixture[0].shar=1": "'pretrain.mixture[0].shar'; did you mean 'pretrain.mixture[0]",
    "model.hiden_size=1": "unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?",
    "synthesize.recall.copys=1": "'synthesize.recall.copys'; did you mean 'synthesize.recall.copi",
    "synthesize.families.ordering.cuont=1": "did you mean 'synthesize.families.ordering.count'?",
    "evaluate.recall.nmu=1": "unknown key 'evaluate.recall.nmu'; did you mean 'evaluate.recall.num",
    "exec.thread=1": "unknown key 'exec.thread'; did you mean 'exec.threads'?",
    "curate.sources=[{name: a, path: b, lisence: c}]": "did you mean 'curate.sources[0].licence'?",
    "pretrain.steps=many": "pretrain.steps: Input should be a valid integer",
    "pretrain.lr=-1": "pretrain.lr: Input should be greater than 0, found -1",
    "pretrain.dtype=fp8": "pretrain.dtype: Input should be 'bf16' or 'fp32', found 'fp8'",
    "pretrain.tokens_per_step=100": "pretrain: tokens_per_step is 100; it must be a multiple of",
    "curate=3": "curate must be a block of settings, found 3",
    "exec=3": "exec must be a block of settings, found 3",
    "adopt=[sft]": "adopt must be a block of settings, found ['sft']",
    "adopt.sft=3": "adopt.sft is 3, which is not a folder",
    "seed=one": "seed is 'one'; it must be a whole number",
    "name=a/b": "name is 'a/b'; use a plain folder name",
    "pretrain.warmup_steps=few": "pretrain.warmup_steps: Input should be a valid integer",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_named_with_its_full_path(recipe: Path, change: str):
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=re.escape(MISTAKES[change])):
        load_recipe(recipe, {key: yaml.safe_load(value)})


@pytest.mark.parametrize("change", list(MISTAKES)[1:12:5])
def test_a_mistake_ends_the_command_before_anything_starts(
    forks: Forks, recipe: Path, tmp_path: Path, change: str
):
    result = forks.phiforge("run", recipe, "--runs", tmp_path, "--set", change)
    assert result.code == 2, result
    assert result.error.startswith("error: ")
    assert MISTAKES[change] in result.error
    assert "Traceback" not in result.error
    assert not list(tmp_path.iterdir()), "nothing may start before the recipe is checked"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of stage names to settings, found nothing"),
        ("- a\n", "a recipe is a mapping of stage names to settings, found list"),
        ("name: [a\n", "not valid YAML"),
        ("seed: 0\nseed: 1\n", "key 'seed' was given already on line 1"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("name: \x00\n", "not valid YAML"),
        ("name: \udcff\n", "not UTF-8 text"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "broken.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"broken\.yaml") as caught:
        load_recipe(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nnao"], "did you mean 'nano'?"),
        (["run", "ci", "--until", "pretran"], "did you mean 'pretrain'?"),
        (["run", "ci", "--rebuild", "sfd"], "did you mean 'sft'?"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest(forks: Forks, tmp_path, arguments, message):
    result = forks.phiforge(*arguments, "--runs", tmp_path)
    assert result.code == 2
    assert message in result.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["rnu", "ci"],
        ["run", "ci", "--no-such-option"],
        ["run", "ci", "--set", "pretrain.steps"],
        ["run", "ci", "--set", "=3"],
        ["run", "ci", "--set", "pretrain.steps=[1"],
        ["stage", "sft", "--run", "r", "--input", "midtrain"],
    ],
)
def test_a_misused_command_exits_with_2(forks: Forks, arguments: list[str]):
    result = forks.phiforge(*arguments)
    assert result.code == 2, result
    assert "Traceback" not in result.error


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every block and every value."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _changed(value: Any, path: tuple, new: Any) -> Any:
    copy = yaml.safe_load(yaml.safe_dump(value))
    target = copy
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return copy


def test_any_value_of_another_type_is_refused_or_read(recipe: Path):
    raw = yaml.safe_load(recipe.read_text())
    refused = 0
    for path in _leaves(raw):
        for new in ("text", -1, None, [None], {"a": {"b": 1}}):
            message = _refusal(_changed(raw, path, new))
            if message is not None:
                refused += 1
                assert message.startswith("micro.yaml: "), (path, new, message)
                assert str(path[0]) in message, (path, new, message)
    assert refused > 200


def _refusal(raw: dict[str, Any]) -> str | None:
    """Why a recipe is refused; None when it is read. Any other exception is a failure."""
    try:
        resolve(raw, "micro.yaml")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_one(name: str):
    assert load_recipe(name).stages()
