"""Runs side by side: one row per figure, with n and interval, from files alone."""

import json

import pytest
from fake_run import make_run

from phiforge.compare import compare
from phiforge.core.usage import UsageError


def test_figures_of_two_runs_stand_side_by_side(tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / name)
    rows = compare([tmp_path / "one", tmp_path / "two"])
    assert list(rows[0]) == ["figure", "one", "two"]
    figures = {row["figure"]: row["one"] for row in rows}
    scores = json.loads((tmp_path / "one" / "evaluate" / "scores.json").read_text())
    (sft,) = [
        r
        for r in scores["accuracy"]
        if (r["checkpoint"], r["family"], r["temperature"]) == ("sft", "all", 0)
    ]
    shown = figures["solved %, greedy: sft"]
    assert shown.startswith(f"{100 * sft['share']:.1f} [")
    assert shown.endswith(f"n={sft['n']}")
    assert any("recall of one pair % at 4×" in name for name in figures)
    assert any(name.startswith("sft → dpo-pivotal, points") for name in figures)
    assert any(name.startswith("refused %, bogus") for name in figures)
    assert any(name.startswith("bits per byte") for name in figures)


def test_unfinished_and_equally_named_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="evaluate is not finished"):
        compare([tmp_path / "empty"])
    with pytest.raises(UsageError, match="no such run folder"):
        compare([tmp_path / "none"])
    with pytest.raises(UsageError, match="names must differ"):
        compare([tmp_path / "a" / "x", tmp_path / "b" / "x"])
