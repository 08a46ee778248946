r"""Questions for a search: JSONL, Parquet or Hugging Face data sets, and the prompts made of them.

`as_prompts(read_problems("questions.jsonl", answer="target"), format="chat", system="Be brief.")`;
`read_problems("test.jsonl", preset="gsm8k")` knows the columns. Writes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from phiforge.core.records import Problem, is_record_file, read_rows
from phiforge.data.benchmarks import BENCHMARKS, find, read_row, split_of

Format = Literal["chat", "text"]
Think = Literal["open", "closed"]
Row = Mapping[str, Any]

FORMATS = ("chat", "text")
# "closed" is how the models that think are told not to.
THINK = {"open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}
_TAGS = ("<think>", "</think>")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_MESSAGE_KEYS = {"role", "content"}


def read_problems(
    source: str | Path,
    *,
    preset: str | None = None,
    prompt: str = "prompt",
    answer: str = "answer",
    id: str = "id",
    kind: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """The questions of a file, a folder of files, a saved data set, or one of the hub, in order.

    prompt, answer, id: names of columns; "a.b" is column b inside of a. A prompt is text, chat
        messages or token ids. Without an id column the ids are numbered. The answer may be missing
        when `kind` is "code". All other columns go to `metadata` (tests of code, for instance).
    kind: how `phiforge.verify.is_correct` compares; the rows' own "kind", else "text".
    preset: gsm8k, math, humaneval or mbpp, which know their columns and kind.
    split: of a data set ("train" by default); of a folder, the files of that name. subset (the
        configuration) and revision (a commit) are for the hub alone.

    Raises ValueError, with FILE:LINE, for a missing column, two rows of one id, or no row at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if preset is not None:
        find(preset)
        columns = {"prompt": prompt, "answer": answer, "id": id}
        changed = [name for name, column in columns.items() if column != name]
        if changed or kind is not None:
            names = ", ".join([*changed, *(["kind"] if kind is not None else [])])
            raise ValueError(f"{names}: has no effect with preset {preset!r}, which knows its own")
    rows = list(islice(_rows(str(source), split, subset, revision), limit))
    if not rows:
        raise ValueError(f"{source}: no row in it")
    if preset is not None:
        problems = [
            (where, read_row(preset, row, where, split or split_of(where))) for where, row in rows
        ]
    else:
        problems = _from_columns(rows, prompt, answer, id, kind)
    _check_ids(problems)
    return [problem for _, problem in problems]


def _rows(
    source: str, split: str | None, subset: str | None, revision: str | None
) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    if path.exists() and not saved:
        if subset is not None or revision is not None:
            raise ValueError(f"{source}: subset and revision have no effect on files")
        yield from _file_rows(path, split)
    elif saved or (_HUB_NAME.fullmatch(source) and not is_record_file(path)):
        yield from _dataset_rows(source, path if saved else None, split, subset, revision)
    else:
        raise FileNotFoundError(
            f"{source}: no such file or folder; give a .jsonl, .jsonl.gz or .parquet file, a "
            "folder of them, or the OWNER/NAME of a data set"
        )


def _file_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    if path.is_dir() and split is not None:
        files = sorted(file for file in path.iterdir() if is_record_file(file))
        chosen = [file for file in files if split_of(f"{file}:0") == split]
        if not chosen:
            names = ", ".join(file.name for file in files) or "no .jsonl or .parquet file"
            raise ValueError(f"{path}: no file of split {split!r}; there are: {names}")
        for file in chosen:
            yield from read_rows(file)
    else:
        yield from read_rows(path)


def _dataset_rows(
    name: str, saved: Path | None, split: str | None, subset: str | None, revision: str | None
) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: to read a Hugging Face data set: pip install 'phiforge[hub]'"
        ) from error
    try:
        if saved is not None:
            found: Any = datasets.load_from_disk(str(saved))
            if isinstance(found, Mapping):
                found = found[split or "train"]
        else:
            found = datasets.load_dataset(
                name, subset, split=split or "train", revision=revision, streaming=True
            )
    except KeyError:
        splits = ", ".join(map(str, found))
        raise ValueError(f"{name}: no split {split or 'train'!r}; there are: {splits}") from None
    except Exception as error:  # the library raises many kinds for what cannot be reached
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name}: no such file or folder here, and no data set that can be loaded ({reason})"
        ) from error
    for number, row in enumerate(found, 1):
        yield f"{name}/{split or 'train'}:{number}", row


# ------------------------------------------------------------------------------------ columns


def _from_columns(
    rows: Sequence[tuple[str, Any]], prompt: str, answer: str, id: str, kind: str | None
) -> list[tuple[str, Problem]]:
    problems = []
    needs_answer = kind != "code" and not any(_has(row, answer) for _, row in rows)
    for number, (where, row) in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        if not _has(row, prompt):
            raise ValueError(_missing(where, "prompt", prompt, row))
        own_kind = kind or row.get("kind", "text")
        if needs_answer and own_kind not in ("code", "refusal"):
            raise ValueError(_missing(where, "answer", answer, row))
        if id != "id" and not _has(row, id):
            raise ValueError(_missing(where, "id", id, row))
        used = {column.partition(".")[0] for column in (prompt, answer, id)} | {"kind", "metadata"}
        rest = {name: value for name, value in row.items() if name not in used}
        own = row.get("metadata")
        problem = Problem(
            id=str(_get(row, id)) if _has(row, id) else f"row/{number}",
            prompt=_prompt_value(_get(row, prompt), where, prompt),
            answer=_answer_value(_get(row, answer), where, answer) if _has(row, answer) else None,
            kind=str(own_kind),
            metadata={**rest, **(own if isinstance(own, Mapping) else {})},
        )
        problems.append((where, problem))
    return problems


def _has(row: Any, column: str) -> bool:
    if not isinstance(row, Mapping):
        return False
    if column in row:
        return True
    first, _, rest = column.partition(".")
    return bool(rest) and _has(row.get(first), rest)


def _get(row: Any, column: str) -> Any:
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    return _get(row[first], rest)


def _missing(where: str, what: str, column: str, row: Row) -> str:
    names = [str(name) for name in row]
    close = difflib.get_close_matches(column, names, 1, 0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{where}: no column {column!r} for {what}; {hint}there are: {', '.join(names)}"


def _prompt_value(value: Any, where: str, column: str) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    messages = all(isinstance(m, Mapping) and set(m) >= _MESSAGE_KEYS for m in items)
    if items and messages:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in items]
    if items and all(isinstance(i, int) and not isinstance(i, bool) for i in items):
        return items
    raise ValueError(
        f"{where}: column {column!r} holds {value!r:.60}; a prompt is a text, messages with role "
        "and content, or token ids"
    )


def _answer_value(value: Any, where: str, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value:  # what tables put where nothing is
            return None
        return str(int(value)) if float(value).is_integer() else repr(value)
    if isinstance(value, Sequence) and len(value) == 1:
        return _answer_value(value[0], where, column)
    raise ValueError(f"{where}: column {column!r} holds {value!r:.60}; an answer is one text")


def _check_ids(problems: Iterable[tuple[str, Problem]]) -> None:
    places: dict[str, str] = {}
    for where, problem in problems:
        if problem.id in places:
            raise ValueError(
                f"{where}: id {problem.id!r} is there twice (before: {places[problem.id]}); a "
                "search keeps its samples by id"
            )
        places[problem.id] = where


# ------------------------------------------------------------------------------------ prompts


def as_prompts(
    problems: Iterable[Problem],
    *,
    format: Format = "chat",
    system: str | None = None,
    template: str | None = None,
    instruction: str | None = None,
    think: Think | None = None,
    tokenizer: Any = None,
) -> list[Problem]:
    r"""The problems as a model is asked them.

    format: "chat": a text becomes a user message, which the model's own template renders; "text":
        it is continued as it is. Messages and token ids stay as they are.
    template: what a text is put into, at "{prompt}": "Question: {prompt}\nAnswer:".
    instruction: added to a text after an empty line. A benchmark's own: BENCHMARKS[name].
    think: "open": the answer begins inside of <think>, and what is thought belongs to the path;
        "closed": with empty thoughts. Needs the tokenizer: the prompts become token ids.

    metadata gets "question" (the text as it was) and "prompt_format" (the code oracle reads it).
    Raises ValueError for what does not go together.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if think is not None and think not in THINK:
        raise ValueError(f"think is {think!r}; allowed: {', '.join(THINK)}, or none")
    if think is not None and tokenizer is None:
        raise ValueError("think needs tokenizer: the tag follows the template's own tokens")
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"template is {template!r}; it needs a place for {{prompt}}")
    if system is not None and format == "text":
        raise ValueError("system needs format 'chat'; a text prompt has no system part")
    return [
        _as_prompt(problem, format, system, template, instruction, think, tokenizer)
        for problem in problems
    ]


def _as_prompt(
    problem: Problem,
    format: Format,
    system: str | None,
    template: str | None,
    instruction: str | None,
    think: Think | None,
    tokenizer: Any,
) -> Problem:
    prompt: Any = problem.prompt
    metadata: dict[str, Any] = {**problem.metadata, "prompt_format": format}
    if isinstance(prompt, str):
        metadata["question"] = prompt
        # Not str.format: questions and instructions hold braces of their own.
        prompt = template.replace("{prompt}", prompt) if template else prompt
        prompt = f"{prompt}\n\n{instruction}" if instruction else prompt
        if format == "chat":
            prompt = [{"role": "user", "content": prompt}]
    elif template or instruction:
        raise ValueError(
            f"problem {problem.id}: template and instruction need a text, not messages or token ids"
        )
    if _is_chat(prompt):
        if format == "text":
            raise ValueError(f"problem {problem.id}: format 'text' needs a text, not messages")
        if system is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
    if think is not None:
        prompt = _with_think(prompt, think, tokenizer)
    return replace(problem, prompt=prompt, metadata=metadata)


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def _with_think(prompt: Any, think: Think, tokenizer: Any) -> list[int]:
    """The prompt's token ids, then the tag, unless the template has opened <think> itself."""
    from phiforge.inference.interface import prompt_token_ids

    ids = list(prompt_token_ids(tokenizer, prompt))
    opened = tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith("<think>")
    text = THINK[think].removeprefix("<think>") if opened else THINK[think]
    if opened and think == "open":
        return ids
    return ids + _encode(tokenizer, text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of our own text, in which the names of special tokens are special tokens."""
    try:
        return list(tokenizer.encode(text, allow_special=True))
    except TypeError:  # a tokenizer without special tokens
        return list(tokenizer.encode(text))


def response_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """A response as its oracle sees it: no special tokens, but <think> and </think> kept.

    To some tokenizers these are special tokens, which plain decoding leaves out.
    """
    tags: dict[int, str] = {}
    for tag in _TAGS:
        ids = _encode(tokenizer, tag)
        if len(ids) == 1 and not tokenizer.decode(ids, skip_special=True):
            tags[ids[0]] = tag
    text, piece = "", []
    for index in token_ids if tags else ():
        if index in tags:
            text += tokenizer.decode(piece, skip_special=True) + tags[index]
            piece = []
        else:
            piece.append(index)
    return text + tokenizer.decode(piece if tags else list(token_ids), skip_special=True)


def preset_instruction(preset: str, format: Format) -> str | None:
    r"""What a preset adds to a chat prompt (\boxed{}, one code block); nothing to a raw text."""
    return BENCHMARKS[preset].instruction or None if format == "chat" else None
