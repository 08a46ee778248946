"""The forecast of a search: exact where nothing varies, covering where it does."""

import random

import pytest

from phiforge.posttrain.pivotal.plan import QUANTITIES, Expected, compare, forecast


def rows(values):
    return [dict.fromkeys(QUANTITIES, float(value)) for value in values]


def test_equal_questions_leave_no_doubt():
    expected = forecast(rows([3, 3, 3]), 10)
    assert expected["tokens"] == Expected(30.0, 30.0, 30.0)


def test_a_pilot_of_all_questions_is_the_answer():
    expected = forecast(rows([1, 2, 6]), 3)
    assert expected["pairs"] == Expected(9.0, 9.0, 9.0)


def test_the_interval_covers_what_comes():
    draw = random.Random(0)
    inside = 0
    for _ in range(300):
        values = [draw.expovariate(0.01) for _ in range(200)]
        expected = forecast(rows(values[:20]), 200)["tokens"]
        inside += expected.low <= sum(values) <= expected.high
    assert 0.88 <= inside / 300 <= 0.99  # nominal 95 %; the values are skewed


def test_compare_names_what_fell_outside():
    expected = {"pairs": Expected(10, 5, 15), "tokens": Expected(100, 90, 110)}
    metrics = {"pairs": 20, "filter_tokens": 60, "search_tokens": 40}
    by_name = {row["quantity"]: row for row in compare(expected, metrics)}
    assert not by_name["pairs"]["inside"]
    assert by_name["tokens"]["inside"]
    assert by_name["tokens"]["came"] == 100


@pytest.mark.parametrize(("known", "count"), [(1, 10), (5, 4)])
def test_a_pilot_that_cannot_be_is_refused(known, count):
    with pytest.raises(ValueError, match="pilot"):
        forecast(rows([1.0] * known), count)
