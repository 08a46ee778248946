"""The chat format: one Jinja template, rendered as `transformers` renders it, with spans.

Call `Template(source).render(messages)`; `.spans(messages)` also says where message contents and
assistant turns lie in the text, without searching it. Writes nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Phi-4's format (arXiv 2412.08905, appendix A): no newline, no default system message. The
# `generation` block marks what an assistant says, its end token included: the span of SFT's loss.
PHI4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
ROLE = re.compile(r"[A-Za-z0-9_-]+")
# Four characters that mark spans while rendering; chosen per chat from a private-use plane, so
# that none of them occurs in a message.
_PRIVATE_USE = range(0x100000, 0x10FFFD)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: the body, between two marks when marks are given."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name("_generation_marks", "load", lineno=line)
        call = self.call_method("_mark", [marks], lineno=line)
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: Any, caller: Any) -> str:
        opening, closing = marks or ("", "")
        return opening + caller() + closing


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    """Compile under the settings `transformers` uses, so that any model's template renders."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"chat template: line {error.lineno}: {error.message}; correct chat_template in the "
            "tokenizer folder"
        ) from error


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError unless every message has a plain role and a text, and nothing else."""
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(
                f"messages[{index}]: keys {sorted(message)}; give exactly 'role' and 'content'"
            )
        if not isinstance(message["content"], str):
            raise ValueError(
                f"messages[{index}].content: {type(message['content']).__name__}; give a string"
            )
        if not isinstance(message["role"], str) or not ROLE.fullmatch(message["role"]):
            raise ValueError(
                f"messages[{index}].role: {message['role']!r}; give letters, digits, '_' and '-' "
                "(system, user, assistant)"
            )


@dataclass(frozen=True)
class Rendered:
    """A rendered chat and where things lie in it: (start, end) character offsets."""

    text: str
    contents: tuple[tuple[int, int], ...]  # message texts, stripped of outer white space
    generated: tuple[tuple[int, int], ...]  # what {% generation %} marks
    roles: tuple[str, ...]  # of each span in contents


@dataclass(frozen=True)
class Template:
    """A chat template with the special tokens it may name (`bos_token`, `eos_token`, …)."""

    source: str
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def has_generation(self) -> bool:
        return re.search(r"{%-?\s*generation\b", self.source) is not None

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> str:
        """The chat as text, byte for byte what `transformers` renders."""
        return self._render([dict(message) for message in messages], add_generation_prompt, None)

    def _render(
        self, messages: list[dict[str, str]], prompt: bool, marks: tuple[str, str] | None
    ) -> str:
        check_messages(messages)
        values = dict(self.variables) | {"tools": None, "documents": None}
        try:
            return _compile(self.source).render(
                messages=messages,
                add_generation_prompt=prompt,
                _generation_marks=marks,
                **values,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}; these messages do not fit it") from error

    def spans(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> Rendered:
        """Render, and find contents and generated spans by marks carried through the template.

        ValueError when the template rewrites contents (other than trimming them), because then no
        one can tell a user's text from the template's.
        """
        check_messages(messages)
        opening, closing, generated, ungenerated = _free_marks(messages)
        marked = [
            {"role": message["role"], "content": _around(message["content"], opening, closing)}
            for message in messages
        ]
        raw = self._render(marked, add_generation_prompt, (generated, ungenerated))
        rendered = _unmark(
            raw,
            (opening, closing),
            (generated, ungenerated),
            tuple(message["role"] for message in messages),
        )
        if self.source != PHI4_TEMPLATE and (
            rendered.text != self.render(messages, add_generation_prompt)
            or len(rendered.contents) != len(messages)
        ):
            raise ValueError(
                "chat template: it rewrites or omits message texts, so special tokens inside a "
                "user's text cannot be told from its own; use a template that inserts texts as "
                "they are"
            )
        return rendered


def _free_marks(messages: Sequence[Mapping[str, str]]) -> tuple[str, str, str, str]:
    used = {char for message in messages for char in message["content"] if ord(char) > 0xFFFFF}
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return next(free), next(free), next(free), next(free)


def _around(content: str, opening: str, closing: str) -> str:
    """Marks inside the outer white space, so that a template that trims still trims."""
    core = content.strip()
    if not core:
        return content + opening + closing
    start = content.index(core)
    return content[:start] + opening + core + closing + content[start + len(core) :]


def _unmark(
    raw: str, content: tuple[str, str], generation: tuple[str, str], roles: tuple[str, ...]
) -> Rendered:
    pieces = re.split(f"([{''.join(content + generation)}])", raw)
    spans: dict[str, list[tuple[int, int]]] = {content[1]: [], generation[1]: []}
    opened = {content[1]: 0, generation[1]: 0}
    closing_of = {content[0]: content[1], generation[0]: generation[1]}
    at = 0
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            at += len(piece)
        elif piece in closing_of:
            opened[closing_of[piece]] = at
        else:
            spans[piece].append((opened[piece], at))
    return Rendered(
        "".join(pieces[::2]), tuple(spans[content[1]]), tuple(spans[generation[1]]), roles
    )
