"""The files of a search: tokens, pairs and paths (JSONL), rollouts.jsonl.gz, search.json.

`collect(search, num_problems, tokenizer, out)` runs a search to its end, writes them question by
question, and returns the metrics. The same rollouts give the same bytes.
"""

import codecs
import gzip
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from phiforge.core.files import write_json
from phiforge.core.store import Metrics, StageDir
from phiforge.inference.interface import PromptTokenizer
from phiforge.posttrain.pivotal.adaptive import by_first_token
from phiforge.posttrain.pivotal.estimates import Estimate
from phiforge.posttrain.pivotal.results import PivotalToken, QuestionResult
from phiforge.posttrain.pivotal.rollouts import row_of
from phiforge.posttrain.pivotal.search import Search

NUM_ALTERNATIVES = 8


def collect(found: Search, num_problems: int, tokenizer: PromptTokenizer, out: StageDir) -> Metrics:
    """Run the search to its end, write its outputs question by question, return the metrics."""
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(out.path / f"{name}.jsonl", "w", encoding="utf-8"))
            for name in ("tokens", "pairs", "paths")
        }
        rollouts = stack.enter_context(_deterministic_gzip(out.path / "rollouts.jsonl.gz"))
        bar = stack.enter_context(out.progress(num_problems, "questions"))
        for question in found.questions():
            _write(files["tokens"], token_rows(question, tokenizer))
            _write(files["pairs"], (asdict(pair) for pair in question.pairs))
            _write(files["paths"], path_rows(question, tokenizer))
            for row in rollout_rows(question):
                rollouts.write(_json(row).encode())
            counts += _count(question)
            bar.advance(1, pairs=found.num_pairs, tokens=found.num_tokens)
    if not found.num_pairs:
        out.note(
            f"no pair found: {counts['searched']} of {found.num_questions} questions lie in the "
            f"band ({counts['below band']} below, {counts['above band']} above); "
            "a wider band, a smaller gap or more questions may help"
        )
    metrics = _metrics(found, counts)
    settings = {"settings": asdict(found.settings), "metrics": metrics}
    write_json(out.path / "search.json", settings)
    return metrics | {"seconds": round(time.monotonic() - begin, 2)}


def _count(question: QuestionResult) -> Counter[str]:
    return Counter(
        {
            question.status: 1,
            "paths": len(question.paths),
            "tokens": len(question.tokens),
            "rising": sum(token.delta > 0 for token in question.tokens),
            "undecided": sum(len(path.undecided) for path in question.paths),
            "prefixes": len(question.ledger.rollouts),
            "rollouts": sum(len(drawn) for _, drawn in question.ledger.history),
        }
    )


def _metrics(found: Search, counts: Counter[str]) -> Metrics:
    return {
        "questions_screened": found.num_questions,
        "questions_in_band": counts["searched"],
        "paths": counts["paths"],
        "pivotal_tokens": counts["tokens"],
        "pairs": found.num_pairs,
        "pivotal_tokens_rising": counts["rising"],
        "questions_below_band": counts["below band"],
        "questions_above_band": counts["above band"],
        "questions_unscored": counts["unscored"],
        "prefixes_estimated": counts["prefixes"],
        "rollouts": counts["rollouts"],
        "rollouts_unscored": found.num_unscored,
        "segments_undecided": counts["undecided"],
        "filter_tokens": found.num_filter_tokens,
        "search_tokens": found.num_search_tokens,
        "confirm_tokens": found.num_confirm_tokens,
        "pair_tokens": found.num_pair_tokens,
        "discarded_tokens": found.num_discarded_tokens,
    }


# ------------------------------------------------------------------------------- output rows


def token_rows(question: QuestionResult, tokenizer: PromptTokenizer) -> Iterator[dict[str, Any]]:
    """tokens.jsonl: each PivotalToken with its text and the other first tokens seen there."""
    for token in question.tokens:
        yield {
            **asdict(token),
            "token": tokenizer.decode([token.token_id], skip_special=False),
            "alternatives": _alternatives(question, token, tokenizer),
            "family": question.problem.metadata.get("family"),
        }


def _alternatives(
    question: QuestionResult, token: PivotalToken, tokenizer: PromptTokenizer
) -> list[dict[str, Any]]:
    prefix = tuple(token.prefix_token_ids[len(question.prompt_token_ids) :])
    groups = question.ledger.first_tokens(prefix)
    detours = question.ledger.detours.get((prefix, token.token_id), ())
    for other, counts in by_first_token(detours).items():
        groups[other] = groups.get(other, Estimate(0, 0)) + counts
    ranked = sorted(groups, key=lambda t: (-groups[t].n, t))[:NUM_ALTERNATIVES]
    return [
        {
            "token_id": other,
            "token": tokenizer.decode([other], skip_special=False),
            "n": groups[other].n,
            "successes": groups[other].successes,
        }
        for other in ranked
    ]


def path_rows(question: QuestionResult, tokenizer: PromptTokenizer) -> Iterator[dict[str, Any]]:
    """paths.jsonl: a path's tokens, their texts and log-probabilities, and p where it is known.

    `p`, `n`, `successes` have one entry more than the tokens: entry i is after i tokens, null where
    nothing was drawn. `pivotal` holds positions: token i moves p from entry i to entry i + 1.
    """
    start = len(question.prompt_token_ids)
    known: dict[tuple[int, ...], PivotalToken] = {
        (*t.prefix_token_ids[start:], t.token_id): t for t in question.tokens
    }
    for number, path in enumerate(question.paths):
        yield {
            "problem_id": question.problem.id,
            "family": question.problem.metadata.get("family"),
            "answer": question.problem.answer,
            "path": number,
            "success": path.success,
            "prompt": tokenizer.decode(question.prompt_token_ids, skip_special=False),
            "prompt_token_ids": question.prompt_token_ids,
            "token_ids": path.token_ids,
            "texts": token_texts(path.token_ids, tokenizer),
            **_hexadecimal(path.token_ids, tokenizer),
            "logprobs": path.logprobs,
            "p": path.p,
            **_along(path.estimates),
            "pivotal": path.pivotal,
            "tokens": [_effect(known[tuple(path.token_ids[: i + 1])], i) for i in path.pivotal],
        }


def _along(estimates: list[Estimate | None]) -> dict[str, list[Any]]:
    return {
        "n": [e.n if e else None for e in estimates],
        "successes": [e.successes if e else None for e in estimates],
        "exact": [bool(e and e.exact) for e in estimates],
    }


def _effect(token: PivotalToken, position: int) -> dict[str, float]:
    low, high = token.interval
    return {"position": position, "delta": token.delta, "low": low, "high": high}


def token_texts(token_ids: Iterable[int], tokenizer: PromptTokenizer) -> list[str]:
    """Each token's share of the text; a character split over tokens goes to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(token)) for token in token_ids]
    rest = decoder.decode(b"", final=True)
    return [*texts[:-1], texts[-1] + rest] if texts else []


def _hexadecimal(token_ids: Iterable[int], tokenizer: PromptTokenizer) -> dict[str, dict[str, str]]:
    """Bytes of the tokens that are no text by themselves, by position; none: no field."""
    found = {}
    for place, token in enumerate(token_ids):
        raw = tokenizer.token_bytes(token)
        try:
            raw.decode()
        except UnicodeDecodeError:
            found[str(place)] = raw.hex()
    return {"hex": found} if found else {}


def rollout_rows(question: QuestionResult) -> Iterator[dict[str, Any]]:
    """rollouts.jsonl.gz: every request with its rollouts and outcomes, in the order they came."""
    prompt = tuple(question.prompt_token_ids)
    for request, rollouts in question.ledger.history:
        yield row_of(question.problem.id, prompt, request, rollouts)


@contextmanager
def _deterministic_gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without name and time, so that equal rollouts give equal bytes."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        yield file


def _write(file: IO[str], rows: Iterable[dict[str, Any]]) -> None:
    file.writelines(_json(row) for row in rows)


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
