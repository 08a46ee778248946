"""The pivotal stage: which problems it takes, what it writes, what it refuses."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pivotal_world import FORK, START, ScriptedEngine, ScriptedTokenizer, oracle, problems
from pydantic import ValidationError

from phiforge.core.records import Pair, Problem, read_records, write_records
from phiforge.core.store import StageDir
from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal.outputs import collect, token_texts
from phiforge.posttrain.pivotal.stage import (
    PivotalConfig,
    as_prompt,
    choose_problems,
    with_room,
)

OUTPUTS = ("tokens.jsonl", "pairs.jsonl", "paths.jsonl", "rollouts.jsonl.gz")


def rows(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def collected(
    folder: Path, die_at: int | None = None, **arguments: Any
) -> tuple[dict[str, Any], dict[str, bytes]]:
    out = StageDir.scratch(folder)
    engine = ScriptedEngine(FORK, die_at=die_at)
    run = pivotal.search(
        engine,
        problems(6, family="forks"),
        oracle,
        method="paper",
        n_filter=16,
        n_rollouts=16,
        max_tokens=12,
        log=out.state / "rollouts.jsonl",
        **arguments,
    )
    metrics = collect(run, 6, engine.tokenizer, out)
    return metrics, {name: (folder / name).read_bytes() for name in OUTPUTS}


def test_outputs_and_metrics_agree(tmp_path: Path) -> None:
    metrics, _ = collected(tmp_path)
    tokens, paths = rows(tmp_path / "tokens.jsonl"), rows(tmp_path / "paths.jsonl")
    pairs = list(read_records(tmp_path / "pairs.jsonl", Pair))
    assert metrics["questions_screened"] == 6
    assert metrics["pivotal_tokens"] == len(tokens) > 0
    assert metrics["pairs"] == len(pairs) > 0
    assert metrics["paths"] == len(paths) > 0
    assert metrics["filter_tokens"] > 0
    assert metrics["confirm_tokens"] == metrics["pair_tokens"] == 0
    assert tokens[0]["family"] == "forks"
    assert tokens[0]["token"].startswith(("<", "Y", "N"))
    assert tokens[0]["alternatives"]
    for path in paths:
        assert len(path["p"]) == len(path["token_ids"]) + 1
        assert len(path["texts"]) == len(path["logprobs"]) == len(path["token_ids"])
        assert path["p"][0] is not None
        assert path["exact"][-1] is True


def test_kept_rollouts_are_all_that_was_paid_for(tmp_path: Path) -> None:
    metrics, _ = collected(tmp_path)
    kept = rows(tmp_path / "rollouts.jsonl.gz")
    generated = sum(len(ids) for row in kept for ids in row["token_ids"])
    assert generated == metrics["filter_tokens"] + metrics["search_tokens"]
    assert sum(len(row["outcomes"]) for row in kept) == metrics["rollouts"]


def test_outputs_are_the_same_bytes_however_it_ran(tmp_path: Path) -> None:
    _, once = collected(tmp_path / "once")
    _, resumed = collected(tmp_path / "once")
    _, small = collected(tmp_path / "small", questions_in_flight=1, rollouts_per_call=16)
    assert once == resumed == small


@pytest.mark.parametrize("call", [0, 3, 7, 12])
def test_outputs_are_the_same_bytes_after_a_kill(tmp_path: Path, call: int) -> None:
    arguments: dict[str, Any] = {"rollouts_per_call": 16, "pairs_from": "all_prefixes"}
    _, expected = collected(tmp_path / "undisturbed", **arguments)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "killed", die_at=call, **arguments)
    _, again = collected(tmp_path / "killed", **arguments)
    assert again == expected


def test_problems_are_answerable_of_the_family_and_shuffled_by_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "problems_train.jsonl"
    kinds = [("a", "answerable", "1"), ("a", "bogus", "1"), ("b", "answerable", "1")]
    kinds += [("a", "answerable", None)] + [("a", "answerable", "2")] * 20
    write_records(
        file,
        [
            Problem(id=str(i), prompt="?", answer=x, metadata={"family": f, "variant": v})
            for i, (f, v, x) in enumerate(kinds)
        ],
    )
    chosen = choose_problems(file, PivotalConfig(families=("a",), num_questions=10))
    assert len(chosen) == 10
    assert not {"1", "2", "3"} & {p.id for p in chosen}
    assert chosen == choose_problems(file, PivotalConfig(families=("a",), num_questions=10))
    other = choose_problems(file, PivotalConfig(families=("a",), num_questions=10, seed=1))
    assert other != chosen
    with pytest.raises(ValueError, match="no answerable problem of c"):
        choose_problems(file, PivotalConfig(families=("c",)))


def test_questions_without_room_for_the_answer_are_left_out() -> None:
    asked = [Problem(id=str(n), prompt=[START] * n, answer="Y") for n in (3, 4, 5)]
    fitting = with_room(asked, ScriptedTokenizer(), max_tokens=12, context=16)
    assert [p.id for p in fitting] == ["3", "4"]
    with pytest.raises(ValueError, match="lower max_tokens"):
        with_room(asked, ScriptedTokenizer(), max_tokens=14, context=16)


def test_text_prompts_become_chat_messages() -> None:
    problem = Problem(id="1", prompt="2+2?", answer="4")
    assert as_prompt(problem, PivotalConfig()).prompt == [{"role": "user", "content": "2+2?"}]
    asked = as_prompt(problem, PivotalConfig(system="Be brief.")).prompt
    assert asked[0] == {"role": "system", "content": "Be brief."}
    assert as_prompt(problem, PivotalConfig(prompt_format="text")).prompt == "2+2?"
    ready = Problem(id="2", prompt=[START], answer="4")
    assert as_prompt(ready, PivotalConfig()) is ready


@pytest.mark.parametrize(
    "fields",
    [
        {"gap": 0},
        {"band": (0.9, 0.1)},
        {"method": "quick"},
        {"temperature": 0},
        {"pair_gap": 2},
        {"system": "x", "prompt_format": "text"},
        {"unknown": 1},
        {"n_rollouts": 10},
        {"method": "paper", "n_pair": 10},
        {"method": "fast", "pairs_from": "all_prefixes"},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PivotalConfig(**fields)


def test_texts_of_split_characters_join_to_the_text() -> None:
    whole = "aé–b".encode()
    spelling = {200 + i: whole[i : i + 1] for i in range(len(whole))}
    texts = token_texts(list(spelling), ScriptedTokenizer(spelling))
    assert "".join(texts) == "aé–b"
    assert len(texts) == len(spelling)
    assert token_texts([201], ScriptedTokenizer(spelling)) == ["\ufffd"]
    assert token_texts([], ScriptedTokenizer()) == []
