"""The t test beside the tables of Student's distribution."""

import math

import pytest

from fastvlp.errors import UserError
from fastvlp.eval.t_test import central, p_above


@pytest.mark.parametrize(
    ("freedom", "t", "within"),
    [
        (1, 12.706, 0.95), (2, 4.303, 0.95), (3, 3.182, 0.95), (4, 2.776, 0.95), (5, 2.571, 0.95), (9, 2.262, 0.95),
        (30, 2.042, 0.95), (1, 63.657, 0.99), (2, 9.925, 0.99), (7, 3.499, 0.99), (120, 2.617, 0.99),
    ],
)  # fmt: skip
def test_the_share_within_t_is_that_of_the_tables(freedom, t, within):
    assert central(t, freedom) == pytest.approx(within, abs=1e-4)


def test_a_mean_above_the_level_is_rare_by_chance():
    # One degree of freedom: the distribution of Cauchy.
    assert p_above([1.0, 3.0], 1.0) == pytest.approx(0.5 - math.atan(1.0) / math.pi)
    assert p_above([1.0, 3.0], 3.0) == pytest.approx(0.5 + math.atan(1.0) / math.pi)
    assert p_above([1.0, 3.0], 2.0) == pytest.approx(0.5)
    assert p_above([0.82, 0.83, 0.825], 0.8) < 0.01 < p_above([0.82, 0.83, 0.825], 0.81)
    assert p_above([2.0, 2.0], 1.0) == 0 and p_above([2.0, 2.0], 2.0) == 1


def test_one_value_has_no_spread():
    with pytest.raises(UserError):
        p_above([1.0], 0.5)
