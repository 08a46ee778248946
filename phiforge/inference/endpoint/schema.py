"""Checks a value against a JSON Schema: the keywords that structured answers use, no others.

`check_schema(schema)` refuses keywords that would have no effect here; `problems(value, schema)`
lists what does not fit, each with its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == value and abs(value) != float("inf")


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: _is_number(v) and v == int(v),
    "number": lambda v: _is_number(v),
}
_SAYS_NOTHING = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
_SCHEMA_MAPS = {"properties", "$defs", "definitions"}
_SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMAS = {"items", "additionalProperties"}
_KEYWORDS = (
    {"type", "enum", "const", "required", "$ref", "pattern", "uniqueItems"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    | {"minLength", "maxLength", "minItems", "maxItems"}
)


def check_schema(schema: Any, path: str = "schema") -> None:
    """Raises ValueError, naming the path, for what is no schema or uses another keyword."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{path} is {schema!r}; a JSON Schema is an object")
    for name, value in schema.items():
        where = f"{path}.{name}"
        if name in _SCHEMA_MAPS:
            for key, below in value.items():
                check_schema(below, f"{where}.{key}")
        elif name in _SCHEMA_LISTS:
            for number, below in enumerate(value):
                check_schema(below, f"{where}[{number}]")
        elif name in _SCHEMAS:
            check_schema(value, where)
        elif name == "pattern":
            re.compile(value)
        elif name not in _KEYWORDS | _SAYS_NOTHING:
            known = ", ".join(sorted(_KEYWORDS | _SCHEMA_MAPS | _SCHEMA_LISTS | _SCHEMAS))
            raise ValueError(
                f"{where}: this keyword is not checked here, so it would have no effect; use a "
                f"pydantic model, or only: {known}"
            )


def problems(value: Any, schema: Any) -> list[str]:
    """What does not fit, as "path: problem"; empty when everything does."""
    return list(_problems(value, schema, schema, "$"))


def _problems(value: Any, schema: Any, root: Any, path: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{path}: not allowed"
        return
    if "$ref" in schema:
        yield from _problems(value, _target(schema["$ref"], root), root, path)
    types = schema.get("type")
    if types is not None:
        names = [types] if isinstance(types, str) else list(types)
        if not any(_TYPES[name](value) for name in names):
            yield f"{path}: must be {' or '.join(names)}, found {_shown(value)}"
            return
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{path}: must be {_shown(schema['const'])}, found {_shown(value)}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        allowed = ", ".join(_shown(one) for one in schema["enum"])
        yield f"{path}: must be one of {allowed}, found {_shown(value)}"
    yield from _combined(value, schema, root, path)
    if isinstance(value, dict):
        yield from _object(value, schema, root, path)
    elif isinstance(value, list):
        yield from _array(value, schema, root, path)
    elif isinstance(value, str):
        yield from _string(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(value, schema, path)


def _combined(value: Any, schema: Any, root: Any, path: str) -> Iterator[str]:
    for below in schema.get("allOf", ()):
        yield from _problems(value, below, root, path)
    for name in ("anyOf", "oneOf"):
        if name not in schema:
            continue
        found = [list(_problems(value, below, root, path)) for below in schema[name]]
        fits = sum(not one for one in found)
        if fits == 0:
            yield min(found, key=len)[0] if found else f"{path}: fits nothing"
        elif name == "oneOf" and fits > 1:
            yield f"{path}: fits {fits} of oneOf, must fit one"


def _object(value: dict[str, Any], schema: Any, root: Any, path: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}.{name}: is missing"
    known = schema.get("properties", {})
    for name, below in value.items():
        if name in known:
            yield from _problems(below, known[name], root, f"{path}.{name}")
        elif schema.get("additionalProperties") is False:
            yield f"{path}.{name}: unknown; known: {', '.join(known)}"
        else:
            more = schema.get("additionalProperties", True)
            yield from _problems(below, more, root, f"{path}.{name}")


def _array(value: list[Any], schema: Any, root: Any, path: str) -> Iterator[str]:
    if len(value) < schema.get("minItems", 0):
        yield f"{path}: {len(value)} items, at least {schema['minItems']}"
    if len(value) > schema.get("maxItems", len(value)):
        yield f"{path}: {len(value)} items, at most {schema['maxItems']}"
    if schema.get("uniqueItems") and any(
        _same(one, other) for i, one in enumerate(value) for other in value[:i]
    ):
        yield f"{path}: items must differ"
    first = schema.get("prefixItems", ())
    for number, item in enumerate(value):
        below = first[number] if number < len(first) else schema.get("items", True)
        yield from _problems(item, below, root, f"{path}[{number}]")


def _string(value: str, schema: Any, path: str) -> Iterator[str]:
    if len(value) < schema.get("minLength", 0):
        yield f"{path}: {len(value)} characters, at least {schema['minLength']}"
    if len(value) > schema.get("maxLength", len(value)):
        yield f"{path}: {len(value)} characters, at most {schema['maxLength']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: {_shown(value)} does not match {schema['pattern']!r}"


def _number(value: float, schema: Any, path: str) -> Iterator[str]:
    checks: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        ("minimum", "at least", lambda bound: value >= bound),
        ("maximum", "at most", lambda bound: value <= bound),
        ("exclusiveMinimum", "above", lambda bound: value > bound),
        ("exclusiveMaximum", "below", lambda bound: value < bound),
        ("multipleOf", "a multiple of", lambda step: (value / step) % 1 == 0),
    )
    for name, words, fits in checks:
        if name in schema and not fits(schema[name]):
            yield f"{path}: must be {words} {schema[name]}, found {value}"


def _target(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part:
            found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
