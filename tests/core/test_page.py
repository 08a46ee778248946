"""Pages: what is escaped, what is kept, and that nothing on them can run or be fetched."""

import base64
import hashlib
import re

import pytest
from lxml import html as lxml_html

from phiforge.core.page import (
    Column,
    Html,
    Section,
    Series,
    Token,
    bar,
    code,
    details,
    difference,
    element,
    escape,
    figure,
    histogram,
    interval_plot,
    join,
    line_plot,
    markdown,
    number,
    p_value,
    page,
    percent,
    pre,
    quantity,
    share,
    sparkline,
    table,
    token_legend,
    tokens,
    transcript,
    visible,
)
from phiforge.core.stats import Interval, wilson

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></style><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "[x](javascript:alert(1)) ![y](http://example.com/a.png)",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "<a href='jAvAsCrIpT:alert(1)'>x</a>",
    "```\n</code><script>alert(1)</script>\n```",
    "```html onload=alert(1)\n<b>\n```",
    "$\\text{<script>alert(1)</script>}$ and \\(\\href{javascript:alert(1)}{x}\\)",
    "$$\\style{background:url(http://example.com)}{x}$$",
    "<style>@import url(http://example.com)</style>",
    "<math><mtext><script>alert(1)</script></mtext></math>",
    "| a |\n|-|\n| <img src=x onerror=alert(1)> |",
    "<!-- --><base href=http://example.com>",
)
DANGEROUS_TAGS = {"script", "iframe", "img", "svg", "object", "embed", "base", "link", "form",
                  "input", "style", "meta", "video", "audio"}  # fmt: skip


def check_harmless(markup: str) -> None:
    for node in lxml_html.fragment_fromstring(markup, create_parent=True).iter():
        if not isinstance(node.tag, str):
            continue
        assert node.tag not in DANGEROUS_TAGS, markup
        for name, value in node.attrib.items():
            assert not name.lower().startswith("on"), markup
            assert name not in ("src", "srcdoc", "srcset", "formaction"), markup
            if name == "href":
                assert re.match(r"https?://|mailto:|#", value), markup


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_a_model_writes_becomes_markup(attack: str) -> None:
    for made in (
        markdown(attack),
        code(attack, "python"),
        pre(attack),
        element("p", attack, title=attack),
        details(attack, attack),
        transcript(attack, attack, answer=attack, verdict=False, note=attack),
        transcript(attack, attack, verdict=True, render=True),
        tokens(
            [Token(attack, 0.1, 0.9, pivotal=True, note=attack, label=attack, hex=attack)],
            description=attack,
        ),
        tokens([Token(attack, 0.1, 0.9, pivotal=True), Token(attack)]),
        visible(attack),
        table([Column(attack), Column("n", "number")], [[attack, 1], [attack]], caption=attack),
    ):
        check_harmless(made)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_plot_becomes_markup(attack: str) -> None:
    label = attack.replace("\n", " ").replace("\\", "/")
    plot = line_plot([Series(label, [0, 1], [1, 2]), Series("b", [0, 1], [2, 1])], x=label, y="y",
                     title=label)  # fmt: skip
    nodes = list(lxml_html.fragment_fromstring(plot).iter())
    assert not {node.tag for node in nodes} & (DANGEROUS_TAGS - {"svg"})
    assert sum(node.tag == "svg" for node in nodes) == 1
    for name, value in (item for node in nodes for item in node.attrib.items()):
        assert not name.lower().startswith("on")
        assert name == "aria-label" or "http" not in value
    assert label in "".join(node.text_content() for node in nodes[:1])


def test_the_page_fetches_nothing_and_runs_only_its_own_script() -> None:
    text = page("T <b>", [Section(f"S{i}", markdown(ATTACKS[0])) for i in range(4)], lead=Html(""))
    tree = lxml_html.document_fromstring(text)
    (script,) = tree.iter("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not tree.xpath("//link | //img | //@src | //iframe")
    assert "url(" not in text
    assert "@import" not in text
    assert tree.xpath("//title/text()") == ["T <b>"]
    assert tree.xpath("//nav/a/@href") == ["#s0", "#s1", "#s2", "#s3"]
    assert set(tree.xpath("//section/@id")) == {"s0", "s1", "s2", "s3"}


def test_markdown_renders_structure_code_and_formulas() -> None:
    made = markdown(
        "# Head\n\n**So** $x^2$, $$\\frac{a}{b}$$\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n"
        "```python\ndef f(): return '<b>'\n```\n\n\\[\n\\sum_{i=1}^n i\n\\]\n\n[z](https://e.com)"
    )
    for part in ("<h1>Head</h1>", "<strong>So</strong>", "<msup>", "<mfrac>", "<td>1</td>",
                 '<span class="k">def</span>', "&lt;b&gt;", "<munderover>",
                 'rel="noopener noreferrer nofollow"'):  # fmt: skip
        assert part in made, part


@pytest.mark.parametrize("text", ["It costs $5 and $10.", "from $10-$20", "a $ b $ c", "$$", "\\("])
def test_prices_are_no_formulas(text: str) -> None:
    assert "<math" not in markdown(text)


def test_a_formula_that_cannot_be_converted_shows_its_source() -> None:
    assert "<code>\\frac{</code>" in markdown("so $\\frac{$ it is")
    assert "<math" not in markdown("$" + "x" * 3000 + "$")


def test_markup_is_escaped_once_and_control_characters_show() -> None:
    assert escape("<") == "&lt;"
    assert escape(escape("<")) == "&lt;"
    assert escape("a\x00b\x1b") == "a�b�"
    assert element("p", "a", Html("<b>c</b>"), class_="x", data_p=1, hidden=False) == (
        '<p class="x" data-p="1">a<b>c</b></p>'
    )
    assert join(["<", Html("<i>")], " ") == "&lt; <i>"
    with pytest.raises(AssertionError):
        element("p", onclick="x")


def test_tables_align_and_carry_n_and_intervals() -> None:
    made = table(
        [Column("stage"), Column("right", "number"), Column("n", "number")],
        [["a"], ["sft", share(87, 100, wilson(87, 100)), 12_345], ["dpo", None, 1]],
        caption="c",
        total=True,
    )
    assert '<th colspan="3"' in made.replace('scope="rowgroup" ', "")
    assert "87.0<span" in made
    assert "[79.0, 92.2]" in made
    assert 'title="n = 100"' in made
    assert "12\N{NARROW NO-BREAK SPACE}345" in made
    assert '<tr class="total">' in made
    assert made.count('class="number"') == 2 + 4
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        table([Column("a"), Column("b"), Column("c")], [["x", "y"]])


def test_numbers_are_short_and_signed() -> None:
    assert [quantity(x) for x in (950, 12_345, 4_560_000, 1.2e12, 0.5)] == [
        "950", "12.3k", "4.56M", "1.20T", "0.50",
    ]  # fmt: skip
    assert "–" in quantity(None)
    assert "–" in percent(None)
    assert "−1.50" in number(-1.5)
    assert percent(1.0, Interval(0.96, 1.0)) == (
        '<span>100.0<span class="interval limits">[96.0, 100.0]</span></span>'
    )
    assert difference(-0.021, Interval(-0.05, 0.0004)).startswith("−2.1<span")
    assert "[−5.0, 0.0]" in difference(-0.021, Interval(-0.05, 0.0004))
    assert difference(0.38).startswith("+38.0")


def test_p_values_are_bold_below_the_threshold() -> None:
    assert p_value(0.5) == "<span>0.50</span>"
    assert p_value(0.012) == '<span class="clear">0.012</span>'
    assert p_value(2.3e-36) == '<span class="clear">2·10<sup>−36</sup></span>'
    assert "clear" not in p_value(1e-9, threshold=0.0)
    assert "0.001" in p_value(0.0)


def test_tokens_show_p_and_pivotal_ones_are_boxed() -> None:
    made = tokens(
        [
            Token("7", 0.4, 0.9, pivotal=True),
            Token("\n", 0.9, 0.5),
            Token("x"),
            Token("y", 0.5, 0.5),
            Token("z", 0.5, 0.5),
            Token("u", 0.5, 0.1, pivotal=True, label="mark"),
            Token("", 0.1, 0.1, hex="e282"),
        ],
        description="A text",
    )
    assert '<b class="p box rise" style="--p:0.4;--q:0.9" title="p 0.40 → 0.90">7</b>' in made
    assert '<span class="above">+0.50</span>' in made
    assert '<span class="p" style="--p:0.9;--q:0.5" title="p 0.90 → 0.50"><i' in made
    assert "↵</i>\n</span><span>x</span>" in made
    assert '<span class="p" style="--p:0.5;--q:0.5" title="p 0.50">yz</span>' in made
    assert '<span class="above">mark</span><b class="p box fall"' in made
    assert '<i class="hex">E2 82</i>' in made
    assert 'role="group" aria-label="A text"' in made
    assert "95% interval" in token_legend()


def test_labels_stand_over_the_text_unless_another_box_is_near() -> None:
    def pins(gap: str) -> list[str]:
        made = tokens([Token("a", 0, 1, True), Token(gap), Token("b", 0, 1, True)])
        return re.findall(r'class="(pin[^"]*)"', made)

    assert pins("+") == ["pin", "pin over"]
    assert pins("+" * 20) == ["pin over", "pin over"]
    assert pins("\n") == ["pin over", "pin over"]


def test_a_break_stands_after_its_box() -> None:
    made = tokens([Token(";\n", 0.2, 0.8, pivotal=True), Token("x")])
    assert lxml_html.fragment_fromstring(made).text_content().endswith(";↵\nx")


def test_nothing_in_a_text_stays_hidden() -> None:
    made = visible("a\u202eb\u200bc\xa0\x07\ud800 \t\r\n")
    shown = lxml_html.fragment_fromstring(made, create_parent="p").text_content()
    assert shown == "aU+202EbU+200BcU+00A0U+0007U+D800 ⇥\t␍↵\n"
    assert '<i class="w"> </i>' in made
    assert visible("né日本 é", spaces=False) == "né日本 é"
    assert visible("e" + "\u0301" * 40).count('<i class="hex">U+0301</i>') == 38
    assert visible("x" * 5000) == "x" * 160 + '<i class="hex">+ 4840 characters</i>'
    assert visible("\n", breaks=False) == '<i class="mark">↵</i>'
    made.encode()


def _luminance(colour: list[float]) -> float:
    linear = [c / 3294.6 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: list[float], other: list[float]) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_on_the_colours_of_p_can_be_read_in_both_schemes() -> None:
    css = re.search(r"<style>(.*?)</style>", page("x", []), re.DOTALL)
    assert css
    (strength,) = set(re.findall(r"\* ([\d.]+)\)", css[1][css[1].index(".p {") :][:600]))
    schemes = [s for s in re.findall(r"\{([^{}]*--paper[^{}]*)\}", css[1]) if "--up" in s]
    assert len(schemes) == 4  # light, dark of the system, dark chosen, print
    for scheme in schemes:
        named = dict(re.findall(r"--(\w+): ([^;]+);", scheme))
        of = {name: _colour(named[name]) for name in ("paper", "ink", "quiet", "up", "down")}
        assert _contrast(of["quiet"], of["paper"]) >= 4.5
        for p in (0.0, 0.25, 0.5, 0.75, 1.0):
            alpha = abs(p - 0.5) * float(strength)
            over = of["up" if p > 0.5 else "down"]
            mixed = [alpha * a + (1 - alpha) * b for a, b in zip(over, of["paper"], strict=True)]
            assert _contrast(of["ink"], mixed) >= 4.5, (p, scheme)
        assert _contrast(of["up"], of["paper"]) >= 3  # the boxes
        assert _contrast(of["down"], of["paper"]) >= 3


def _colour(text: str) -> list[float]:
    if not text.startswith("#"):
        return [float(part) for part in text.split()]
    digits = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def test_sparklines_keep_their_marks_when_thinned() -> None:
    made = sparkline([0.2] * 3000 + [0.9] * 3000, marks=[3000], label="p")
    tree = lxml_html.fragment_fromstring(made)
    (dot,) = tree.xpath("//circle")
    assert dot.get("class") == "rise"
    points = tree.xpath("//polyline/@points")[0].split()
    assert len(points) < 300
    assert f"{dot.get('cx')},{dot.get('cy')}" in points
    assert sparkline([None, 0.5, None], label="p") == ""


def test_a_histogram_counts_and_bars_have_their_length() -> None:
    made = histogram({"a": [0.1, 0.1, 0.9], "b": [0.1]}, [0, 0.5, 1], x="x", y="n", title="t")
    assert "var(--series-0)" in made
    assert "var(--series-1)" in made
    assert made == histogram({"a": [0.1, 0.1, 0.9], "b": [0.1]}, [0, 0.5, 1], x="x", y="n",
                             title="t")  # fmt: skip
    assert "--w:0.250" in bar(0.25)
    assert "--w:1.000" in bar(7)


def test_plots_follow_the_page_and_repeat_byte_for_byte() -> None:
    def draw() -> Html:
        return interval_plot(
            [Series("a", [0, 1], [0.5, None], [0.4, None], [0.6, None])],
            x="", y="right", ticks=["1×", "2×"], percent=True, y_range=(0, 1),
        )  # fmt: skip

    made = draw()
    assert made == draw()
    assert "var(--ink)" in made or "var(--quiet)" in made
    assert "var(--series-0)" in made
    assert not re.search(r"#0[123]0[123]0[123]|#0a0b0", made)
    assert "<metadata" not in made
    assert "font-family" not in made
    assert 'role="img"' in made
    assert "<figcaption>&lt;c</figcaption>" in figure(made, "<c")


def test_two_plots_on_a_page_share_no_id() -> None:
    plots = [line_plot([Series("a", [0, 1], [0, y])], x="x", y="y") for y in (1, 2)]
    first, second = (set(re.findall(r'\bid="([^"]*)"', plot)) for plot in plots)
    assert not first & second
    for plot, names in zip(plots, (first, second), strict=True):
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', plot)
        assert {a or b for a, b in used} <= names


def test_long_series_are_thinned_to_their_means() -> None:
    short = line_plot([Series("a", list(range(100)), [1.0] * 100)], x="x", y="y")
    long = line_plot([Series("a", list(range(50_000)), [1.0] * 50_000)], x="x", y="y")
    assert len(long) < len(short) + 30_000


def test_series_with_gaps_and_log_axis() -> None:
    made = line_plot([Series("a", [1, 2, 3], [1.0, None, 100.0])], x="x", y="y", log_y=True)
    assert "<path" in made
