"""YAML as recipes are written: no key twice, 1e-3 is a number, `off` is a word.

Call `read_yaml(path)` for a recipe file, `parse_value("1e-3")` for one value.
Writes nothing.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from phiforge.core.usage import UsageError


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads words and numbers as YAML 1.2 does."""


# YAML 1.1 turns on, off, yes and no into booleans; `compile: off` must stay a word.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# It also reads 1e-3 as text; people write it as a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {line}: a key must be plain text")
        key = key_node.value
        if key in seen:
            raise yaml.YAMLError(f"line {line}: key {key!r} was given already on line {seen[key]}")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a dictionary.

    Raises UsageError naming the file, and the line where there is one, for what is not UTF-8 text,
    not YAML, not a mapping, or has a key twice.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise UsageError(f"{path}: a recipe is a mapping of stage names to settings, found {found}")
    return value


def parse_value(text: str, where: str = "value") -> Any:
    """One value written as YAML: `3`, `1e-3`, `off`, `[1, 2]`, `{source: docs, share: 1}`.

    Raises UsageError that begins with `where`.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{where}: {text!r} is not valid YAML ({problem})") from None
