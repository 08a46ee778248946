"""HTML to text: structure and indentation survive, machinery does not."""

import pytest

from phiforge.data.html import html_to_text

CASES = {
    "headings and paragraphs": (
        "<h1>A <b>b</b></h1><p>one\n two</p><p>three",
        "# A b\n\none two\n\nthree",
    ),
    "line breaks and no-break spaces": ("a<br>&nbsp;&nbsp;b  c<br/>d", "a\n  b c\nd"),
    "nested lists": (
        "<ul><li>a<ul><li>b</li><li>c</li></ul></li><li><p>d</p><p>e</p></li></ul>",
        "- a\n  - b\n  - c\n- d\n\n  e",
    ),
    "numbered list": ("<ol><li>a<li>b</ol>", "1. a\n2. b"),
    "definitions": ("<dl><dt>f(x)<dd>Says <code>x</code>.</dl>", "f(x)\n    Says `x`."),
    "code keeps its indentation and language": (
        '<pre class="highlight-python"><span>def f():</span>\n    return  1\n\n\n\n# end\n</pre>',
        "```python\ndef f():\n    return  1\n\n\n\n# end\n```",
    ),
    "data table": (
        "<table><tr><th>a</th><th>b|c</th></tr><tr><td>1</td><td>2</td></tr></table>",
        "| a | b\\|c |\n| --- | --- |\n| 1 | 2 |",
    ),
    "layout table": (
        "<table><tr><td>x</td><td><table><tr><td>1</td><td>2</td></tr></table></td></tr></table>",
        "x\n\n| 1 | 2 |\n| --- | --- |",
    ),
    "quote": ("<blockquote><p>a</p><p>b</p></blockquote>", "> a\n>\n> b"),
    "nothing invisible": (
        "<head><title>t</title></head><script>x</script><!-- c --><p>a<style>b</style></p>",
        "a",
    ),
    "a block inside inline mark-up": ("<span>a<div>b</div>c</span>", "a\nb\nc"),
    "formula": ('<p>so <math alttext="x^2"><mi>x</mi></math></p>', "so x^2"),
    "empty": ("<html><body></body></html>", ""),
    "blank": ("  \n", ""),
    "plain text": ("just words", "just words"),
}


@pytest.mark.parametrize("name", CASES)
def test_text_of(name: str):
    html, text = CASES[name]
    assert html_to_text(html) == text


def test_encodings():
    assert html_to_text("<p>é".encode()) == "é"
    assert html_to_text('<meta charset="latin-1"><p>é'.encode("latin-1")) == "é"
    assert html_to_text('<?xml version="1.0" encoding="utf-8"?><html><p>é</p></html>') == "é"
