"""The report of invented runs: whole ones, unfinished ones, and hostile transcripts."""

import json
import shutil
from pathlib import Path

import pytest
from fake_run import ATTACK, SECONDS, make_run
from lxml import html as lxml_html

from phiforge.core.store import StageDir
from phiforge.report import ReportConfig, build, run
from phiforge.report.examples import choose, shortened

TITLES = [
    "Stages", "Training", "Data mixture", "Accuracy", "Paired tests between stages",
    "Long context", "Refusals", "Bits per byte", "Pivotal tokens", "Transcripts",
    "Test problems", "Costs", "How to reproduce",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "nano-s0")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return build(folder).read_text()


def titles(text: str) -> list[str]:
    return lxml_html.document_fromstring(text).xpath("//h2/text()")


def test_a_whole_run_shows_every_section(page: str) -> None:
    assert titles(page) == TITLES
    tree = lxml_html.document_fromstring(page)
    heads = tree.xpath("/html/body/dl[@class='headline']//dt/text()")
    assert heads == ["Problems solved", "Pivotal-token DPO", "Recall of one pair at 4× context",
                     "Bogus questions refused", "Whole run"]  # fmt: skip
    assert "phiforge run recipe.yaml" in tree.text_content()
    assert "sft → dpo-pivotal" in page
    assert "17:58" in page


def test_every_number_of_a_share_has_its_n(page: str) -> None:
    tree = lxml_html.document_fromstring(page)
    cells = tree.xpath("//section[@id='accuracy']//td/span[.//span[@class='interval limits']]")
    assert len(cells) == 30
    assert {cell.get("title") for cell in cells} == {"n = 100", "n = 400"}


def test_what_models_wrote_stays_text(page: str) -> None:
    tree = lxml_html.document_fromstring(page)
    assert len(tree.xpath("//script")) == 1
    assert not tree.xpath("//img | //@onerror")
    assert "&lt;script&gt;document.title" in page
    assert ATTACK not in page


def test_the_page_is_a_function_of_the_run(folder: Path, tmp_path: Path, page: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "nano-s0")
    assert build(copy, target=tmp_path / "again.html").read_text() == page


def test_as_a_stage_it_reads_the_run_around_it(folder: Path, tmp_path: Path, page: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "nano-s0")
    out = StageDir.scratch(copy / "report.partial")
    assert run(ReportConfig(), {"evaluate": copy / "evaluate"}, out)["bytes"] > 50_000
    assert (out.path / "index.html").read_text() == page


@pytest.mark.parametrize("count", [1, 5, 8])
def test_an_unfinished_run_shows_what_is_there(tmp_path: Path, count: int) -> None:
    folder = make_run(tmp_path / "half", tuple(SECONDS)[:count])
    (folder / "evaluate.partial" / "state").mkdir(parents=True)
    text = build(folder).read_text()
    found = titles(text)
    assert found[0] == "Stages"
    assert ("Training" in found) == (count >= 5)
    assert ("Pivotal tokens" in found) == (count >= 8)
    assert "Accuracy" not in found
    assert "not finished: evaluate" in text
    assert "unfinished</td>" in text


def test_a_training_stage_in_progress_shows_its_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "live", ("tokenizer", "pretrain"))
    (folder / "pretrain" / "manifest.json").unlink()
    (folder / "pretrain").rename(folder / "pretrain.partial")
    with open(folder / "pretrain.partial" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1451, "lo')
    assert "Training" in titles(build(folder).read_text())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bad", ("tokenizer", "evaluate"))
    (folder / "evaluate" / "scores.json").write_text('{"accuracy": [')
    with pytest.raises(ValueError, match=r"scores\.json: not valid JSON .* --rebuild evaluate"):
        build(folder)
    with pytest.raises(ValueError, match="no stage of a run"):
        build(tmp_path)


def test_pivotal_section_has_the_tables_and_answers_of_the_search(page: str) -> None:
    tree = lxml_html.document_fromstring(page)
    (part,) = tree.xpath("//section[@id='pivotal-tokens']")
    assert len(part.xpath(".//article")) == 8
    assert len(part.xpath(".//article//b[contains(@class, 'box')]")) == 24
    text = part.text_content()
    assert "number 12 3.5" in text
    assert "pair: 0.91 of 40 over 0.20 of 24, +0.71 [+0.49, +0.83]" in text


def test_runs_of_an_earlier_version_still_show_their_answers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "old", ("tokenizer", "pivotal"))
    (folder / "pivotal" / "tokens.jsonl").unlink()
    row = json.loads((folder / "pivotal" / "paths.jsonl").read_text().splitlines()[0])
    row = {name: row[name] for name in row if name not in ("tokens", "token_ids")}
    (folder / "pivotal" / "paths.jsonl").write_text(json.dumps(row) + "\n")
    tree = lxml_html.document_fromstring(build(folder).read_text())
    labels = [one.text_content() for one in tree.xpath("//span[@class='above']")]
    assert labels == ["+0.44", "−0.27", "+0.23"]


def test_transcripts_shown_are_half_right_half_wrong_where_possible() -> None:
    rows = [{"id": i, "correct": i < 2, "refused": False} for i in range(10)]
    assert [r["id"] for r in choose(rows, 6, "problems")] == [0, 1, 2, 3, 4, 5]
    right = [{"id": i, "correct": True, "refused": False} for i in range(9)]
    assert [r["id"] for r in choose([*right, {"id": 9, "correct": False}], 4, "problems")] == [
        0, 1, 2, 9,
    ]  # fmt: skip


def test_long_prompts_are_shortened_with_a_count() -> None:
    assert shortened("short") == "short"
    text = shortened("\n".join(f"key {i}" for i in range(100)))
    assert "[… 76 lines …]" in text
    assert text.startswith("key 0")
    assert text.endswith("key 99")
    assert "characters …]" in shortened("x" * 5000)


def test_the_fake_run_has_the_shape_of_scores(folder: Path) -> None:
    found = json.loads((folder / "evaluate" / "scores.json").read_text())
    names = {"checkpoints", "accuracy", "refusals", "recall", "bits_per_byte", "comparisons"}
    assert names == set(found)
