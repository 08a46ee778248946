r"""Final answers of worked solutions, and when two mathematical answers are equal.

Run: pytest tests/verify/test_mathematics.py.
"""

import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiforge.verify import OracleError, equivalence
from phiforge.verify.choices import final_choice, is_choice
from phiforge.verify.mathematics import (
    Mathematics,
    after_thinking,
    canonical,
    final_answer,
    is_close,
    is_words,
)


@pytest.fixture(scope="module")
def mathematics():
    with Mathematics() as found:
        yield found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\left\{1, \boxed{2}\right\}}", "2"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed 7 done", "7"),
        (r"\fbox{8}", "8"),
        (r"put it in \boxed{}: \boxed{3}", "3"),
        (r"\boxed{5} and then \boxed{1", None),
        (r"Let me check our answer: 17 is prime. \boxed{17}", "17"),
        ("2+2=4\n#### 4", "4"),
        ("#### 3\nAnswer: 4", "4"),
        ("Answer: 4\n#### 3", "3"),
        ("Answer: **12 apples**", "12 apples"),
        ("she has $x=3$, so $y = 5$ in all", "y = 5"),
        (r"hence \(z^2\)", "z^2"),
        ("it costs $5 and then $7", "$7"),
        ("first 1,250 and then 1,300.50.", "1,300.50"),
        ("a ratio of 3/4", "3/4"),
        ("no number here", None),
        ("", None),
        ("x2 and b3c", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_anchored_wants_a_mark():
    assert final_answer("then 5 remain", anchored=True) is None
    assert final_answer(r"\boxed{5} of 6", anchored=True) == "5"


@pytest.mark.parametrize(
    ("piece", "answer"),
    [("\\boxed{", None), ("$", None), ("{", None), ("1,", "1"), ("\\(", None), ("Answer:\n", None)],
)
def test_final_answer_of_a_long_response(piece, answer):
    assert final_answer(piece * 50_000) == answer


@pytest.mark.parametrize(
    ("text", "opened", "left"),
    [
        ("<think>2+2</think>4", False, "4"),
        ("2+2</think>4", True, "4"),
        ("2+2 is", True, ""),
        ("<think>2+2 is", False, ""),
        ("plain 4", False, "plain 4"),
        ("a</think>b</think>c", False, "c"),
        ("a</think>b<think>c", False, ""),
    ],
)
def test_after_thinking(text, opened, left):
    assert after_thinking(text, opened) == left


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"1\frac12", "1 1/2"),
    ("10,\\!080", "10080"),
    (r"\$32,\!348", "$32,348"),
    (r"10\%", "10"),
    (r"10\%", "0.1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x = 5"),
    (r"(-\infty,3]", r"x\le 3"),
    (r"\{1,2\}", "2, 1"),
    (r"19 \text{ and }43", "43 and 19"),
    (r"2, 3, \text{ and } 4", "2, 3 and 4"),
    (r"\begin{pmatrix}a\\b\end{pmatrix}", r"\begin{bmatrix}a\\b\end{bmatrix}"),
    (r"2\pi", "2π"),
    (r"2\pi", "2 pi"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"90^\circ", "90°"),
    (r"5\text{ cm}", "5"),
    (r"5\text{ km}", "5000 m"),
    (r"45 \text{ units}^2", "45"),
    (r"\frac{3}{4}\pi\text{ inches}", r"\frac{3\pi}{4}"),
    (r"18\text{ ways.}", "18"),
    ("5", "5 apples"),
    (r"\text{Friday}", "friday."),
    (r"\text{June 20}", "June 20"),
    ("no solution", "No solution"),
    (r"\text{(C)}", "C"),
    ("11_2", "11_{2}"),
    ("11_2", "11"),
    (r"\frac{1}{2004!}", r"1/2004!"),
    (r"\emptyset", r"\varnothing"),
    ("2+3i", "3i+2"),
]
DIFFERENT = [
    ("5", "-5"),
    ("1", "1 1/2"),
    ("12", "12 or 13"),
    ("12", "1"),
    ("0.1", "0.10001"),
    (r"\frac12", r"\frac13"),
    ("(1,2)", "(2,1)"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("x", "y"),
    ("5", "5x"),
    ("5t", "5"),
    ("5", "5 pi"),
    ("5", "five apples"),
    ("5 cm", "5 m"),
    ("11_2", "11_3"),
    ("11_2", "3"),
    ("Navin", "Nivan"),  # products of the same letters
    (r"\text{odd}", "even"),
    (r"\text{June 20}", "July 20"),
    ("no solution", "5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("5", ""),
    ("5", "$"),
    ("5", "\x00"),
    ("5", r"\frac{"),
    ("5", "😀"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(mathematics, gold, answer):
    assert mathematics.is_equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(mathematics, gold, answer):
    assert not mathematics.is_equal(gold, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "10000000!",
        "(((100!)!)!)",
        r"\binom{10^9}{10^8}",
        r"\sum_{k=1}^{10^9} k^k",
        r"\int_0^1 x^x dx",
        "(x+1)^{10000}",
        "e^{e^{e^{e^{79}}}}",
        "(" * 200 + "1" + ")" * 200,
        "{" * 5000,
        "1" * 5000,
        "x+" * 5000,
    ],
)
def test_what_is_too_large_is_different_and_ends(mathematics, answer):
    assert mathematics.is_equal("5", answer) is False
    assert mathematics.is_equal(answer, answer) is True


def test_too_much_work_is_no_verdict(mathematics, monkeypatch):
    monkeypatch.setattr(equivalence, "MAX_CALLS", 100)
    assert equivalence.equal("x^2+2x+1", "(x+1)^2") is None
    monkeypatch.setattr(mathematics, "_ask", lambda gold, given: None if given else True)
    with pytest.raises(OracleError, match="too much work"):
        mathematics.is_equal("x^2+4x+4", "(x+2)^2")


def test_works_in_threads_and_after_its_process_died():
    with Mathematics() as mathematics:
        mathematics._all[0]._process.kill()
        found = []
        threads = [
            threading.Thread(
                target=lambda k=k: found.append(mathematics.is_equal(f"{k}x", f"x*{k}"))
            )
            for k in range(2, 6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 4


def test_words():
    assert is_words(r"\text{Friday}")
    assert is_words("no solution")
    assert not is_words(r"\begin{pmatrix}a\\b\end{pmatrix}")
    assert not is_words(r"5\text{ apples}")
    assert not is_words(r"\sin x")
    assert canonical(r"\left( 3, \dfrac12 \right)") == r"(3,\frac{1}{2})"


@pytest.mark.parametrize(
    ("answer", "reference", "tolerance", "expected"),
    [
        ("18", "18", 0, True),
        ("18.00", "18", 0, True),
        (r"\$1{,}250", "1250", 0, True),
        (r"\frac{1}{2}", "0.5", 0, True),
        (r"1\frac{1}{2}", "3/2", 0, True),
        ("18 dollars", "18", 0, True),
        (r"18\text{ dollars}", "18", 0, True),
        ("1.5 km", "1500 m", 0, True),
        ("1.5 km", "1500 s", 0, False),
        ("1.5 km", "1500", 0, False),
        ("1.52 km", "1500 m", 0.02, True),
        ("1.54 km", "1500 m", 0.02, False),
        ("3.14", "3.14159", 0, False),
        ("3.14", "3.14159", 1e-3, True),
        ("-3.14", "3.14159", 1e-3, False),
        ("0", "0", 0.5, True),
        ("0.001", "0", 0.5, False),
        ("12 or 13", "12", 0, False),
        ("twelve", "12", 0, False),
        ("", "12", 0, False),
        ("1/0", "12", 0, False),
    ],
)
def test_is_close(answer, reference, tolerance, expected):
    assert is_close(answer, reference, tolerance) is expected


def test_is_close_needs_a_number():
    with pytest.raises(ValueError, match="'many' is not a number"):
        is_close("5", "many")


@settings(max_examples=60, deadline=None)
@given(st.fractions(max_denominator=500), st.text(max_size=20))
def test_a_fraction_equals_itself_and_texts_never_crash(value: Fraction, text: str):
    shown = rf"{'-' if value < 0 else ''}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    typed = f"{value.numerator}/{value.denominator}"
    assert is_close(typed, str(value))
    assert final_answer(rf"\boxed{{{shown}}}") == shown
    assert isinstance(is_close(text, "5"), bool)
    final_answer(text)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Answer: C", True),
        ("**Answer:** C", True),
        (r"Answer: \boxed{C}", True),
        ("Answer: (C)", True),
        ("Answer: $C$", True),
        ("Answer:\nC", True),
        ("Answer: C. Paris", True),
        ("Answer: Paris", True),
        (r"\boxed{\text{(C)}}", True),
        ("The answer is C.", True),
        ("I think A, then\n\n(C)", True),
        ("Answer: A is tempting.\nAnswer: C", True),
        ("Answer: Catching up", False),
        ("Answer: B", False),
        ("Answer: Rome", False),
        ("Answer: C or D", False),
        ("no idea", False),
        ("", False),
    ],
)
def test_choice(response, expected):
    options = ["Rome", "Oslo", "Paris", "Bonn"]
    for reference in ("C", "Paris"):
        found = final_choice(response)
        assert (found is not None and is_choice(found, reference, options)) is expected


def test_words_that_begin_with_a_letter_are_no_choice():
    assert not is_choice("All of the above", "A")
    assert not is_choice("Because", "B")
