"""The evaluate stage on untrained models: what it writes, that it resumes and repeats itself."""

import json
from pathlib import Path

import pytest
from tiny_run import CONTEXT, make_inputs

from phiforge.core.config import Exec
from phiforge.core.store import StageDir
from phiforge.evals import ask
from phiforge.evals.run import BitsConfig, EvaluateConfig, RecallConfig, checkpoint_styles, run

EXEC = Exec(threads=1, micro_tokens=256)
CONFIG = EvaluateConfig(
    problems_per_family=2,
    bogus_per_family=1,
    few_shot=1,
    max_tokens=4,
    recall=RecallConfig(num=1, lengths=(1.0, 2.0)),
    bits_per_byte=BitsConfig(max_tokens=120, document_tokens=60),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def done(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = StageDir.scratch(tmp_path_factory.mktemp("evaluate"), EXEC)
    return out.path, run(CONFIG, inputs, out)


def test_every_cell_has_counts_and_an_interval(done: tuple[Path, dict]) -> None:
    folder, metrics = done
    found = json.loads((folder / "scores.json").read_text())
    assert [c["name"] for c in found["checkpoints"]] == ["pretrain", "midtrain", "sft"]
    assert [c["style"] for c in found["checkpoints"]] == ["probe", "base", "chat"]
    # 2 checkpoints x 2 temperatures x (all + 2 families)
    assert len(found["accuracy"]) == 12
    assert {row["n"] for row in found["accuracy"]} == {2, 4}
    assert {row["asked"] for row in found["refusals"]} == {"bogus", "answerable"}
    # two tasks of two checkpoints at two lengths
    assert len(found["recall"]) == 12
    assert {row["source"] for row in found["bits_per_byte"]} == {"docs"}
    for row in (*found["accuracy"], *found["refusals"], *found["recall"]):
        assert 0 <= row["low"] <= row["share"] <= row["high"] <= 1
    for row in found["bits_per_byte"]:
        assert 0 <= row["low"] < row["bits_per_byte"] < row["high"]
        assert row["bits_per_byte"] > 1
    measures = {row["measure"] for row in found["comparisons"]}
    assert measures == {"accuracy", "refusals", "recall"}
    assert all(row["p_holm"] >= row["p_value"] for row in found["comparisons"])
    assert metrics["generated_tokens"] > 0
    assert metrics["flops"] > 0


def test_every_transcript_is_kept(done: tuple[Path, dict]) -> None:
    folder, metrics = done
    rows = [t for path in sorted(folder.glob("transcripts/*.jsonl")) for t in ask.read(path)]
    assert len(rows) == metrics["transcripts"]
    base = [t for t in rows if t.checkpoint == "midtrain" and t.suite == "problems"]
    assert base[0].prompt.count("Question:") == base[0].prompt.count("Solution:") > 0
    long = [t for t in rows if t.suite == "recall" and t.checkpoint == "pretrain"]
    assert {t.metadata["length"] for t in long} == {1.0, 2.0}
    assert all(t.prompt_tokens <= CONTEXT * t.metadata["length"] for t in long)
    assert max(t.prompt_tokens for t in long) > 1.2 * CONTEXT


def test_checkpoints_are_asked_the_same_questions(done: tuple[Path, dict]) -> None:
    folder, _ = done
    by_name = {
        path.stem: {
            t.id: t.prompt for t in ask.read(path) if t.suite in ("needle", "recall", "copy")
        }
        for path in folder.glob("transcripts/*.jsonl")
    }
    assert by_name["pretrain"] == by_name["midtrain"]


def test_resumed_is_the_same_and_asks_nothing_twice(
    done: tuple[Path, dict],
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from phiforge.inference.engine import Engine

    out = StageDir.scratch(tmp_path, EXEC)
    generate, calls = Engine.generate, []

    def stop_at_last(engine: Engine, prompts: list, **settings: object) -> list:
        calls.append(len(prompts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(engine, prompts, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "generate", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, inputs, out)
    kept = [p.stem for p in sorted((tmp_path / "transcripts").glob("*.jsonl"))]
    assert kept == ["pretrain"]
    calls.append(0)
    metrics = run(CONFIG, inputs, out)
    folder, straight = done
    assert metrics == straight
    for name in ("scores.json", "transcripts/midtrain.jsonl", "transcripts/pretrain.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    calls.clear()
    run(CONFIG, inputs, out)
    assert not calls


def test_a_missing_checkpoint_is_named(inputs: dict[str, Path]) -> None:
    config = EvaluateConfig(checkpoints={"dpo-pivotal": "chat"})
    with pytest.raises(ValueError, match=r"evaluate.checkpoints: dpo-pivotal not among"):
        checkpoint_styles(config, inputs)
    with pytest.raises(ValueError, match="none not among"):
        checkpoint_styles(EvaluateConfig(), {"synthesize": inputs["synthesize"]})


def test_without_midtraining_the_pretrained_model_is_the_base() -> None:
    folder = Path("x")
    found = checkpoint_styles(EvaluateConfig(), {"sft": folder, "pretrain": folder})
    assert found == {"pretrain": "base", "sft": "chat"}
