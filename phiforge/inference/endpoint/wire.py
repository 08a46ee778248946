"""A Call as the JSON that an OpenAI-compatible server takes, its cache key, and its size.

`Preparer(server, tokenizer).prepare(call)` gives body and keys; `expected_tokens`, `worst_tokens`
count a prompt by the tokenizer, or estimate and bound it without one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phiforge.inference.endpoint.calls import Api, Call, sample_seed
from phiforge.inference.interface import prompt_token_ids

_json = json.JSONEncoder(separators=(",", ":")).encode
CHAT, COMPLETIONS = "/chat/completions", "/completions"
KEY_VERSION = 1
FORBID = -100  # the bias by which OpenAI's API bans a token
# Room for what a server's chat template adds: role names, marks, a default system message.
_TEMPLATE_TOKENS = 64
_OURS = {"model", "messages", "prompt", "n", "seed", "stream", "response_format", "echo"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server wants to be asked; `base_model` is the name answers are kept under."""

    model: str
    base_model: str
    chat: bool | None = None
    sends_seed: bool = True
    provider_n: bool = False
    max_tokens_field: str = "max_tokens"
    returns_token_ids: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What the calls of a job mostly share: API, sampling, seed, schema, template version.

    `beginning` is the body's JSON up to the prompt; `digest` stands for all of it in cache keys.
    """

    call: Call
    path: str
    beginning: str
    digest: bytes

    def fits(self, call: Call, path: str) -> bool:
        """Whether another call, through the same API, shares it."""
        mine = self.call
        return (
            path == self.path
            and (call.sampling is mine.sampling or call.sampling == mine.sampling)
            and call.schema is mine.schema
            and (call.seed, call.template_version) == (mine.seed, mine.template_version)
            and (call.echo, call.forbidden) == (mine.echo, mine.forbidden)
        )


@dataclass(frozen=True)
class Prepared:
    """A call ready to send. `content` are the messages, text or token ids as sent, `text` their
    JSON; `digest` + index makes a cache key."""

    call: Call
    form: Form
    content: Any
    text: str
    digest: bytes

    @property
    def path(self) -> str:
        """Which API it goes to."""
        return self.form.path

    def sample_keys(self) -> list[bytes]:
        """The cache keys of the call's samples, in order."""
        first = self.call.first_index
        return [
            hashlib.blake2b(self.digest + index.to_bytes(8, "big"), digest_size=20).digest()
            for index in range(first, first + self.call.n)
        ]

    def payload(self, server: Server, indices: Sequence[int], with_schema: bool) -> bytes:
        """The request for samples `indices` (more than one only with the provider's `n`)."""
        text, more = self.text, ""
        if server.sends_seed and not self.call.echo:
            more += f',"seed":{sample_seed(self.call.seed, indices[0])}'
        if len(indices) > 1:
            more += f',"n":{len(indices)}'
        if self.call.schema is not None and with_schema:
            described = {"name": "answer", "schema": self.call.schema}
            shape = {"type": "json_schema", "json_schema": described}
            more += f',"response_format":{_json(shape)}'
        elif self.call.schema is not None:
            text = _json(_told(self.content, self.call))
        name = "messages" if self.path == CHAT else "prompt"
        return f'{self.form.beginning},"{name}":{text}{more}}}'.encode()


class Preparer:
    """Calls to Prepared; the Form of the last call serves the next when it fits."""

    def __init__(self, server: Server, tokenizer: Any):
        if taken := _OURS & server.extra_body.keys():
            raise ValueError(f"extra_body: {', '.join(sorted(taken))}: set by the client itself")
        self._server, self._tokenizer = server, tokenizer
        self._form: Form | None = None

    def prepare(self, call: Call) -> Prepared:
        """Choose the API, write the body. Raises ValueError for prompts it cannot carry."""
        path, content = _route(call, self._server, self._tokenizer)
        form = self._form
        if form is None or not form.fits(call, path):
            form = self._form = _form(call, path, self._server)
        text = _json(content)
        digest = hashlib.blake2b(form.digest + text.encode(), digest_size=20).digest()
        return Prepared(call, form, content, text, digest)


def _form(call: Call, path: str, server: Server) -> Form:
    fields = {**_sampling(call, server, path), **_bias(call, server), **server.extra_body}
    key = {
        "version": KEY_VERSION,
        "path": path,
        "model": server.base_model,
        "fields": fields,
        "seed": call.seed,
        "schema": call.schema,
        "template": call.template_version,
    }
    text = json.dumps(key, sort_keys=True)
    beginning = _json({"model": server.model, **fields})[:-1]
    return Form(call, path, beginning, hashlib.blake2b(text.encode(), digest_size=20).digest())


def _route(call: Call, server: Server, tokenizer: Any) -> tuple[str, Any]:
    via: Api | None = call.via
    if via is None and server.chat is not None:
        via = "chat" if server.chat else "completions"
    prompt = call.prompt
    if isinstance(prompt, str):
        if via == "chat":
            return CHAT, [{"role": "user", "content": prompt}]
        return COMPLETIONS, prompt
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        if via == "completions":
            if tokenizer is None:
                raise ValueError(
                    "chat messages for /completions need a tokenizer with a chat template: give "
                    "tokenizer=..., or ask through chat (chat=None or True)"
                )
            return COMPLETIONS, list(prompt_token_ids(tokenizer, items))
        return CHAT, [dict(item) for item in items]
    if via == "chat":
        raise ValueError(
            "token ids cannot go through /chat/completions; give text or messages, or chat=None"
        )
    if not items or not all(hasattr(i, "__index__") and not isinstance(i, bool) for i in items):
        raise ValueError(
            f"prompt {items[:3]!r} … is neither text, token ids (whole numbers) nor chat messages "
            "({'role': ..., 'content': ...})"
        )
    return COMPLETIONS, [item.__index__() for item in items]


def _sampling(call: Call, server: Server, path: str) -> dict[str, Any]:
    """The sampling fields; what is off is not sent, since some servers know fewer fields."""
    if call.echo:
        # Some servers refuse max_tokens 0; the one token drawn is left out of the scores.
        return {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    sampling = call.sampling
    field_name = server.max_tokens_field if path == CHAT else "max_tokens"
    body: dict[str, Any] = {field_name: sampling.max_tokens}
    body["temperature"] = float(sampling.temperature)  # 1 and 1.0 are one cache key
    for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != off:
            body[name] = type(off)(value)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logprobs:
        body["logprobs"] = True if path == CHAT else 1
    if server.returns_token_ids:
        body["return_token_ids"] = True
    return body


def _bias(call: Call, server: Server) -> dict[str, Any]:
    """Forbidden tokens as `logit_bias`, the one way most servers have."""
    if not call.forbidden:
        return {}
    if "logit_bias" in server.extra_body:
        raise ValueError("extra_body has a logit_bias, which forbidden tokens need: leave it out")
    return {"logit_bias": {str(token): FORBID for token in sorted(call.forbidden)}}


def _told(content: Any, call: Call) -> Any:
    """The prompt with the schema in words, for servers that take no response_format."""
    order = (
        "\n\nAnswer with one JSON value that fits this JSON Schema, and with nothing else:\n"
        + json.dumps(call.schema)
    )
    if isinstance(content, str):
        return content + order
    if content and isinstance(content[-1], Mapping):
        last = content[-1]
        return [*content[:-1], {**last, "content": f"{last['content']}{order}"}]
    raise ValueError("a JSON schema needs a prompt of text or messages, not of token ids")


# ------------------------------------------------------------------------------ token counts


def expected_tokens(content: Any, tokenizer: Any) -> int:
    """A prompt's tokens: by the tokenizer, or one per four bytes without it."""
    if not isinstance(content, str) and (not content or not isinstance(content[0], Mapping)):
        return len(content)
    if tokenizer is None:
        return -(-_bytes(content) // 4)
    if isinstance(content, str):
        return len(tokenizer.encode(content))
    return len(tokenizer.encode_chat(content, add_generation_prompt=True))


def worst_tokens(content: Any, tokenizer: Any) -> int:
    """A bound on a prompt's tokens; without a tokenizer no byte-level one makes more than bytes."""
    if not isinstance(content, str) and (not content or not isinstance(content[0], Mapping)):
        return len(content) + 1
    if tokenizer is not None:
        return expected_tokens(content, tokenizer) + _TEMPLATE_TOKENS
    messages = 1 if isinstance(content, str) else len(content)
    return _bytes(content) + 8 * messages + _TEMPLATE_TOKENS


def _bytes(content: Any) -> int:
    if isinstance(content, str):
        return len(content.encode("utf-8", "replace"))
    return sum(_bytes(_plain(message.get("content"))) for message in content)


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def text_tokens(text: str, tokenizer: Any) -> int:
    """Tokens of an answer whose server names no count."""
    return len(tokenizer.encode(text)) if tokenizer is not None else -(-_bytes(text) // 4)
