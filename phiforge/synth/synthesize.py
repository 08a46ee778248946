"""The synthesize stage: problems, recall documents and chats, every record a function of the seed.

`run(SynthesizeConfig(), {}, StageDir.scratch("folder"))`, or a recipe's `synthesize:` block, writes
documents.jsonl, long_documents.jsonl, chats.jsonl, problems_train.jsonl, problems_test.jsonl.

Lineage: metadata names family, level, split, seed and index, so that `procedural.generate` makes
any problem again. Train and test problems are disjoint by key (see `procedural.family`);
documents, chats and problems_train draw from different ranges of indices.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

from phiforge.core.distributed import num_workers
from phiforge.core.execute import map_shards
from phiforge.core.records import Chat, Document, Problem, write_records
from phiforge.core.store import Inputs, Metrics, StageDir
from phiforge.synth.chats import bogus_chat, identity_chat, problem_chat, recall_chat
from phiforge.synth.procedural import Item, Split, generate
from phiforge.synth.procedural.drills import drill_document
from phiforge.synth.procedural.recall import copy_document, needle_document, recall_document
from phiforge.synth.settings import SynthesizeConfig
from phiforge.synth.worksheets import choose_style, entry, estimate_tokens, fill, solution

VERSION = 1
__all__ = ["VERSION", "SynthesizeConfig", "run"]

RECORDS_PER_WORKER = 4_000
SHARD = 1_000  # records a worker makes at once; fixed, so that shards never depend on the workers
# First index of each use of the train split: documents, long worksheets, chats, problems.
STARTS = {"documents": 0, "long": 10_000_000, "chats": 20_000_000, "problems": 30_000_000}
TOKENS_PER_FACT = 6  # "12+7=19" and the end of its line
MOST_REPEATS = 2_000  # known problems in a row that say that a family is exhausted


@dataclass(frozen=True)
class Shard:
    """A piece of work: records start..start+count-1 of one kind (of one family and level)."""

    kind: str
    start: int
    count: int
    family: str = ""
    level: int = 0


Record = Document | Chat


def run(config: SynthesizeConfig, inputs: Inputs, out: StageDir) -> Metrics:
    """Write the five files; returns counts of records, estimated tokens, answers of each style."""
    if inputs:
        raise ValueError(f"synthesize reads no earlier stage, but got {', '.join(inputs)}")
    workers = num_workers(out.exec)
    metrics: Metrics = {}
    plans = {
        "documents": _document_shards(config),
        "long_documents": _long_shards(config),
        "chats": _chat_shards(config),
    }
    total = sum(shard.count for shards in plans.values() for shard in shards)
    # Below this, starting worker processes takes longer than the work.
    workers = max(1, min(workers, total // RECORDS_PER_WORKER))
    with out.progress(total, "records") as bar:
        for name, shards in plans.items():
            counts: Counter[str] = Counter()
            made = map_shards(partial(make_shard, config), shards, workers)
            records = _counted(zip(shards, made, strict=True), counts, bar.advance)
            num = write_records(out.path / f"{name}.jsonl", records)
            metrics[name] = {"records": num, **dict(sorted(counts.items()))}
    for split in ("train", "test"):
        problems = list(problems_of(config, split))
        write_records(out.path / f"problems_{split}.jsonl", problems)
        metrics[f"problems_{split}"] = dict(Counter(p.metadata["variant"] for p in problems))
    return {"records": total, "test_problems": sum(metrics["problems_test"].values()), **metrics}


def _counted(
    made: Iterator[tuple[Shard, list[Record]]],
    counts: Counter[str],
    advance: Callable[[float], None],
) -> Iterator[Record]:
    """Pass the records on in order, counting tokens by source and answers by style."""
    for shard, records in made:
        for record in records:
            source = record.metadata["source"]
            if isinstance(record, Document):
                counts[f"{source}_tokens"] += record.metadata["tokens"]
            for style in record.metadata.get("styles", [record.metadata.get("style", "")]):
                counts[style or source] += 1
            yield record
        advance(shard.count)


def make_shard(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    """All records of a shard; a function of the config and the shard alone."""
    return MAKERS[shard.kind](config, shard)


# ---------------------------------------------------------------- plans


def _pieces(
    kind: str, number: int, start: int = 0, family: str = "", level: int = 0
) -> list[Shard]:
    return [
        Shard(kind, start + first, min(SHARD, number - first), family, level)
        for first in range(0, number, SHARD)
    ]


def _per_level(number: int, levels: list[int]) -> Iterator[tuple[int, int]]:
    """A number split evenly over levels, the first ones getting the rest."""
    for place, level in enumerate(levels):
        yield level, number // len(levels) + (place < number % len(levels))


def _family_shards(config: SynthesizeConfig, kind: str, start: int, number: int) -> list[Shard]:
    """Shards of every family; `number` per family, or the family's own count when it is -1."""
    shards: list[Shard] = []
    for name, plan in config.families.items():
        for level, share in _per_level(plan.count if number < 0 else number, plan.levels):
            shards += _pieces(kind, share, start, name, level)
    return shards


def _document_shards(config: SynthesizeConfig) -> list[Shard]:
    return [
        *_family_shards(config, "worksheet", STARTS["documents"], -1),
        *_pieces("drill", config.drills.documents),
        *_pieces("needle", config.recall.needles),
        *_pieces("recall", config.recall.documents),
        *_pieces("copy", config.recall.copies),
    ]


def _long_shards(config: SynthesizeConfig) -> list[Shard]:
    return [
        *_pieces("long needle", config.recall.long_needles),
        *_pieces("long recall", config.recall.long_documents),
        *_pieces("long copy", config.recall.long_copies),
        *_pieces("long worksheet", config.recall.long_worksheets),
    ]


def _chat_shards(config: SynthesizeConfig) -> list[Shard]:
    return [
        *_family_shards(config, "problem chat", STARTS["chats"], config.chats.per_family),
        *_pieces("recall chat", config.chats.recall),
        *_pieces("identity chat", config.chats.identity),
    ]


# ---------------------------------------------------------------- makers


def _rng(config: SynthesizeConfig, *names: object) -> random.Random:
    return random.Random("/".join(map(str, (config.seed, *names))))


def _answer(
    config: SynthesizeConfig, rng: random.Random, item: Item, bogus_share: float
) -> tuple[str, str, str]:
    """(question, response, style): a bogus question with its refusal, or a solution."""
    bogus, style = rng.random() < bogus_share, choose_style(rng, config.styles)
    if bogus and item.bogus_question is not None and item.refusal is not None:
        return item.bogus_question, item.refusal, "refusal"
    return item.question, solution(item, style), style


def _worksheets(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    items = generate(shard.family, shard.level, "train", config.seed, shard.count, shard.start)
    entries, styles = [], []
    for index, item in enumerate(items, shard.start):
        rng = _rng(config, "worksheet", shard.family, shard.level, index)
        question, response, style = _answer(config, rng, item, config.bogus_document_share)
        entries.append(entry(question, response))
        styles.append(style)
    documents: list[Record] = []
    # One token of the context stays free for the end of the document.
    for group in fill(entries, config.context - 1):
        first = shard.start + group[0]
        lineage = {"family": shard.family, "level": shard.level, "first_index": first}
        more = {**lineage, "problems": len(group), "styles": [styles[i] for i in group]}
        name = f"problems/{shard.family}-{shard.level}/{first}"
        text = "".join(entries[i] for i in group)
        documents.append(_document(config, name, text, "problems", more))
    return documents


def _document(
    config: SynthesizeConfig, id: str, text: str, source: str, lineage: dict[str, object]
) -> Document:
    metadata = {"source": source, "split": "train", "licence": "MIT", "seed": config.seed}
    tokens = estimate_tokens(text)
    return Document(id=id, text=text, metadata={**metadata, "tokens": tokens, **lineage})


def _drill_documents(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    lines = (config.context - 1) // TOKENS_PER_FACT
    documents: list[Record] = []
    for index in range(shard.start, shard.start + shard.count):
        text = drill_document(_rng(config, "drill", index), config.drills.below, lines)
        id, lineage = f"drills/{index}", {"task": "drill", "index": index}
        documents.append(_document(config, id, text, "drills", lineage))
    return documents


def _recall_documents(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    documents: list[Record] = []
    long = shard.kind.startswith("long")
    task = shard.kind.removeprefix("long ")
    for index in range(shard.start, shard.start + shard.count):
        rng = _rng(config, shard.kind, index)
        tokens = long_length(config, rng) if long else config.context - 1
        if task == "recall":
            spread = min(config.recall.list_share, 1 - config.recall.list_share) / 2
            share = config.recall.list_share + rng.uniform(-spread, spread)
            text = recall_document(rng, estimate_tokens, tokens, share)
        elif task == "needle":
            text = needle_document(rng, estimate_tokens, needle_length(config, rng, tokens))
        else:
            text = copy_document(rng, estimate_tokens, tokens)
        source = "long" if long else "recall"
        id = f"{source}/{task}/{index}"
        documents.append(_document(config, id, text, source, {"task": task, "index": index}))
    return documents


def needle_length(config: SynthesizeConfig, rng: random.Random, tokens: int) -> int:
    """Short documents with one pair come in every length, so that near is learnt before far."""
    return tokens if tokens >= config.context else rng.randint(min(40, tokens), tokens)


def long_length(config: SynthesizeConfig, rng: random.Random) -> int:
    """Tokens of a long document: the longest, or anywhere above twice the context."""
    longest = int(config.context * config.recall.longest) - 1
    if rng.random() < config.recall.longest_share:
        return longest
    return rng.randint(min(longest, 2 * config.context + 16), longest)


def _long_worksheets(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    """Worksheets of all families, mixed, as long as the long recall documents."""
    documents: list[Record] = []
    names = list(config.families)
    # No document takes more problems than tokens, so ranges of indices never meet.
    stride = int(config.context * config.recall.longest)
    for index in range(shard.start, shard.start + shard.count):
        rng = _rng(config, shard.kind, index)
        room = long_length(config, rng)
        first = STARTS["long"] + index * stride
        used = 0
        entries, styles, families = [], [], []
        for place in count(first):
            family = rng.choice(names)
            level = rng.choice(config.families[family].levels)
            item = next(generate(family, level, "train", config.seed, 1, place))
            question, response, style = _answer(config, rng, item, config.bogus_document_share)
            text = entry(question, response)
            tokens = estimate_tokens(text)
            # A long problem that does not fit must not leave the document below twice the context.
            if used + tokens > room and used > 2 * config.context:
                break
            used += tokens
            entries.append(text)
            styles.append(style)
            families.append(f"{family}-{level}")
        more = {"task": "worksheet", "first_index": first, "families": families, "styles": styles}
        id = f"long/worksheet/{index}"
        documents.append(_document(config, id, "".join(entries), "long", more))
    return documents


def _problem_chats(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    chats: list[Record] = []
    items = generate(shard.family, shard.level, "train", config.seed, shard.count, shard.start)
    for index, item in enumerate(items, shard.start):
        rng = _rng(config, "chat", shard.family, shard.level, index)
        lineage = _lineage(config, item, "train", index)
        _, _, style = _answer(config, rng, item, config.bogus_share)
        id = f"chat/{item.family}-{item.level}/{index}"
        if style == "refusal":
            chats.append(bogus_chat(id, item, lineage))
        else:
            chats.append(problem_chat(id, item, style, lineage))
    return chats


def _recall_chats(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    chats: list[Record] = []
    longest = int(config.context * config.recall.longest)
    for index in range(shard.start, shard.start + shard.count):
        rng = _rng(config, shard.kind, index)
        # Room for the chat's own special tokens and the answer's words.
        tokens = rng.randint(config.context // 2, longest) - 12
        chats.append(recall_chat(f"chat/recall/{index}", rng, estimate_tokens, tokens))
    return chats


def _identity_chats(config: SynthesizeConfig, shard: Shard) -> list[Record]:
    return [
        identity_chat(
            f"chat/identity/{index}", _rng(config, shard.kind, index), config.chats.model_name
        )
        for index in range(shard.start, shard.start + shard.count)
    ]


MAKERS: dict[str, Callable[[SynthesizeConfig, Shard], list[Record]]] = {
    "worksheet": _worksheets,
    "drill": _drill_documents,
    "needle": _recall_documents,
    "recall": _recall_documents,
    "copy": _recall_documents,
    "long needle": _recall_documents,
    "long recall": _recall_documents,
    "long copy": _recall_documents,
    "long worksheet": _long_worksheets,
    "problem chat": _problem_chats,
    "recall chat": _recall_chats,
    "identity chat": _identity_chats,
}

# ---------------------------------------------------------------- problems


def _lineage(config: SynthesizeConfig, item: Item, split: str, index: int) -> dict[str, object]:
    return {
        "family": item.family,
        "field": item.field,
        "level": item.level,
        "split": split,
        "seed": config.seed,
        "index": index,
        "key": item.key,
    }


def problems_of(config: SynthesizeConfig, split: Split) -> Iterator[Problem]:
    """The problems of a split: answerable ones, then unanswerable ones, of each family and level.

    No key comes twice. Raises ValueError when a family has too few distinct problems.
    """
    answerable = config.train_count if split == "train" else config.test_count
    bogus = config.train_bogus_count if split == "train" else config.test_bogus_count
    for name, plan in config.families.items():
        seen: set[str] = set()
        shares = zip(
            _per_level(answerable, plan.levels), _per_level(bogus, plan.levels), strict=True
        )
        for (level, num_answerable), (_, num_bogus) in shares:
            fresh = _distinct(config, name, level, split, seen, num_answerable + num_bogus)
            for index, item in islice(fresh, num_answerable):
                yield _problem(config, item, split, index, "answerable")
            wanted = ((i, item) for i, item in fresh if item.bogus_question is not None)
            for index, item in islice(wanted, num_bogus):
                yield _problem(config, item, split, index, "bogus")


def _distinct(
    config: SynthesizeConfig, family: str, level: int, split: Split, seen: set[str], number: int
) -> Iterator[tuple[int, Item]]:
    start = STARTS["problems"] if split == "train" else 0
    repeats = 0
    for index in count(start):
        item = next(generate(family, level, split, config.seed, 1, index))
        repeats = repeats + 1 if item.key in seen else 0
        if not repeats:
            seen.add(item.key)
            yield index, item
        elif repeats == MOST_REPEATS:
            break
    raise ValueError(
        f"families.{family}: level {level} has fewer than {number} distinct {split} problems; "
        f"lower {split}_count or add levels"
    )


def _problem(config: SynthesizeConfig, item: Item, split: str, index: int, variant: str) -> Problem:
    metadata = {**_lineage(config, item, split, index), "variant": variant}
    id = f"{split}/{item.family}-{item.level}/{index}/{variant}"
    if variant == "bogus":
        assert item.bogus_question is not None
        more = {**metadata, "refusal": item.refusal}
        return Problem(
            id=id, prompt=item.bogus_question, answer=None, kind="refusal", metadata=more
        )
    more = {**metadata, "worked": item.worked, "terse": item.terse}
    return Problem(id=id, prompt=item.question, answer=item.answer, kind=item.kind, metadata=more)
