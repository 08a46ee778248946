"""What a person asked for wrongly, said so that it can be put right: path, value, nearest name.

Raise `UsageError(...)`; `unknown_name(...)` and `explain_validation(...)` make its messages.
The command line exits with 2 for it: nothing was started.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

Part = str | int


class UsageError(ValueError):
    """A mistake in a recipe, an override or a command: nothing was started."""


def dotted(path: Sequence[Part]) -> str:
    """("pretrain", "mixture", 0, "share") as pretrain.mixture[0].share."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def unknown_name(where: str, path: Sequence[Part], known: Iterable[str], what: str = "key") -> str:
    """`WHERE: unknown key 'a.b'; did you mean 'a.c'?`, or all that are known."""
    known = tuple(known)
    close = difflib.get_close_matches(str(path[-1]), known, 1)
    hint = f"; did you mean {dotted((*path[:-1], close[0]))!r}?" if close else ""
    hint = hint or (f"; known: {', '.join(known)}" if known else "")
    return f"{where}: unknown {what} {dotted(path)!r}{hint}"


def explain_validation(
    where: str,
    block: Sequence[Part],
    cls: type,
    error: ValidationError,
    moved: Mapping[tuple[Part, ...], tuple[Part, ...]] | None = None,
) -> str:
    """A pydantic error as one line per mistake: full path, what is allowed, what was found.

    `block` is the path of the settings that `cls` describes. `moved` maps the beginning of a path
    to where the person wrote it.
    """
    lines = []
    errors = error.errors()
    below = {item["loc"][:depth] for item in errors for depth in range(len(item["loc"]))}
    for item in errors:
        if item["type"] == "too_short" and item["loc"] in below:
            continue  # entries that were refused themselves are not missing
        path = (*block, *item["loc"])
        for start, origin in (moved or {}).items():
            if path[: len(start)] == start:
                path = (*origin, *path[len(start) :])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(unknown_name(where, path, fields_at(cls, item["loc"][:-1])))
        elif item["type"] == "missing":
            lines.append(f"{where}: {dotted(path)} is missing; it has no default")
        elif item["type"] == "value_error":
            # Our own checks: they name the values themselves.
            message = str(item["msg"]).removeprefix("Value error, ")
            lines.append(f"{where}: {dotted(path)}: {message}")
        else:
            shown = repr(item.get("input"))
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            lines.append(f"{where}: {dotted(path)}: {item['msg']}, found {shown}")
    return "\n".join(lines)


def fields_at(cls: Any, location: Sequence[Part]) -> tuple[str, ...]:
    """The field names of the settings that a path below `cls` leads to."""
    for part in location:
        field = _fields(cls).get(str(part))
        if field is not None:
            cls = _settings_in(field.annotation) or field.annotation
    return tuple(_fields(cls))


def _fields(cls: Any) -> Mapping[str, Any]:
    """The pydantic fields of a model or a pydantic dataclass."""
    if not isinstance(cls, type):
        return {}
    return getattr(cls, "__pydantic_fields__", None) or getattr(cls, "model_fields", {})


def _settings_in(annotation: Any) -> Any:
    """The class with fields inside tuple[X, ...], dict[str, X] or X | None; None without one."""
    if _fields(annotation):
        return annotation
    for argument in get_args(annotation):
        if (found := _settings_in(argument)) is not None:
            return found
    return None
