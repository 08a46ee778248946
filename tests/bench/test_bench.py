"""The whole of it, small: `phiforge bench` with transformers as a peer, in its own process."""

import json
import sys

import pytest

from phiforge import cli


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, without kernels to compile, and gives code and JSON."""
    monkeypatch.setenv("PHIFORGE_NATIVE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(task: str, *more: str):
        arguments = ["--quick", "--repeat", "2", "--threads", "1", "--timeout", "120", "--json"]
        arguments += ["--peer-python", f"transformers={sys.executable}", *more]
        monkeypatch.setattr(sys, "argv", ["phiforge", "bench", task, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        found = capsys.readouterr()
        print(found.err)
        assert not list((tmp_path / "cache" / "phiforge" / "bench").iterdir()), "cleaned up"
        return stopped.value.code or 0, json.loads(found.out)

    return call


@pytest.mark.slow
def test_engine(bench, tmp_path):
    pytest.importorskip("transformers")
    code, result = bench("engine", "--peer", "transformers", "--out", "b.json")
    (group,) = result["groups"]
    assert group["failures"] == {}
    assert code == 0
    assert [work["name"] for work in group["works"]] == ["decode-1", "decode-4"]
    for work in group["works"]:
        rows = {row["label"]: row for row in work["rows"]}
        assert list(rows) == ["phiforge torch fp32", "transformers fp32"]
        assert all(row["same_tokens"] == 1.0 for row in rows.values())
        assert [r["round"] for r in rows["transformers fp32"]["rounds"]] == [-1, 0, 1]
        assert rows["transformers fp32"]["ours_over_this"]["low"] > 0
        assert 0 < rows["phiforge torch fp32"]["limit_share"] < 1
    assert json.loads((tmp_path / "b.json").read_text()) == result
    assert group["versions"]["transformers fp32"]["transformers"]
    assert {"date", "machine", "threads", "environment", "code"} <= result.keys()


@pytest.mark.slow
def test_train(bench):
    pytest.importorskip("transformers")
    code, result = bench("train")
    (group,) = result["groups"]
    assert group["failures"] == {}
    assert code == 0
    assert any(line.startswith("litgpt: skipped") for line in result["skipped"])
    ours, theirs = group["works"][0]["rows"]
    assert (ours["label"], theirs["label"]) == ("phiforge torch fp32", "transformers fp32")
    assert theirs["loss_difference"] < 1e-4
    assert 0 < ours["limit_share"] < 1
