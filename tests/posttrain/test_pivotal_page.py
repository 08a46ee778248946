"""The page of a pivotal search: what it counts, how it colours, and that nothing on it can run."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lxml import html as lxml_html
from pivotal_world import FORK, ScriptedEngine, oracle, problems

from phiforge.core.store import StageDir
from phiforge.posttrain import pivotal
from phiforge.posttrain.pivotal import kinds, page
from phiforge.posttrain.pivotal.findings import Findings, read
from phiforge.posttrain.pivotal.outputs import collect
from phiforge.posttrain.pivotal.page import write_report
from phiforge.posttrain.pivotal.solutions import along, choose, question_text

ATTACK = (
    "\u202e</script><script>document.title='owned'</script><img src=http://x.y/z onerror=alert(1)>"
)


def searched(folder: Path, method: str) -> Path:
    out = StageDir.scratch(folder)
    engine = ScriptedEngine(FORK)
    run = pivotal.search(
        engine, problems(6, family="forks"), oracle, method=method, n_filter=16, n_rollouts=16,
        max_tokens=12,
    )  # fmt: skip
    metrics = collect(run, 6, engine.tokenizer, out)
    settings = {"method": method, "gap": 0.2, "band": [0.2, 0.8]}
    whole = {"model": "chain", "settings": settings, "metrics": metrics}
    (folder / "search.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module", params=["paper", "balanced"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return searched(tmp_path_factory.mktemp("search"), request.param)


def tree_of(path: Path) -> Any:
    return lxml_html.document_fromstring(path.read_text(encoding="utf-8"))


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """An answer of three tokens: the second is pivotal."""
    return {
        "problem_id": f"q{number}", "family": "f", "answer": "4", "path": 0, "success": True,
        "prompt": "How?", "token_ids": [1, 2, 3], "texts": ["So", " 4", "."],
        "p": [0.5, 0.5, 0.9, 1.0], "pivotal": [1],
        "tokens": [{"position": 1, "delta": 0.4, "low": 0.2, "high": 0.5}],
    } | changes  # fmt: skip


def token(**changes: Any) -> dict[str, Any]:
    """The pivotal token of `row()`."""
    return {
        "problem_id": "q0", "path": 0, "position": 1, "prompt_token_ids": [9],
        "prefix_token_ids": [9, 1], "token_id": 2, "token": " 4", "logprob": -1.0,
        "p_before": 0.5, "p_after": 0.9, "delta": 0.4, "interval": [0.2, 0.5], "n_after": 24,
        "successes_after": 22, "n_off": 24, "successes_off": 3, "p_value": 1e-4, "family": "f",
        "alternatives": [{"token_id": 7, "token": " 5", "n": 20, "successes": 2}],
    } | changes  # fmt: skip


def write(folder: Path, **files: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("paths", "tokens", "pairs"):
        lines = [json.dumps(one) + "\n" for one in files.get(name, [])]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


# ---------------------------------------------------------------------------------- what it says


def test_the_page_shows_the_numbers_of_the_search(folder: Path, tmp_path: Path) -> None:
    metrics = json.loads((folder / "search.json").read_text())["metrics"]
    tree = tree_of(write_report(folder, tmp_path / "deep" / "page.html"))
    head = tree.xpath("//dl[@class='headline']")[0].text_content()
    assert f"Pivotal tokens{metrics['pivotal_tokens']}" in head
    assert f"Preference pairs{metrics['pairs']}" in head
    yields = tree.xpath("//section[@id='yield-and-cost']//table")
    cells = [[c.text_content() for c in r.xpath("./th|./td")][:2] for r in yields[0].iter("tr")]
    assert ["screened", "6"] in cells
    assert ["in the band, searched", str(metrics["questions_in_band"])] in cells
    spent = [r.xpath("./th|./td")[0].text_content() for r in yields[1].iter("tr")][1:]
    assert spent == ["filter", "search", "confirm", "pair", "all"]
    assert len(tree.xpath("//section[@id='distributions']//figure//*[local-name()='svg']")) == 2


def test_every_answer_is_on_the_page_whole_and_its_tokens_are_boxed(
    folder: Path, tmp_path: Path
) -> None:
    tree = tree_of(write_report(folder, tmp_path / "page.html"))
    paths = read(folder).paths
    shown = tree.xpath("//div[@class='tokens']")
    assert len(shown) == len(paths) > 0
    assert len(tree.xpath("//div[@class='tokens']//b")) == sum(len(p["pivotal"]) for p in paths)
    for label in tree.xpath("//span[@class='above']"):
        assert re.fullmatch(r"[+−]\d\.\d\d\[[+−]\d\.\d\d, [+−]\d\.\d\d\]", label.text_content())
    assert all(div.get("aria-label") and div.get("role") == "group" for div in shown)
    assert tree.xpath("//article//table//*[@class='others']")


def test_the_page_is_a_function_of_the_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "other")
    one, two = tmp_path / "1.html", tmp_path / "2.html"
    write_report(folder, one)
    write_report(copy, two)
    assert one.read_bytes() == two.read_bytes()


def test_without_settings_and_metrics_it_counts_what_is_there(tmp_path: Path) -> None:
    found = write(tmp_path / "bare", paths=[row(), row(1, success=False)], tokens=[token()])
    tree = tree_of(write_report(found, tmp_path / "page.html"))
    head = tree.xpath("//dl[@class='headline']")[0].text_content()
    assert "Pivotal tokens1" in head
    assert "1 raise p, 0 lower it" in head
    assert "0.50 per answer; 2 questions, 2 answers" in head
    assert "Tokens per pivotal token" not in head


def test_a_stage_folder_brings_its_manifest(tmp_path: Path) -> None:
    found = write(tmp_path / "stage", paths=[row()], tokens=[token()])
    manifest = {"config": {"method": "fast", "gap": 0.3}, "metrics": {"questions_screened": 17}}
    (found / "manifest.json").write_text(json.dumps(manifest))
    text = write_report(found, tmp_path / "page.html").read_text()
    assert "method fast · gap 0.3" in text
    assert ">17<" in text


def test_options_manifest_and_search_are_read_together(tmp_path: Path) -> None:
    found = write(tmp_path / "s", paths=[row()], tokens=[token()])
    files = {
        "options": {"model": "m7", "settings": {"gap": 0.1}, "oracle_options": {"key": "secret"}},
        "manifest": {"config": {"gap": 0.3, "dtype": "fp32"}, "metrics": {"seconds": 75.0}},
        "search": {"settings": {"gap": 0.4}, "metrics": {"filter_tokens": 1500}},
    }
    for name, content in files.items():
        (found / f"{name}.json").write_text(json.dumps(content))
    findings = read(found)
    assert findings.settings == {"model": "m7", "gap": 0.4, "dtype": "fp32"}
    assert findings.metrics == {"seconds": 75.0, "filter_tokens": 1500}
    text = write_report(found, tmp_path / "page.html").read_text()
    assert "m7 · gap 0.4" in text
    assert "1:15" in text
    assert "secret" not in text


def test_a_search_that_found_nothing_says_so(tmp_path: Path) -> None:
    empty = write_report(write(tmp_path / "empty"), tmp_path / "page.html").read_text()
    assert "No answer with a pivotal token was found." in empty
    assert "Which tokens are pivotal" not in empty
    plain = write(tmp_path / "plain", paths=[row(pivotal=[], tokens=[])])
    tree = tree_of(write_report(plain, tmp_path / "page.html"))
    assert len(tree.xpath("//details//div[@class='tokens']")) == 1


def test_a_folder_of_no_search_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no paths\.jsonl; give the folder that a pivotal search"):
        write_report(tmp_path, tmp_path / "page.html")
    found = write(tmp_path / "bad", paths=[row()])
    (found / "tokens.jsonl").write_text('{"problem_id": \n{}\n')
    with pytest.raises(ValueError, match=r"tokens\.jsonl:1: not valid JSON"):
        read(found)


def test_a_search_in_progress_can_be_looked_at(folder: Path, tmp_path: Path) -> None:
    running = shutil.copytree(folder, tmp_path / "running")
    with open(running / "paths.jsonl", "a") as file:
        file.write('{"problem_id": "q')
    rollouts = (running / "rollouts.jsonl.gz").read_bytes()
    (running / "rollouts.jsonl.gz").write_bytes(rollouts[: len(rollouts) // 2])
    assert len(read(running).paths) == len(read(folder).paths)
    assert len(read(folder).question_ps) == 6
    write_report(running, tmp_path / "page.html")


# --------------------------------------------------------------------------------- single parts


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        ("12", "", kinds.NUMBER), (" 3.5", "=", kinds.NUMBER), ("-7", "", kinds.NUMBER),
        ("=", "1", kinds.OPERATOR), (" ≤", "x", kinds.OPERATOR), (")*", "", kinds.OPERATOR),
        (" The", "", kinds.CAPITALISED), ("So", "\n", kinds.CAPITALISED),
        (" so", "", kinds.WORD), (" don't", "", kinds.WORD), ("日本", "東", kinds.WORD),
        ("ing", "runn", kinds.PART), (" ing", "runn", kinds.WORD), ("ing", "2", kinds.WORD),
        (".", "", kinds.PUNCTUATION), ("),", "", kinds.PUNCTUATION), ("$", "", kinds.PUNCTUATION),
        ("\\frac", "", kinds.COMMAND), ("3x", "", kinds.MIXED), ("x_1", "", kinds.MIXED),
        ("  ", "", kinds.SPACE), ("\n\n", "", kinds.BREAK), ("<|im_end|>", "", kinds.SPECIAL),
        ("</s>", "", kinds.SPECIAL), ("", "", kinds.BYTES), ("\ufffd", "", kinds.BYTES),
    ],
)  # fmt: skip
def test_kinds_of_tokens(text: str, before: str, expected: str) -> None:
    assert kinds.kind(text, before) == expected
    assert expected in kinds.EXAMPLES


def test_kinds_count_shared_beginnings_once_and_compare_with_all_tokens() -> None:
    other = row(path=1, token_ids=[1, 2, 8], texts=["So", " 4", "!"])
    tail = row(path=2, token_ids=[1, 5, 6], texts=["So", " 5", "."], pivotal=[0], tokens=[
        {"position": 0, "delta": -0.3},
    ])  # fmt: skip
    counted = kinds.grouped([row(), other, tail], kinds.kind_at)
    assert {name: (g.searched, sorted(g.deltas)) for name, g in counted.items()} == {
        kinds.CAPITALISED: (1, [-0.3]), kinds.NUMBER: (2, [0.4]), kinds.PUNCTUATION: (3, []),
    }  # fmt: skip
    tree = lxml_html.fragment_fromstring(
        kinds.kinds_section(Findings([row(), other, tail])), create_parent=True
    )
    lines = {
        r.xpath("./th")[0].text_content(): [c.text_content() for c in r.xpath("./td")]
        for r in tree.xpath("//table")[0].xpath("./tbody/tr")
    }
    assert lines["number 12 3.5"][0:2] == ["1", "2"]
    assert lines["number 12 3.5"][3] == "1.5"  # 1 of 2, among all 2 of 6
    assert lines["all tokens"][0:2] == ["2", "6"]


def test_places_are_thirds_and_the_first_token_apart() -> None:
    path = row(texts=list("abcdefghi"))
    found = [kinds.place_at(path, i) for i in range(9)]
    first, third, middle, last = kinds.PLACES
    assert found == [first, third, third, middle, middle, middle, last, last, last]


def test_the_tokens_of_an_answer_take_the_nearest_known_p() -> None:
    path = row(texts=["a", "b", "c", "d"], p=[0.2, None, 0.5, 0.9, None], pivotal=[2],
               tokens=[])  # fmt: skip
    found = list(along(path))
    assert [(t.p_before, t.p_after, t.pivotal) for t in found] == [
        (0.2, 0.5, False), (0.2, 0.5, False), (0.5, 0.9, True), (None, None, False),
    ]  # fmt: skip
    assert [t.note for t in found] == ["over 2 tokens", "over 2 tokens", "", ""]
    assert str(found[2].label) == "+0.40"


def test_solutions_come_by_effect_and_the_families_take_turns() -> None:
    def one(family: str, number: int, path: int, delta: float) -> dict[str, Any]:
        effect = [{"position": 1, "delta": delta, "low": 0, "high": 1}] if delta else []
        return row(family=family, problem_id=f"{family}{number}", path=path, tokens=effect,
                   pivotal=[1] if delta else [])  # fmt: skip

    rows = [
        one("a", 0, 0, 0.3), one("a", 0, 1, -0.4), one("a", 0, 2, 0.2), one("a", 1, 0, 0.9),
        one("a", 2, 0, 0.0), one("b", 0, 0, -0.25), one("b", 0, 1, 0.0),
    ]  # fmt: skip
    names = [[(r["problem_id"], r["path"]) for r in answers] for answers in choose(rows, 99)]
    assert names == [[("a1", 0)], [("b0", 0)], [("a0", 1), ("a0", 0)]]
    assert len(choose(rows, 2)) == 2


def test_the_question_is_found_in_common_chat_templates() -> None:
    for chat in (
        "<|im_start|>system<|im_sep|>Be.<|im_end|><|im_start|>user<|im_sep|>How?\nSo<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        "<|im_start|>user\nHow?\nSo<|im_end|>\n<|im_start|>assistant\n",
        "<|user|>\nHow?\nSo<|end|>\n<|assistant|>\n",
        "<s>[INST] How?\nSo [/INST]",
        "<|start_header_id|>user<|end_header_id|>\n\nHow?\nSo<|eot_id|>",
    ):
        assert question_text(chat) == "How?\nSo"
    assert question_text("Question: x") == "Question: x"


def test_a_pair_and_the_token_itself_stand_among_the_alternatives(tmp_path: Path) -> None:
    pair = {
        "prompt_token_ids": [9, 1], "chosen_token_ids": [2], "rejected_token_ids": [7],
        "metadata": {"problem_id": "q0", "p_chosen": 0.92, "n_chosen": 24, "p_rejected": 0.1,
                     "n_rejected": 20, "delta": 0.82, "interval": [0.6, 0.9]},
    }  # fmt: skip
    found = write(tmp_path / "s", paths=[row(), row(path=1, token_ids=[1, 2, 4])],
                  tokens=[token()], pairs=[pair])  # fmt: skip
    tree = tree_of(write_report(found, tmp_path / "page.html"))
    (others,) = tree.xpath("//div[@class='others']")
    cells = [one.text_content() for one in others]
    assert cells == [" 4", "", "0.92 of 24", "chosen", " 5", "", "0.10 of 20", "rejected"]
    assert others.xpath("./b")[0].text_content() == " 4"
    text = tree.text_content()
    assert "pair: 0.92 of 24 over 0.10 of 20, +0.82 [+0.60, +0.90]" in text
    assert text.count("Boxed tokens as above.") == 1


# ----------------------------------------------------------------------------- hostile and large


def hostile(folder: Path) -> Path:
    texts = [ATTACK, "\u202eevil\u200b\u2066", "e" + "\u0301" * 500, "x" * 300_000, "", "\ud800"]
    path = row(
        texts=texts, token_ids=list(range(6)), p=[0.5, 0.9, 0.1, 0.9, 0.1, 0.9, 1.0],
        pivotal=[0, 1, 2, 3, 4, 5], tokens=[], prompt=ATTACK * 100, answer=ATTACK, family=ATTACK,
        problem_id="q0", hex={"4": "e2"},
    )  # fmt: skip
    found = token(
        token_id=0, token=ATTACK, prefix_token_ids=[9], family=ATTACK,
        alternatives=[{"token_id": 7, "token": ATTACK, "n": 20, "successes": 2}],
    )  # fmt: skip
    write(folder, paths=[path, row(1, family='"><b>')], tokens=[found])
    (folder / "search.json").write_text(
        json.dumps({"model": ATTACK, "settings": {ATTACK: ATTACK}, "metrics": {}})
    )
    return folder


def test_hostile_text_is_inert_and_stays_small(tmp_path: Path) -> None:
    path = write_report(hostile(tmp_path / "s"), tmp_path / "page.html")
    tree = tree_of(path)
    assert path.stat().st_size < 150_000
    assert len(tree.xpath("//script")) == 1
    assert not tree.xpath("//img | //iframe | //link | //base | //form | //@onerror | //@src")
    body = tree.xpath("//body")[0].text_content()
    assert not re.search("[\u200b\u2066\u202e\ud800]", body)
    for shown in ("U+202E", "U+200B", "U+2066", "U+D800", "U+0301", "E2", "+ 299840 characters"):
        assert shown in body
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert "default-src 'none'" in policy


@pytest.mark.slow
def test_many_answers_leave_the_page_small(tmp_path: Path) -> None:
    texts = [f" word{i}" for i in range(250)]
    p = [0.5 + 0.4 * ((i * 7) % 10 < 5) for i in range(251)]
    ids = list(range(250))
    rows = [row(i // 2, path=i % 2, texts=texts, token_ids=ids, p=p) for i in range(600)]
    path = write_report(write(tmp_path / "s", paths=rows), tmp_path / "page.html")
    assert path.stat().st_size < 3_000_000
    shown = len(tree_of(path).xpath("//article"))
    left_out = re.search(r"(\d+) more questions are in paths\.jsonl alone", path.read_text())
    assert left_out
    # A question's answers stand together, above or folded; none is lost and none is shown twice.
    assert int(left_out[1]) + shown == 300
    assert shown >= page.NUM_SOLUTIONS // 2


@pytest.mark.slow
def test_very_long_answers_leave_the_head_of_the_page_small(tmp_path: Path) -> None:
    count = 8000
    p = [0.5 + 0.4 * (i % 2) for i in range(count + 1)]
    long = {"texts": ["ab"] * count, "token_ids": list(range(count)), "p": p}
    rows = [row(i, **long) for i in range(6)]
    tree = tree_of(write_report(write(tmp_path / "s", paths=rows), tmp_path / "page.html"))
    in_full = len(tree.xpath("//section[@id='solutions']//article"))
    folded = len(tree.xpath("//section[@id='all-other-answers']//article"))
    assert 1 <= in_full < 6
    assert in_full + folded <= 6


# --------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_draws_it_and_runs_nothing_of_it(tmp_path: Path, width: int) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "chromium is not installed; .ci/run installs it"
    path = write_report(hostile(tmp_path / "s"), tmp_path / "page.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200"]  # fmt: skip
    picture = tmp_path / "page.png"
    for wanted in (["--dump-dom"], [f"--screenshot={picture}"]):
        done = subprocess.run([program, *flags, *wanted, path.as_uri()], capture_output=True,
                              text=True, timeout=120, check=True)  # fmt: skip
        if wanted == ["--dump-dom"]:
            assert "Theme: system" in done.stdout
            assert "<title>Pivotal tokens</title>" in done.stdout
    assert picture.stat().st_size > 20_000
