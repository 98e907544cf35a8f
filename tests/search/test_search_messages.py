"""Refusals that speak of what was told and given: failures under shape=None, and two rows of two bounds."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import DistributionSearch, SmoothBounds, minimize


def searches(shape, dtype=torch.float32, baseline=None):
    loc = torch.zeros(2, dtype=dtype, requires_grad=True)
    strategy = DistributionSearch(
        lambda: torch.distributions.Normal(loc, 1.0), [loc], popsize=4, shape=shape, baseline=baseline, seed=0
    )
    return strategy, loc


@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()], ids=repr)
@pytest.mark.parametrize("failure", [math.nan, math.inf, -math.inf])
def test_a_failure_that_no_shape_ranks_is_named_as_it_was_told(failure, baseline):
    strategy, loc = searches(None, baseline=baseline)
    x = strategy.ask()
    before, message = (
        strategy.state_dict(),
        r"told values are not finite in torch.float32 at 1 of 4 points, namely \[1\]",
    )
    for call in (strategy.tell, strategy.scored):
        with pytest.raises(sf.NonFiniteError, match=message + ".*shape=None.*shape=NESUtilities"):
            call(x, [1.0, failure, 2.0, 3.0])
    assert not loc.any()
    after = strategy.state_dict()
    assert torch.equal(after["generator"], before["generator"])
    assert after["progress"]["iterations"] == 0


def test_a_value_that_the_dtype_of_the_distribution_cannot_hold():
    values = [1.0, 2.0, 1e60, -1e60]
    single, _ = searches(None)
    with pytest.raises(sf.NonFiniteError, match=r"in torch.float32 at 2 of 4 points, namely \[2, 3\]"):
        single.tell(single.ask(), values)
    double, loc = searches(None, torch.float64)
    double.tell(double.ask(), values)
    assert bool(loc.any())
    assert bool(loc.isfinite().all())


def test_ranks_take_a_failure():
    strategy, loc = searches(sf.NESUtilities())
    strategy.tell(strategy.ask(), [1.0, math.nan, 2.0, 3.0])
    assert bool(loc.any())
    assert strategy.result.failed == 1


def never(x):
    raise AssertionError("fun was called")


@pytest.mark.parametrize(
    "bounds",
    [
        ([-5.0, 0.0], [1.0, 10.0]),
        (np.array([-5.0, 0.0]), np.array([1.0, 10.0])),
        torch.tensor([[-5.0, 0.0], [1.0, 10.0]]),
    ],
    ids=repr,
)
def test_a_start_outside_of_two_pairs_says_how_they_were_read(bounds):
    message = r"outside the bounds at coordinates \[0\].*were read as pairs \(low, high\).*SmoothBounds\(lower, upper\)"
    with pytest.raises(sf.ScorefnError, match=message):
        minimize(never, [0.5, 5.0], 0.2, bounds=bounds)
    result = minimize(
        lambda x: float((x**2).sum()), [0.5, 5.0], 0.2, bounds=SmoothBounds(*bounds), seed=0, maxfevals=60
    )
    assert result.nfev <= 60


@pytest.mark.parametrize("pairs", [[(0.0, 1.0), (0.0, 1.0), (2.0, 3.0)], [(2.0, 3.0)]], ids=repr)
def test_other_numbers_of_pairs_have_one_reading(pairs):
    with pytest.raises(sf.ScorefnError, match="outside the bounds") as caught:
        minimize(never, [0.5] * len(pairs), 0.2, bounds=pairs)
    assert "read as pairs" not in str(caught.value)
