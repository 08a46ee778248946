"""A finished search at another gap: no token drawn, what confirmed stays fresh."""

from pathlib import Path
from typing import Any

import pytest
from pivotal_world import FORK, ScriptedEngine, oracle, problems

from phiforge.core.store import StageDir
from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal.offline import reanalyse
from phiforge.posttrain.pivotal.outputs import collect

SETTINGS: dict[str, Any] = {"n_filter": 32, "max_tokens": 12}


@pytest.fixture(params=["paper", "balanced"])
def searched(request: Any, tmp_path: Path) -> tuple[str, Path, list[pivotal.QuestionResult]]:
    engine = ScriptedEngine(FORK)
    settings = {"method": request.param, "gap": 0.2, **SETTINGS}
    out = StageDir.scratch(tmp_path / "search")
    collect(pivotal.search(engine, problems(16), oracle, **settings), 16, engine.tokenizer, out)
    again = pivotal.search(ScriptedEngine(FORK), problems(16), oracle, **settings)
    return request.param, out.path, [q for q in again.questions() if q.status == "searched"]


def keys(questions: Any) -> list[tuple[Any, ...]]:
    return [(t.problem_id, t.position, t.token_id, t.delta) for q in questions for t in q.tokens]


def test_the_same_gap_gives_the_same_tokens(searched: Any) -> None:
    method, folder, questions = searched
    again = reanalyse(folder, ScriptedEngine(FORK).tokenizer, 0.2, method=method, **SETTINGS)
    found = keys(again)
    if method == "paper":
        assert found == keys(questions)
    else:  # it knows from the start what the search came to know: a few borderline ones may differ
        assert len(set(found) & set(keys(questions))) >= 0.8 * len(keys(questions))
    assert found


def test_a_larger_gap_gives_fewer_and_larger(searched: Any) -> None:
    method, folder, questions = searched
    tokenizer = ScriptedEngine(FORK).tokenizer
    few = keys(reanalyse(folder, tokenizer, 0.4, method=method, **SETTINGS))
    assert len(few) < len(keys(questions))
    assert all(abs(delta) >= 0.3 for *_, delta in few)


def test_a_smaller_gap_says_what_it_could_not_confirm(searched: Any) -> None:
    method, folder, _ = searched
    if method == "paper":
        pytest.skip("the report's method confirms nothing")
    again = reanalyse(folder, ScriptedEngine(FORK).tokenizer, 0.05, method=method, **SETTINGS)
    found = keys(again)
    assert all(q.ledger.num_tokens for q in again)
    assert again.num_unconfirmed > 0
    assert found


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no paths\.jsonl in it"):
        reanalyse(tmp_path, ScriptedEngine(FORK).tokenizer, 0.2)
