"""The guides: tables of settings as the code has them, every setting on its page, links that hold.

PHIFORGE_DOCS=write pytest tests/test_docs.py writes the tables anew, between the lines
`<!-- fields MODULE:CLASS [without MODULE:CLASS] -->` and `<!-- end -->` of docs/*.md.
"""

import ast
import os
import re
import types
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest

from phiforge.core.config import Exec, StageConfig
from phiforge.stages import BY_NAME, STAGES

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PAGE_OF = {
    **dict.fromkeys(("curate", "synthesize", "tokenizer", "pack"), "data.md"),
    **dict.fromkeys(("pretrain", "midtrain", "sft", "dpo-pivotal"), "training.md"),
    "pivotal": "pivotal.md",
    **dict.fromkeys(("evaluate", "report"), "evaluation.md"),
}
# Described once, for all stages.
SHARED = (StageConfig, Exec)
TABLE = re.compile(
    r"<!-- fields (?P<cls>\S+)(?: without (?P<base>\S+))? -->\n(?P<table>.*?)<!-- end -->", re.S
)


class Field(NamedTuple):
    annotation: Any
    default: Any
    required: bool
    meaning: str


def fields_of(cls: Any) -> dict[str, Field]:
    """The settings of a pydantic model or dataclass."""
    found = {}
    for name, info in (getattr(cls, "__pydantic_fields__", None) or {}).items():
        default = info.default if info.default_factory is None else info.default_factory()
        inner = settings_in(info.annotation)
        first = (inner.__doc__ or "").split("\n")[0] if inner else ""
        meaning = info.description or first
        found[name] = Field(info.annotation, default, info.is_required(), meaning)
    return found


def settings_in(annotation: Any) -> Any:
    """The class with fields inside an annotation, or None."""
    if isinstance(annotation, type) and getattr(annotation, "__pydantic_fields__", None):
        return annotation
    return next((c for a in get_args(annotation) if (c := settings_in(a))), None)


def documented(cls: Any, base: Any | None) -> dict[str, Field]:
    """What a table shows: fields that `base`, or every stage, has in the same way are left out."""
    left_out = fields_of(base) if base else {}
    if cls is not StageConfig and issubclass(cls, StageConfig):
        left_out |= fields_of(StageConfig)
    return {name: f for name, f in fields_of(cls).items() if left_out.get(name) != f}


def values(annotation: Any) -> str:
    """The allowed values in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return values(next(a for a in arguments if a is not type(None)))
    if origin in (tuple, list):
        if len(arguments) == 2 and arguments[1] is not Ellipsis:
            return "two numbers"
        return "list" if settings_in(arguments[0]) else f"list of {values(arguments[0])}"
    if origin is dict:
        inner = "block" if settings_in(arguments[1]) else values(arguments[1])
        return f"name: {inner}"
    if settings_in(annotation):
        return "block"
    plain = {
        int: "whole number",
        float: "number",
        bool: "`true`, `false`",
        str: "text",
        Path: "path",
        Any: "any value",
    }
    return plain[getattr(annotation, "__origin__", annotation)]


def default(field: Field) -> str:
    if field.required:
        return "required"
    if settings_in(field.annotation):
        return "see below" if field.default else ""
    if field.default in (None, (), {}, ""):
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{field.default}`"


def table(cls: Any, base: Any | None) -> str:
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for name, field in documented(cls, base).items():
        meaning = field.meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | {values(field.annotation)} | {default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def named(name: str | None) -> Any:
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def classes_on(page: Path) -> list[tuple[Any, Any | None]]:
    found = TABLE.finditer(page.read_text(encoding="utf-8"))
    return [(named(match["cls"]), named(match["base"])) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_settings_are_the_code(page):
    text = page.read_text(encoding="utf-8")
    fresh = TABLE.sub(
        lambda match: match[0].replace(
            match[0][match[0].index("-->") + 4 :],
            table(named(match["cls"]), named(match["base"])) + "<!-- end -->",
        ),
        text,
    )
    if os.environ.get("PHIFORGE_DOCS") == "write":
        page.write_text(fresh, encoding="utf-8")
        return
    assert text == fresh, f"run with PHIFORGE_DOCS=write to renew the tables of {page.name}"


def reachable(cls: Any) -> set[Any]:
    """A settings class and every one inside it."""
    found = {cls}
    for field in fields_of(cls).values():
        if (inner := settings_in(field.annotation)) is not None and inner not in found:
            found |= reachable(inner)
    return found


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_every_setting_of_a_stage_is_on_its_page(stage):
    pages = [ROOT / "docs" / name for name in {PAGE_OF[stage], "data.md", "recipe.md"}]
    shown: dict[Any, set[str]] = {}
    bases: dict[Any, Any] = {}
    for cls, base in [row for page in pages for row in classes_on(page)]:
        shown[cls] = set(documented(cls, base))
        bases[cls] = base
    for cls in reachable(BY_NAME[stage].config_class()):
        assert cls in shown, f"{PAGE_OF[stage]} lacks a table of {cls.__module__}:{cls.__name__}"
        names = shown[cls] | shown.get(bases[cls], set())
        missing = set(fields_of(cls)) - names - set(fields_of(StageConfig))
        assert not missing, f"{PAGE_OF[stage]}: {cls.__name__} lacks {missing}"


def test_settings_of_every_stage_are_on_the_recipe_page():
    classes = {cls for cls, _ in classes_on(ROOT / "docs" / "recipe.md")}
    assert set(SHARED) <= classes


def test_every_field_says_what_it_means():
    silent = [
        f"{cls.__name__}.{name}"
        for stage in STAGES
        for cls in reachable(stage.config_class())
        for name, field in fields_of(cls).items()
        if not field.meaning
    ]
    assert not silent, silent


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        # The measurements of nano come with the recipe itself.
        assert there.exists() or there.name == "nano.md", f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{page.name}: {target}; there are {sorted(anchors)}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_python_of_the_guides_is_python(page):
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        ast.parse(block)
