"""What a client may ask for: bodies of the API's calls, checked to the last field.

`parse(CompletionBody, raw)` gives the fields, or raises ApiError(400) naming the one at fault: a
field that is unknown, or set to what this server does not do, is never dropped silently.
Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from phiforge.core.usage import dotted, fields_at, unknown_name
from phiforge.serve.errors import ApiError

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16

# Fields of OpenAI's API that this server does not serve: only the values that change nothing.
_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "metadata": (None, {}),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# What OpenAI's client gives back with an assistant's message.
_MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
    "function_call": (None,),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
}


def _whole(text: str) -> str:
    """Refuses half surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair; send whole characters"
        ) from error
    return text


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _text_of(content: Any) -> Any:
    """A message's content: a text, or parts of type "text", joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(
                f"part {index} is of type {kind!r}; this server takes text alone: "
                '{"type": "text", "text": "..."}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, texts or token ids, as a list of prompts."""
    if isinstance(value, str):
        return [_whole(value)]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return [_whole(item) for item in value]
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return value
    raise ValueError(
        "give a text, a list of texts, a list of token ids or a list of lists of token ids"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


def _forbidden(bias: Any) -> Any:
    """The token ids that a `logit_bias` forbids; other biases than -100 are not served."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ValueError('give an object of token ids, {"1234": -100}')
    for name, value in bias.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise ValueError(f"{name[:24]!r} is no token id (a whole number in quotes)")
        if isinstance(value, bool) or value != -100:
            raise ValueError(
                f"token {name} has {_brief(value)}; this server takes -100 alone, which forbids a "
                "token: leave other biases out"
            )
    return tuple(int(name) for name in bias)


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Text, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    """What a stream tells beside its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class SamplingBody(_Body):
    """What both generating calls have. `null` is a field left out."""

    model: Text
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[float | None, Field(ge=0.0, lt=1e4, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    min_p: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    stop: Annotated[list[Stop] | None, Field(max_length=MAX_STOPS), BeforeValidator(_listed)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # Names of the asker and of a cache: they change no answer.
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    logit_bias: Annotated[tuple[int, ...] | None, BeforeValidator(_forbidden)] = None


class Message(_Body):
    """One message; "developer" is OpenAI's newer name of "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text_of)]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None


class TokenizeBody(_Body):
    """POST /tokenize: a text as it is, or messages as the model would see them."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


B = TypeVar("B", bound=_Body)


def parse(cls: type[B], raw: bytes) -> B:
    """The body as `cls`; ApiError(400) names the first field that is wrong."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is a JSON {type(fields).__name__}; send an object")
    fields = _without_no_ops(fields, _NO_OPS, cls.model_fields)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _without_no_ops(m, _MESSAGE_NO_OPS, {}, ("messages", i)) if isinstance(m, dict) else m
            for i, m in enumerate(messages)
        ]
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise _explained(cls, error) from None


def _without_no_ops(
    fields: Mapping[str, Any],
    no_ops: Mapping[str, tuple[Any, ...]],
    served: Mapping[str, Any],
    path: tuple[str | int, ...] = (),
) -> dict[str, Any]:
    """The fields without those that ask for nothing; ApiError for those that ask for something."""
    kept = {}
    for name, value in fields.items():
        if name in served or name not in no_ops:
            kept[name] = value
        elif value not in no_ops[name]:
            param = dotted((*path, name))
            fine = " or ".join(json.dumps(each) for each in no_ops[name])
            raise ApiError(
                400,
                f"{param} is {_brief(value)}, which this server does not do; it takes {fine}: "
                "leave the field out",
                param=param,
                code="unsupported_parameter",
            )
    return kept


def _explained(cls: type[_Body], error: ValidationError) -> ApiError:
    """A pydantic error in this server's words."""
    found = error.errors(include_url=False)[0]
    path = found["loc"]
    param = dotted(path)
    if found["type"] == "extra_forbidden":
        message = unknown_name("request", path, fields_at(cls, path[:-1]), "field")
        return ApiError(400, message, param=param, code="unknown_parameter")
    if found["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    if found["type"] == "value_error":
        message = str(found["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
    message = f"{param} is {_brief(found.get('input'))}: {found['msg']}"
    return ApiError(400, message, param=param, code="invalid_value")


def _brief(value: Any) -> str:
    """A value for a message; texts and lists, which may be a prompt, by their kind alone."""
    if isinstance(value, str | Sequence | Mapping) and len(value) > 24:
        return f"a {type(value).__name__} of length {len(value)}"
    return repr(value)
