"""Ratio against integer arithmetic."""

import random

import pytest

from agent.errors import UserError
from agent.ratio import Ratio


@pytest.mark.parametrize(
    ("ratio", "numerator", "denominator"),
    [(512, 512, 1), (1024, 1024, 1), (0.1, 1, 10), (33.3, 333, 10), (1e-05, 1, 100_000), (0, 0, 1)],
)
def test_total_is_the_floor_of_the_exact_quotient(ratio: float, numerator: int, denominator: int) -> None:
    for steps in (1, 7, 1023, 10**9 + 7):
        assert Ratio(ratio, 1024).updates(steps) == steps * numerator // (denominator * 1024)


def test_split_calls_equal_one_call() -> None:
    steps = random.Random(0)
    ratio, total, due = Ratio(0.7, 48), 0, 0
    for _ in range(5000):
        step = steps.choice([1, 4, 16, 10**5])
        total += step
        due += ratio.updates(step)
        assert due == total * 7 // 480


def test_no_drift_over_a_billion_steps() -> None:
    ratio = Ratio(0.3, 1024)  # 0.3 as a binary fraction would be 0.29999...: one update short at the end
    before = ratio.updates(10**9 * 1024 - 1)
    assert before == 3 * 10**8 - 1
    assert ratio.updates(1) == 1


def test_saved_credit_goes_on() -> None:
    whole, first, second = Ratio(100, 1024), Ratio(100, 1024), Ratio(100, 1024)
    expected = [whole.updates(3) for _ in range(40)]
    got = [first.updates(3) for _ in range(13)]
    second.load_state_dict(first.state_dict())
    got += [second.updates(3) for _ in range(27)]
    assert got == expected and sum(got) == 40 * 3 * 100 // 1024


@pytest.mark.parametrize("ratio", [-1, float("nan"), float("inf")])
def test_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="train.ratio"):
        Ratio(ratio, 1024)
