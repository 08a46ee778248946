"""Pairs out and in: ids exact, text checked, codelion/pts files both ways, bad rows named."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from exchange_pairs import all_pairs, byte, lone_bytes, merging, pair, plain, special, tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from phiforge.core.records import Pair, read_rows, write_records
from phiforge.model.tokenizer import Tokenizer
from phiforge.posttrain.pivotal.exchange import export, export_tokens, import_codelion
from phiforge.train.pairs import TokenPair
from phiforge.train.pairs import tokenize as token_pair


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids_of(pairs: list[Pair]) -> list[tuple]:
    return [(p.prompt_token_ids, p.chosen_token_ids, p.rejected_token_ids) for p in pairs]


# Token ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["token-ids", "trl"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_token_ids_are_written_as_they_are(tmp_path, format, ending):
    path = tmp_path / f"out.{ending}"
    report = export(all_pairs(), format, path, tokenizer())
    assert (report.num_pairs, report.num_written, report.inexact) == (6, 6, ())
    rows = rows_of(path)
    found = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows]
    assert found == ids_of(all_pairs())
    columns = {"id", "prompt_ids", "chosen_ids", "rejected_ids"}
    if format == "trl":
        assert set(rows[0]) == columns
    else:
        assert set(rows[0]) == columns | {"metadata"}
        assert rows[0]["metadata"] == plain().metadata


def test_a_file_gives_the_same_as_its_records(tmp_path):
    source = tmp_path / "pairs.jsonl"
    write_records(source, all_pairs())
    for number, pairs in enumerate((source, str(source), iter(all_pairs()))):
        export(pairs, "token-ids", tmp_path / f"{number}.jsonl")
    files = [(tmp_path / f"{number}.jsonl").read_bytes() for number in range(3)]
    assert files[0] == files[1] == files[2] != b""


# Text ----------------------------------------------------------------------------------------


def test_text_leaves_out_and_lists_what_text_cannot_carry(tmp_path):
    source = tmp_path / "pairs.jsonl"
    write_records(source, all_pairs())
    path = tmp_path / "text.jsonl"
    report = export(source, "text", path, tokenizer())
    assert [row["id"] for row in rows_of(path)] == ["plain", "special", "long"]
    assert (report.num_pairs, report.num_written, report.num_dropped) == (6, 3, 3)
    assert [(i.id, i.where) for i in report.inexact] == [
        ("bytes", f"{source}:3"),
        ("unmerged", f"{source}:4"),
        ("merging", f"{source}:5"),
    ]
    assert "the prompt re-tokenises otherwise from token" in report.inexact[0].reason
    assert "the prompt with chosen re-tokenises otherwise" in report.inexact[2].reason


def test_text_comes_back_as_the_same_ids(tmp_path):
    path = tmp_path / "text.jsonl"
    export(all_pairs(), "text", path, tokenizer())
    expected = {p.id: p for p in all_pairs()}
    for row in rows_of(path):
        prompt, chosen = expected[row["id"]].prompt_token_ids, expected[row["id"]].chosen_token_ids
        assert tokenizer().encode(row["prompt"], allow_special=True) == prompt
        both = tokenizer().encode(row["prompt"] + row["chosen"], allow_special=True)
        assert both == [*prompt, *chosen]


def test_inexact_text_is_kept_when_asked_for(tmp_path):
    path = tmp_path / "text.jsonl"
    report = export(all_pairs(), "text", path, tokenizer(), keep_inexact=True)
    assert (report.num_written, report.num_dropped, len(report.inexact)) == (6, 0, 3)
    assert rows_of(path)[2]["prompt"] == "12\ufffd"


def with_start() -> Tokenizer:
    """The tokenizer, adding a start token to every text as Llama's do."""
    found = tokenizer()
    backend = type(found.backend).from_str(found.backend.to_str())
    start = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))]
    )
    return Tokenizer(backend, eos=found.eos, eod=found.eod, pad=found.pad, bos=start)


def test_an_added_start_token_is_not_written(tmp_path):
    """Its reader adds it again: written out, it would stand twice."""
    found = with_start()
    start = found.backend.encode("").ids
    assert len(start) == 1
    whole = Pair(**{**vars(plain()), "prompt_token_ids": [*start, *plain().prompt_token_ids]})
    path = tmp_path / "text.jsonl"
    report = export([whole, plain()], "text", path, found)
    assert [row["prompt"] for row in rows_of(path)] == [plain().prompt]
    assert found.backend.encode(plain().prompt).ids == whole.prompt_token_ids
    assert [i.where for i in report.inexact] == ["pair plain"], "it never had the start token"
    assert "from token 0" in report.inexact[0].reason


# Bad arguments and rows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_token_ids": None}, "prompt_token_ids is None; every pair must hold token ids"),
        ({"chosen_token_ids": []}, "chosen_token_ids is \\[\\]"),
        ({"chosen_token_ids": [400]}, "chosen_token_ids holds 400; .* from 0 to 399"),
        ({"rejected_token_ids": [-1]}, "rejected_token_ids holds -1"),
        ({"prompt_token_ids": [1.5]}, "prompt_token_ids holds 1.5"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids holds True"),
        ({"rejected_token_ids": plain().chosen_token_ids}, "are the same tokens"),
    ],
)
@pytest.mark.parametrize("format", ["trl", "text"])
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, changes, words, format):
    source = write_lines(tmp_path / "pairs.jsonl", [vars(special()), {**vars(plain()), **changes}])
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    with pytest.raises(ValueError, match=f"pairs.jsonl:2: .*{words}"):
        export(source, format, path, tokenizer())
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("xml", "out.jsonl"), "format is 'xml'; it must be one of token-ids, text"),
        (("text", "out.jsonl"), "needs the model's tokenizer"),
        (("codelion", "out.parquet", tokenizer()), "codelion/pts reads JSONL only"),
        (("trl", "out.csv"), "records go to a .jsonl"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, words):
    format, name, *rest = arguments
    with pytest.raises(ValueError, match=words):
        export([plain()], format, tmp_path / name, *rest)


def test_options_without_effect_are_errors(tmp_path):
    with pytest.raises(ValueError, match="keep_inexact has no effect"):
        export([], "trl", tmp_path / "out.jsonl", keep_inexact=True)
    with pytest.raises(ValueError, match="queries are read by format 'codelion' only"):
        export([], "trl", tmp_path / "out.jsonl", queries={})


def test_no_pairs(tmp_path):
    assert export([], "trl", tmp_path / "out.jsonl").num_written == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    with pytest.raises(ValueError, match="no pair to write"):
        export([], "trl", tmp_path / "out.parquet")


# codelion/pts --------------------------------------------------------------------------------


def test_codelion_pairs_have_its_fields_and_come_back(tmp_path):
    path = tmp_path / "dpo.jsonl"
    report = export(all_pairs(), "codelion", path, tokenizer(), queries={"q2": "12+7="})
    assert report.num_written == 3
    rows = rows_of(path)
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "metadata"}
    assert rows[0]["metadata"] == {
        "original_query": tokenizer().decode(plain().prompt_token_ids[:4]),
        "prob_chosen": 0.75,
        "prob_rejected": 0.125,
        "prob_delta": 0.375,
        "task_type": "sum",
        "event_id": "plain",
        "category": None,
        "counterpart_verified": True,
    }
    assert rows[1]["metadata"]["original_query"] == "12+7="
    assert rows[1]["metadata"]["counterpart_verified"] is False

    tokens, pairs, found = import_codelion(path, tokenizer())
    assert (tokens, found.refused, found.num_rows, found.num_pairs) == ([], [], 3, 3)
    assert ids_of(pairs) == ids_of([p for p in all_pairs() if p.id in ("plain", "special", "long")])
    assert [p.metadata["verified"] for p in pairs] == [True, False, False]
    assert pairs[0].metadata["delta"] == 0.625
    assert token_pair(pairs[0], tokenizer()) == TokenPair(
        pairs[0].id, *(tuple(ids) for ids in ids_of([plain()])[0])
    )


def test_codelion_tokens_are_written_and_come_back(tmp_path):
    def row(given: Pair) -> dict:
        return {
            "problem_id": given.metadata["problem_id"],
            "prompt_token_ids": given.prompt_token_ids[:2],
            "prefix_token_ids": given.prompt_token_ids,
            "token_id": given.chosen_token_ids[0],
            "p_before": 0.25,
            "p_after": 0.75,
            "delta": 0.5,
            "family": None,
        }

    path = tmp_path / "pivotal_tokens.jsonl"
    source = write_lines(tmp_path / "tokens.jsonl", [row(p) for p in all_pairs()])
    report = export_tokens(source, path, tokenizer(), "us/phi", dataset_id="sums")
    assert (report.num_pairs, report.num_written) == (6, 3)
    assert [(i.id, i.where) for i in report.inexact] == [
        (f"q{n}", f"{source}:{n}") for n in (3, 4, 5)
    ]
    tokens, pairs, found = import_codelion(path, tokenizer())
    assert (pairs, found.refused) == ([], [])
    assert found.model_ids == {"us/phi": 3}
    assert found.dataset_ids == {"sums": 3}
    for token, given in zip(tokens, (all_pairs()[i] for i in (0, 1, 5)), strict=True):
        assert token.prefix_token_ids == given.prompt_token_ids
        assert [token.token_id] == given.chosen_token_ids
        assert (token.p_before, token.p_after, token.delta) == (0.25, 0.75, 0.5)
        assert token.problem_id == given.metadata["problem_id"]
    assert tokens[0].query == tokenizer().decode(plain().prompt_token_ids[:2])


def first_release(given: Pair, **changes) -> dict:
    """A pivotal token with the fields of v0.1.0."""
    token = given.chosen_token_ids[0]
    row = {
        "model_id": "Qwen/Qwen3-0.6B",
        "query": "How many apples?",
        "pivot_context": given.prompt,
        "pivot_token": given.chosen,
        "pivot_token_id": token,
        "prob_before": 0.25,
        "prob_after": 0.75,
        "prob_delta": 0.5,
        "is_positive": True,
        "task_type": "math",
        "dataset_id": "openai/gsm8k",
        "dataset_item_id": "17",
        "timestamp": "2025-05-14T01:02:03",
    }
    return {**row, **changes}


def event(given: Pair, **changes) -> dict:
    """A token event of the later schema."""
    row = {
        "event_id": "token_evt_0123456789ab",
        "event_type": "pivotal_token",
        "granularity": "token",
        "visibility": "emitted",
        "model_id": "Qwen/Qwen3-0.6B",
        "task_type": "math",
        "query": "How many apples?",
        "context": given.prompt,
        "label": given.chosen,
        "score": 0.5,
        "search_method": "token_pts",
        "schema_version": "1.0",
        "dataset_id": "openai/gsm8k",
        "dataset_item_id": None,
        "position": len(given.prompt_token_ids),
        "token_id": given.chosen_token_ids[0],
        "prob_before": 0.75,
        "prob_after": 0.25,
        "prob_delta": -0.5,
        "is_positive": False,
        "category": "computation",
        "metadata": {"prob_threshold": 0.2},
    }
    return {**row, **changes}


def test_both_releases_are_read(tmp_path):
    path = write_lines(
        tmp_path / "mixed.jsonl",
        [
            first_release(plain()),
            first_release(plain(), timestamp="2025-05-14T09:09:09"),
            event(special()),
            {"event_type": "latent_metatoken", "granularity": "latent", "label": " verify"},
            {"sentence": "So 19.", "sentence_id": 3, "prefix_context": "12+7"},
            {"steering_vector": [0.1], "reasoning_pattern": "exploration"},
        ],
    )
    tokens, pairs, report = import_codelion(path, tokenizer())
    assert [t.prefix_token_ids for t in tokens] == [
        plain().prompt_token_ids,
        special().prompt_token_ids,
    ]
    assert tokens[0].problem_id == "17"
    assert tokens[1].problem_id.startswith("query-")
    assert [t.delta for t in tokens] == [0.5, -0.5]
    assert tokens[1].metadata["category"] == "computation"
    assert (pairs, report.num_duplicates, report.num_rows) == ([], 1, 6)
    assert report.other == Counter(latent_metatoken=1, thought_anchor=1, steering_vector=1)


def test_partners_become_pairs_the_right_way_round(tmp_path):
    """v0.1.0 calls a harmful token's better partner `rejected_token` too."""
    seven, nine = plain().chosen_token_ids, plain().rejected_token_ids
    other = pair("other", tokenizer().encode("Answer: "), seven, nine)
    third = pair("third", tokenizer().encode("12+7="), seven, nine)
    partner = {"rejected_token": "9", "rejected_token_id": nine[0]}
    falling = {"prob_before": 0.75, "prob_after": 0.25, "prob_delta": -0.5}
    better = {"chosen_token": "9", "chosen_prob": 0.875}
    path = write_lines(
        tmp_path / "partners.jsonl",
        [
            first_release(plain(), **partner),
            first_release(other, **partner, **falling),
            event(third, metadata=better),
        ],
    )
    tokens, pairs, report = import_codelion(path, tokenizer())
    assert (len(tokens), report.refused) == (3, [])
    assert [(p.chosen_token_ids, p.rejected_token_ids) for p in pairs] == [
        (seven, nine),
        (nine, seven),
        (nine, seven),
    ]
    assert [p.metadata["verified"] for p in pairs] == [False, False, True]
    assert pairs[0].metadata["p_chosen"] == 0.75
    assert "delta" not in pairs[0].metadata
    assert pairs[2].metadata["delta"] == 0.625


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (first_release(lone_bytes()), "the context holds U\\+FFFD"),
        (first_release(plain(), pivot_token="\ufffd"), "the token holds U\\+FFFD"),
        (first_release(merging()), "context and token 'o' together encode to other tokens"),
        (first_release(plain(), pivot_token_id=5), "token id 5 is .* in this tokenizer, '7'"),
        (first_release(plain(), pivot_token_id=400), "token id 400 is not among 400"),
        (first_release(plain(), pivot_context=""), "the context is ''"),
        (first_release(plain(), prob_before=None), "prob_before is None"),
        (first_release(plain(), prob_after=1.5), "prob_after is 1.5"),
        (first_release(plain(), prob_delta=-0.5), "prob_delta is -0.5, but"),
        (first_release(plain(), rejected_token="7 more"), "token is taken, its pair not"),
        (first_release(plain(), rejected_token="7"), "are the same token"),
        (event(plain(), position=3), "position is 3, but the context encodes to"),
        ({"prompt": "12+7=", "chosen": "19 apples", "rejected": "7"}, "chosen: '19 apples' must"),
        ({"prompt": "12+7=", "chosen": None, "rejected": "7"}, "chosen: the token is None"),
        ({"prompt": "12+7=", "chosen": "7", "rejected": "7"}, "are the same token"),
        ({"text": "nothing"}, "no known row of codelion/pts; its fields are text"),
        ([1], "no JSON object but list"),
    ],
)
def test_rows_that_cannot_be_placed_are_listed(tmp_path, row, words):
    path = write_lines(tmp_path / "rows.jsonl", [first_release(special()), row])
    tokens, pairs, report = import_codelion(path, tokenizer())
    assert tokens[0].prefix_token_ids == special().prompt_token_ids
    assert pairs == []
    (refused,) = report.refused
    assert refused.where == f"{path}:2"
    assert re.search(words, refused.reason), refused.reason


def test_a_spelling_that_two_tokens_share_is_not_guessed(tmp_path):
    """Without an id, a text is a token only when no other token reads the same."""
    row = {"prompt": "Then", "chosen": " Tom", "rejected": "7"}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    _, (found,), _ = import_codelion(path, tokenizer())
    assert found.chosen_token_ids == tokenizer().encode(" Tom")

    backend = type(tokenizer().backend).from_str(tokenizer().backend.to_str())
    backend.add_tokens([" Tom"])
    known = tokenizer()
    shared = Tokenizer(backend, eos=known.eos, eod=known.eod, pad=known.pad)
    _, pairs, report = import_codelion(path, shared)
    assert pairs == []
    assert "' Tom' must be exactly one token; 2 tokens" in report.refused[0].reason


def test_an_added_start_token_is_placed_once(tmp_path):
    found = with_start()
    start = found.backend.encode("").ids
    name = found.decode(start, skip_special=False)
    rows = [first_release(plain(), pivot_context=text + plain().prompt) for text in ("", name)]
    tokens, _, report = import_codelion(write_lines(tmp_path / "rows.jsonl", rows), found)
    assert report.refused == []
    assert [t.prefix_token_ids for t in tokens] == [[*start, *plain().prompt_token_ids]]
    assert report.num_duplicates == 1


def test_a_context_that_the_tokenizer_changes_is_listed(tmp_path):
    known = tokenizer()
    backend = type(known.backend).from_str(known.backend.to_str())
    backend.normalizer = Lowercase()
    lower = Tokenizer(backend, eos=known.eos, eod=known.eod, pad=known.pad)
    path = write_lines(tmp_path / "rows.jsonl", [first_release(plain())])
    tokens, _, report = import_codelion(path, lower)
    assert tokens == []
    assert report.refused[0].reason == "the context does not come back from its token ids"


def test_a_file_that_is_no_jsonl_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"pivot_token"\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: not valid JSON"):
        import_codelion(path, tokenizer())
    with pytest.raises(FileNotFoundError):
        import_codelion(tmp_path / "none.jsonl", tokenizer())


def test_bytes_are_single_tokens():
    """What the pairs above rest on."""
    assert tokenizer().token_bytes(byte(0xE2)) == b"\xe2"
    assert len(tokenizer().encode("Tom")) < 3
