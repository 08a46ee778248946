"""Recipes: strict keys with full paths, overrides, derivations, adopting, fingerprints, explain.

PHIFORGE_GOLDEN=write pytest tests/test_recipe.py writes tests/golden/RECIPE.json anew.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from phiforge import recipe as recipes
from phiforge.core.store import Request, Run, StageDir, differences
from phiforge.core.strict_yaml import parse_value, read_yaml
from phiforge.core.usage import UsageError, dotted
from phiforge.recipe import explain, load_recipe, make_request, resolve, run_stage, stage_inputs
from phiforge.stages import BY_NAME

GOLDEN = Path(__file__).parent / "golden"
PRETRAIN = {
    "context": 64,
    "steps": 100,
    "tokens_per_step": 1024,
    "lr": 4e-3,
    "warmup_steps": 10,
    "mixture": [{"source": "docs", "share": 1}],
}


def raw(**blocks: Any) -> dict[str, Any]:
    """A small valid recipe with `blocks` put over it; None takes a block away."""
    base: dict[str, Any] = {
        "curate": {"sources": [{"name": "docs", "path": "texts"}]},
        "tokenizer": {"vocab_size": 300},
        "pack": {},
        "pretrain": dict(PRETRAIN),
    }
    return {key: value for key, value in {**base, **blocks}.items() if value is not None}


def message(blocks: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(blocks, "my.yaml")
    return str(caught.value)


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (
            raw(pretrian={}),
            "my.yaml: unknown key 'pretrian'; did you mean 'pretrain'?",
        ),
        (
            raw(pretrain={**PRETRAIN, "stpes": 3}),
            "my.yaml: unknown key 'pretrain.stpes'; did you mean 'pretrain.steps'?",
        ),
        (
            raw(pretrain={**PRETRAIN, "mixture": [{"sourc": "docs", "share": 1, "source": "a"}]}),
            "unknown key 'pretrain.mixture[0].sourc'; did you mean 'pretrain.mixture[0].source'?",
        ),
        (
            raw(curate={"sources": [{"name": "a", "path": "b"}, {"name": "c", "pth": "d"}]}),
            "unknown key 'curate.sources[1].pth'; did you mean 'curate.sources[1].path'?",
        ),
        (
            raw(synthesize={"families": {"stories": {"cuont": 3}}}),
            "'synthesize.families.stories.cuont'; did you mean 'synthesize.families.stories.count'",
        ),
        (
            raw(evaluate={"recall": {"nmu": 3}}),
            "unknown key 'evaluate.recall.nmu'; did you mean 'evaluate.recall.num'?",
        ),
        (raw(exec={"thread": 2}), "unknown key 'exec.thread'; did you mean 'exec.threads'?"),
        (
            raw(model={"hiden_size": 32}),
            "unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?",
        ),
        (raw(pack={"zzzz": 1}), "unknown key 'pack.zzzz'; known: seed, files"),
        (raw(adopt={"stf": "x"}), "unknown key 'adopt.stf'; did you mean 'adopt.sft'?"),
        (raw(pack={1: 2}), "pack[1]: Keys should be strings, found 1"),
    ],
)
def test_an_unknown_key_is_named_with_its_full_path(blocks, expected):
    assert expected in message(blocks)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (raw(seed="one"), "my.yaml: seed is 'one'; it must be a whole number"),
        (raw(seed=True), "seed is True; it must be a whole number"),
        (raw(name=["a"]), "name is ['a']; it must be text"),
        (raw(name="a/b"), "name is 'a/b'; use a plain folder name"),
        (raw(name=".hidden"), "use a plain folder name"),
        (raw(pack=3), "my.yaml: pack must be a block of settings, found 3"),
        (raw(exec=[1]), "exec must be a block of settings, found [1]"),
        (raw(adopt="sft"), "adopt must be a block of settings, found 'sft'"),
        (raw(exec={"threads": -1}), "exec.threads: Input should be greater than or equal to 0"),
        (
            raw(pretrain={**PRETRAIN, "steps": "many"}),
            "pretrain.steps: Input should be a valid integer, unable to parse string as an "
            "integer, found 'many'",
        ),
        (
            raw(pretrain={k: v for k, v in PRETRAIN.items() if k != "lr"}),
            "my.yaml: pretrain.lr is missing; it has no default",
        ),
        (
            raw(pretrain={**PRETRAIN, "mixture": [{"source": "docs"}]}),
            "my.yaml: pretrain.mixture[0].share is missing; it has no default",
        ),
        (
            raw(pretrain={**PRETRAIN, "tokens_per_step": 100}),
            "my.yaml: pretrain: tokens_per_step is 100; it must be a multiple of context (64)",
        ),
        (
            raw(pretrain=None, model={"preset": "nano"}),
            "model has no effect: there is no pretrain stage",
        ),
        (
            raw(pretrain={**PRETRAIN, "model": {}}, model={"preset": "nano"}),
            "model has no effect: pretrain.model is given",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(blocks, expected):
    assert expected in message(blocks)


def test_every_mistake_of_a_block_is_listed_once():
    text = message(raw(curate={"sources": [{"name": "a", "pth": "b"}]}, pack={"x": 1}))
    assert text.splitlines() == [
        "my.yaml: unknown key 'curate.sources[0].pth'; did you mean 'curate.sources[0].path'?"
    ]
    text = message(raw(pretrain={**PRETRAIN, "lr": -1, "steps": 0}))
    assert [line.split(":")[1] for line in text.splitlines()] == [
        " pretrain.lr",
        " pretrain.steps",
    ]


def test_paths_are_written_as_set_takes_them():
    assert dotted(("pretrain", "mixture", 0, "share")) == "pretrain.mixture[0].share"


# -------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a recipe is a mapping of stage names to settings, found nothing"),
        ("- a\n", "found list"),
        ("name: [a\n", "not valid YAML"),
        ("seed: 0\npack: {}\nseed: 1\n", "line 3: key 'seed' was given already on line 1"),
        ("pack:\n  seed: 1\n  seed: 2\n", "line 3: key 'seed' was given already on line 2"),
        ("? [a, b]\n: 1\n", "line 1: a key must be plain text"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, expected):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"broken\.yaml") as caught:
        read_yaml(file)
    assert expected in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml: not UTF-8 text"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("-4E5", -4e5),
        ("0.1", 0.1),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("nano-s{seed}", "nano-s{seed}"),
        ("[1, 2e-1]", [1, 0.2]),
        ("{source: docs, share: 1}", {"source": "docs", "share": 1}),
    ],
)
def test_values_are_read_as_people_mean_them(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(UsageError, match=r"--set seed: '\[1,' is not valid YAML"):
        parse_value("[1,", "--set seed")


# --------------------------------------------------------------------------------- overrides


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(raw(name="my-s{seed}")))
    return path


def test_set_reaches_blocks_lists_and_stages_that_are_not_there(file):
    found = load_recipe(
        file,
        {
            "seed": 3,
            "pretrain.steps": 70,
            "pretrain.mixture[0].share": 0.25,
            "curate.sources.0.max_documents": 5,
            "exec.threads": 2,
            "report.problems": 0,
        },
    )
    assert found.name == "my-s3"
    assert found.resolved["pretrain"]["steps"] == 70
    assert found.resolved["pretrain"]["mixture"][0]["share"] == 0.25
    assert found.resolved["curate"]["sources"][0]["max_documents"] == 5
    assert found.exec.threads == 2
    assert found.resolved["report"]["problems"] == 0
    assert [stage.name for stage in found.stages()][-1] == "report"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("pretrian.steps", "--set: unknown key 'pretrian'; did you mean 'pretrain'?"),
        ("pretrain.stpes", "unknown key 'pretrain.stpes'; did you mean 'pretrain.steps'?"),
        ("seed.x", "--set seed.x: seed is 0, no block of settings"),
        ("pretrain.mixture[1].share", "'1' is no entry of a list of 1; use 0 to 0, or set the"),
        ("pretrain.mixture.a", "'a' is no entry of a list of 1"),
    ],
)
def test_set_of_an_unknown_path_is_an_error(file, key, expected):
    file.write_text(file.read_text() + "seed: 0\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(file, {key: 1})
    assert expected in str(caught.value)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UsageError, match=r"\(ci, nano.*\); did you mean 'nano'\?"):
        load_recipe("nnao")


# ------------------------------------------------------------------------------- derivations


def test_seed_and_name_follow_the_recipe_unless_written():
    found = resolve(raw(seed=5, name="x-{seed}", pack={"seed": 9}), "my.yaml")
    seeds = {name: config.seed for name, config in found.configs.items()}
    assert seeds == {"curate": 5, "tokenizer": 5, "pack": 9, "pretrain": 5}
    assert found.name == "x-5"
    assert resolve(raw(), "folder/my.yaml").name == "my"


def test_midtrain_inherits_from_pretrain():
    blocks = raw(midtrain={"steps": 20}, model={"num_layers": 2}, seed=4)
    mid = resolve(blocks, "my.yaml").resolved["midtrain"]
    pre = resolve(blocks, "my.yaml").resolved["pretrain"]
    assert (mid["context"], mid["lr"], mid["warmup_steps"]) == (256, 4e-4, 2)
    assert (mid["rope_theta_factor"], mid["long_share"], mid["seed"]) == (25.0, 0.3, 4)
    assert mid["long"] == [
        {
            "source": "long_documents",
            "share": 1.0,
            "min_tokens": 129,
            "upweight_from_tokens": 256,
            "upweight": 2.0,
        }
    ]
    assert "model" not in mid
    same = {"tokens_per_step", "mixture", "dtype", "schedule", "validation_tokens", "clip"}
    assert {key: mid[key] for key in same} == {key: pre[key] for key in same}


def test_what_midtrain_writes_stays_and_text_numbers_derive_too():
    blocks = raw(
        pretrain={**PRETRAIN, "lr": "4e-3"}, midtrain={"steps": 20, "context": 128, "long_share": 0}
    )
    mid = resolve(blocks, "my.yaml").resolved["midtrain"]
    assert (mid["context"], mid["lr"], mid["long_share"]) == (128, 4e-4, 0)


def test_the_model_block_is_pretrains():
    found = resolve(raw(model={"preset": "nano", "num_layers": 2}), "my.yaml")
    assert found.resolved["pretrain"]["model"]["num_layers"] == 2
    assert "model" not in found.resolved


def test_what_is_given_is_not_changed():
    blocks = raw(midtrain={"steps": 20}, model={"num_layers": 2})
    before = json.dumps(blocks)
    resolve(blocks, "my.yaml")
    assert json.dumps(blocks) == before


# ------------------------------------------------------------------------------------- adopt


def test_adopted_stages_do_not_run_and_feed_the_others(tmp_path):
    blocks = raw(midtrain={"steps": 20}, adopt={"pretrain": str(tmp_path)})
    found = resolve(blocks, "my.yaml")
    assert [stage.name for stage in found.stages()] == ["curate", "tokenizer", "pack", "midtrain"]
    # The block of the adopted stage still says what midtraining inherits.
    assert found.resolved["midtrain"]["context"] == 256
    inputs = stage_inputs(BY_NAME["midtrain"], found, Path("runs/my"))
    assert inputs["pretrain"] == tmp_path
    assert inputs["pack"] == Path("runs/my/pack")
    assert found.resolved["adopt"] == {"pretrain": str(tmp_path)}


def test_adopt_errors(tmp_path):
    absent = str(tmp_path / "none")
    assert f"adopt.pack is {absent}, which is not a folder" in message(raw(adopt={"pack": absent}))
    assert "adopt.pack is 3, which is not a folder" in message(raw(adopt={"pack": 3}))
    assert "adopt.sft has no effect: no stage of this recipe reads sft" in message(
        raw(adopt={"sft": str(tmp_path)})
    )


def test_a_missing_upstream_stage_is_named_with_the_remedy(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(raw(pack=None)))
    expected = "stage pretrain reads pack: add that stage to the recipe, or name a finished folder"
    for call in (explain, recipes.run):
        with pytest.raises(UsageError, match=expected):
            call(file, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    sft = {"sft": {"tokens_per_step": 64, "context": 64}}
    file.write_text(yaml.safe_dump(raw(pretrain=None, **sft)))
    with pytest.raises(UsageError, match=r"sft reads midtrain or pretrain: .* adopt\.midtrain"):
        explain(file, tmp_path)


def test_the_first_of_several_choices_is_taken():
    blocks = raw(midtrain={"steps": 20}, sft={"tokens_per_step": 64, "context": 64})
    found = resolve(blocks, "my.yaml")
    inputs = stage_inputs(BY_NAME["sft"], found, Path("r"))
    assert set(inputs) == {"pack", "tokenizer", "midtrain"}


# --------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_resolve_to_what_they_did(name):
    """A golden file pins every resolved value: a changed default of a stage shows here."""
    file = GOLDEN / f"{name}.json"
    resolved = load_recipe(name).resolved
    if os.environ.get("PHIFORGE_GOLDEN") == "write":
        file.write_text(json.dumps(resolved, indent=1, ensure_ascii=False) + "\n")
    changed = differences(json.loads(file.read_text()), resolved)
    assert not changed, "run with PHIFORGE_GOLDEN=write when this is meant:\n" + "\n".join(changed)


@pytest.mark.parametrize("name", recipes.shipped())
def test_a_resolved_recipe_is_a_recipe(name, tmp_path):
    """runs/NAME/recipe.yaml runs the same: nothing is derived twice."""
    file = tmp_path / "recipe.yaml"
    first = load_recipe(name, {"seed": 2})
    file.write_text(yaml.safe_dump(first.resolved, sort_keys=False))
    assert load_recipe(file).resolved == first.resolved


def test_the_ci_recipe_runs_what_nano_runs():
    assert set(load_recipe("ci").configs) == set(load_recipe("nano").configs)


# ------------------------------------------------------------------------------ fingerprints


def fingerprint(found: recipes.Recipe, name: str) -> str:
    return make_request(BY_NAME[name], found, {}).fingerprint


def test_where_it_runs_has_no_part_in_fingerprints():
    here = resolve(raw(), "my.yaml")
    changes = {"device": "cpu", "threads": 1, "workers": 3, "micro_tokens": 64, "compile": "off"}
    there = resolve(raw(exec={**changes, "rows": 8}, name="other"), "my.yaml")
    assert here.exec != there.exec
    for name in here.configs:
        assert fingerprint(here, name) == fingerprint(there, name)


def test_what_shapes_the_result_has():
    here = resolve(raw(), "my.yaml")
    for blocks in (raw(seed=1), raw(pretrain={**PRETRAIN, "steps": 101})):
        assert fingerprint(here, "pretrain") != fingerprint(resolve(blocks, "m"), "pretrain")
    assert fingerprint(here, "pack") == fingerprint(
        resolve(raw(pretrain={**PRETRAIN, "steps": 101}), "my.yaml"), "pack"
    )


# ------------------------------------------------------------------- explain, single stages


def finish(run: Path, found: recipes.Recipe, name: str) -> None:
    """Put a finished stage into a run folder without running it."""

    def work(out: StageDir) -> dict[str, Any]:
        (out.path / "file.txt").write_text(name)
        return {}

    inputs = stage_inputs(BY_NAME[name], found, run)
    Run(run, found.exec).stage(make_request(BY_NAME[name], found, inputs), work, inputs)


def rows(file: Path, runs: Path, **change: Any) -> dict[str, tuple[str, str]]:
    found = explain(file, runs, change)
    return {row["stage"]: (row["action"], "; ".join(row["reasons"])) for row in found}


def test_explain_says_what_would_run_and_why(file, tmp_path):
    runs = tmp_path / "runs"
    fresh = rows(file, runs)
    assert fresh["curate"] == ("run", "it has not been made yet")
    assert fresh["pack"] == ("run", "waits for curate, tokenizer")
    assert not runs.exists(), "explain writes nothing"

    found = load_recipe(file)
    for name in ("curate", "tokenizer"):
        finish(runs / "my-s0", found, name)
    after = rows(file, runs)
    assert after["curate"] == ("skip", "same settings, same inputs")
    assert after["pack"] == ("run", "it has not been made yet")
    assert after["pretrain"] == ("run", "waits for pack")

    changed = rows(file, runs, **{"tokenizer.vocab_size": 310})
    assert changed["tokenizer"] == ("changed", "config.vocab_size: 300 → 310")
    assert rows(file, runs, seed=1)["curate"][0] == "run", "another seed is another run folder"


def test_explain_sees_an_unfinished_stage(file, tmp_path):
    found = load_recipe(file)
    partial = tmp_path / "my-s0" / "curate.partial"
    partial.mkdir(parents=True)
    request: Request = make_request(BY_NAME["curate"], found, {})
    (partial / "request.json").write_text(json.dumps(request.payload()))
    assert rows(file, tmp_path)["curate"][0] == "resume"


def test_rebuild_and_until_name_stages_of_the_recipe(file, tmp_path):
    with pytest.raises(UsageError, match=r"--rebuild: unknown stage of this recipe 'sft'"):
        recipes.run(file, tmp_path / "runs", rebuild=["sft"])
    with pytest.raises(UsageError, match=r"--until: .*'pretran'; did you mean 'pretrain'\?"):
        recipes.run(file, tmp_path / "runs", until="pretran")
    assert not (tmp_path / "runs").exists()


def test_one_stage_alone_runs_on_folders_of_its_own(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The quick brown fox. " * 20)
    sources = [{"name": "texts", "path": str(tmp_path / "texts")}]
    manifest = run_stage("curate", tmp_path / "run", set={"sources": sources})
    assert manifest["metrics"]["documents"] == 1
    assert run_stage("curate", tmp_path / "run", set={"sources": sources}) == manifest
    # What lies in the run folder is taken from there; anything may come from elsewhere.
    set = {"vocab_size": 272, "whole_numbers_below": 1}
    inside = run_stage("tokenizer", tmp_path / "run", set=set)
    spelled = {f"tokenizer.{key}": value for key, value in set.items()}
    assert run_stage("tokenizer", tmp_path / "run", set=spelled) == inside
    outside = run_stage(
        "tokenizer", tmp_path / "other", inputs={"curate": tmp_path / "run" / "curate"}, set=set
    )
    assert inside["output_hash"] == outside["output_hash"]
    assert outside["inputs"]["curate"]["sha256"] == manifest["output_hash"]


@pytest.mark.parametrize(
    ("name", "inputs", "set", "expected"),
    [
        ("pivotel", {}, {}, "unknown stage 'pivotel'; did you mean 'pivotal'?"),
        (
            "pivotal",
            {"stf": "x"},
            {},
            "--input: unknown input of pivotal 'stf'; did you mean 'sft'",
        ),
        ("pivotal", {"pack": "."}, {}, "unknown input of pivotal 'pack'; known: sft, synthesize"),
        ("pivotal", {}, {}, "stage pivotal reads sft: add that stage to the recipe, or name a"),
        ("pivotal", {}, {"gapp": 1}, "unknown key 'pivotal.gapp'; did you mean 'pivotal.gap'?"),
        ("pivotal", {}, {"exec.rwos": 1}, "unknown key 'exec.rwos'; did you mean 'exec.rows'?"),
    ],
)
def test_mistakes_of_a_single_stage(tmp_path, name, inputs, set, expected):
    with pytest.raises(UsageError) as caught:
        run_stage(name, tmp_path / "run", inputs, set)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()
