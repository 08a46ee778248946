"""Answer checking: what counts as the answer, and when two answers are equal.

Run: pytest tests/verify/test_answers.py.
"""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiforge.core.records import Problem
from phiforge.verify import OracleError, extract_answer, is_correct, is_refusal
from phiforge.verify.answers import parse_number


def correct(kind: str, answer: str | None, given: str) -> bool:
    return is_correct(Problem(id="p", prompt="?", answer=answer, kind=kind), given)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12+7=19\nAnswer: 19", "19"),
        ("Answer: 19\n", "19"),
        ("Answer: 3\nno, wait\nAnswer: 19", "19"),
        ("**Answer:** 19", "19"),
        ("**Answer: 19**", "19"),
        ("answer = 19", "19"),
        ("The final answer is: $19$", "19"),
        (r"Answer: \boxed{19}", "19"),
        ("so Answer: 19 volts", "19 volts"),
        ("Answer:19", "19"),
        ("Answer:", None),
        ("Answer:\n19", None),
        ("19", None),
        ("", None),
        ("The unanswered: 19", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("19", "19", True),
        ("19", "19.0", True),
        ("19", "19.", True),
        ("19", "+19", True),
        ("19", "019", True),
        ("19", "19 apples", True),
        ("19", "$19", True),
        ("19", "38/2", True),
        ("19", "-19", False),
        ("-19", "−19", True),
        ("-19", "-$19", True),
        ("19", "19 or 20", False),
        ("19", "19-20", False),
        ("19", "1 9", False),
        ("19", "about 19", False),
        ("19", "nineteen", False),
        ("1234", "1,234", True),
        ("1234", "1,23", False),
        ("28.5", "28.50", True),
        ("28.5", "57/2", True),
        ("28.5", "28 1/2", True),
        ("1/3", "2/6", True),
        ("1/3", "0.333", False),
        ("1/3", "1/0", False),
        ("0.1", ".1", True),
        ("19", "19e0", False),
        ("19", "1" * 5000, False),
        ("19", "٣", False),
    ],
)
def test_number(reference, answer, expected):
    assert correct("number", reference, f"work\nAnswer: {answer}") is expected


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("1500 m", "1500 m", True),
        ("1500 m", "1.5 km", True),
        ("1500 m", "1500 meters", True),
        ("1500 m", "1500", False),
        ("1500 m", "1500 g", False),
        ("1500 m", "1500 miles", False),
        ("20 m/s", "72 km/h", True),
        ("72 km/h", "20 m/s.", True),
        ("5 mV", "5 MV", False),
        ("2 h", "120 minutes", True),
    ],
)
def test_unit(reference, answer, expected):
    assert correct("unit", reference, f"Answer: {answer}") is expected


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "expected"),
    [
        ("choice", "B", "B", True),
        ("choice", "B", "(b)", True),
        ("choice", "B", "B) red", True),
        ("choice", "B", "Because", False),
        ("choice", "true", "True.", True),
        ("choice", "true", "not true", False),
        ("text", "Ana", "ana", True),
        ("text", "Ana", "**Ana**.", True),
        ("text", "March 4", "March  4", True),
        ("text", "March 4", "March 14", False),
        ("text", "Ana", "Anna", False),
    ],
)
def test_choice_and_text(kind, reference, answer, expected):
    assert correct(kind, reference, f"Answer: {answer}") is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I cannot answer this: the price is not given.", True),
        ("I can't answer this.", True),
        ("I can’t answer this.", True),
        ("I don't know.", True),
        ("This cannot be determined.", True),
        ("There is not enough information.", True),
        ("I cannot answer this. Answer: 12", False),
        ("Answer: 12", False),
        ("12+7=19", False),
        ("", False),
    ],
)
def test_refusal(text, expected):
    assert is_refusal(text) is expected
    assert correct("refusal", None, text) is expected


def test_a_refusal_is_wrong_for_an_answerable_problem():
    assert not correct("number", "19", "I cannot answer this: the price is not given.")


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("number", None, "no reference answer"),
        ("number", "many", "is not a number"),
        ("unit", "12", "units"),
        ("essay", "x", "allowed is one of"),
    ],
)
def test_what_cannot_be_checked_is_an_oracle_error(kind, answer, words):
    with pytest.raises(OracleError, match=words):
        correct(kind, answer, "Answer: 12")


@given(st.fractions(max_denominator=10**6).filter(lambda x: abs(x) < 10**12))
def test_every_fraction_equals_itself_and_no_neighbour(x):
    assert parse_number(str(x)) == (x, "")
    assert correct("number", str(x), f"Answer: {x}")
    assert not correct("number", str(x), f"Answer: {x + Fraction(1, 10**7)}")


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=2))
def test_decimals_are_exact(x):
    assert correct("number", str(Fraction(x)), f"Answer: {x:,.2f}")


@given(st.text())
def test_any_response_gets_a_verdict(text):
    for kind, answer in (("number", "1"), ("unit", "1 m"), ("choice", "A"), ("text", "a")):
        assert correct(kind, answer, text) in (True, False)
        assert correct(kind, answer, f"Answer: {text}") in (True, False)
    assert correct("refusal", None, text) in (True, False)
