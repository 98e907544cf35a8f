"""The public invariance tests pass for the strategies that have the invariance, and fail for those that lack it."""

import math

import pytest
import torch
from torch.distributions import Normal, Uniform, constraints

import scorefn as sf
from scorefn.search import (
    CSANES,
    SNES,
    XNES,
    check_monotone_transform,
    check_neutral_selection,
    check_rotation,
    check_scale,
    check_score_mean,
    check_translation,
)

START = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0], dtype=torch.float64)
SHIFT = torch.tensor([4.0, -8.0, 16.0, 1.0, -0.5], dtype=torch.float64)


def ellipsoid(x):
    return (torch.logspace(0, 5, x.shape[-1], dtype=x.dtype) * x.square()).sum(-1)


def maker(kind):
    return lambda x0, sigma0, seed: kind(x0, sigma0, seed=seed)


STRATEGIES = pytest.mark.parametrize(
    "make", [maker(kind) for kind in (CSANES, SNES, XNES)], ids=["csanes", "snes", "xnes"]
)


@STRATEGIES
def test_translation_scale_and_monotone_transforms(make):
    assert check_translation(make, ellipsoid, START, 1.0, SHIFT) < 1e-6
    assert check_scale(make, ellipsoid, START, 1.0, 1000.0) < 1e-6
    assert check_monotone_transform(make, ellipsoid, START, 1.0) == 0
    assert check_monotone_transform(make, ellipsoid, START, 1.0, lambda f: f.pow(3)) == 0


@pytest.mark.parametrize("kind", [CSANES, XNES])
def test_rotation_of_strategies_with_a_full_covariance(kind):
    assert abs(check_rotation(maker(kind), ellipsoid, START, 1.0)) < 3.3


def test_independent_coordinates_are_seen_to_depend_on_the_rotation():
    with pytest.raises(
        AssertionError, match=r"rotation: the best values differ by 4\.\d standard deviations \(limit 3.3\)"
    ):
        check_rotation(maker(SNES), ellipsoid, START, 1.0)


@STRATEGIES
def test_random_values_move_nothing(make):
    drift, error = check_neutral_selection(make, 4)
    assert abs(drift) < 4.2 * error
    assert error < 0.1


class Shrinking(SNES):
    """Its sigma forgets 1 % with each generation."""

    def learnt(self, points, ranking):
        state = super().learnt(points, ranking)
        return {**state, "log_scale": (state["log_scale"] - 0.01).detach().requires_grad_()}


class Drifting(SNES):
    """Its mean moves by itself."""

    def learnt(self, points, ranking):
        state = super().learnt(points, ranking)
        return {**state, "location": (state["location"] + 0.05 * self.sigma).detach().requires_grad_()}


class Anchored(SNES):
    """It searches better near the origin, and where the unit of length is 1."""

    def learnt(self, points, ranking):
        state = super().learnt(points, ranking)
        return {**state, "location": (0.9 * state["location"]).detach().requires_grad_()}


class Absolute(SNES):
    """Its steps have a length of their own."""

    def learnt(self, points, ranking):
        state = super().learnt(points, ranking)
        return {**state, "log_scale": state["log_scale"].detach().clamp(min=-1).requires_grad_()}


class Greedy(SNES):
    """It looks at the values, not only at their order."""

    def tell(self, x, f):
        super().tell(x, f)
        self._state["location"] = (self.location + 1e-3 * torch.tanh(torch.as_tensor(f).mean())).detach()


def test_strategies_that_lack_an_invariance_are_seen_to_fail():
    with pytest.raises(AssertionError, match=r"log sigma drifts by -0\.\d+"):
        check_neutral_selection(maker(Shrinking), 4)
    with pytest.raises(AssertionError, match="the mean by up to"):
        check_neutral_selection(maker(Drifting), 4)
    with pytest.raises(AssertionError, match="translation: the runs differ by"):
        check_translation(maker(Anchored), ellipsoid, START, 1.0, SHIFT)
    with pytest.raises(AssertionError, match="scale: the runs differ by"):
        check_scale(maker(Absolute), ellipsoid, START, 1.0, 10.0)
    with pytest.raises(AssertionError, match="monotone transform: the runs differ by"):
        check_monotone_transform(maker(Greedy), ellipsoid, START, 1.0)


def test_the_score_of_a_search_distribution_has_mean_zero():
    strategy = SNES(START, 0.5)
    assert check_score_mean(strategy.distribution, [strategy.location, strategy.log_scale]) < 4.1


def test_a_support_that_moves_with_its_parameter_is_seen():
    high = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(sf.SupportError, match="support of Uniform moves"):
        check_score_mean(Uniform(0.0, high), [high])

    class Hidden(Uniform):
        support = constraints.real

    with pytest.raises(AssertionError, match="score: the mean of a coordinate is"):
        check_score_mean(Hidden(0.0, high), [high])


def test_a_density_without_parameters_is_refused():
    state = torch.random.get_rng_state()
    with pytest.raises(sf.ScorefnError, match="log_prob does not depend on the parameters"):
        check_score_mean(Normal(0.0, 1.0), [torch.zeros(1, requires_grad=True)])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_false_alarms_are_as_rare_as_stated():
    """Of 60 tests at an alarm rate of 5 % about three fail; nine or more would happen once in 500 times."""
    failed = 0
    for seed in range(60):
        loc = torch.zeros(3, requires_grad=True)
        try:
            check_score_mean(Normal(loc, 1.0), [loc], num_samples=200, alarm=0.05, seed=seed)
        except AssertionError:
            failed += 1
    assert failed < 9
    assert math.isfinite(failed)


def cautious(x0, sigma0, seed):
    return SNES(x0, sigma0, seed=seed)


@pytest.mark.parametrize("shift", [torch.ones(3), torch.ones(1), torch.ones(2, 2), torch.tensor(1.0)])
def test_a_shift_of_another_shape(shift):
    with pytest.raises(sf.ShapeError, match=r"shift has shape .* x0 has shape \(2,\)"):
        check_translation(cautious, lambda x: x.square().sum(1), torch.zeros(2), 1.0, shift)


@pytest.mark.parametrize("alarm", [0.0, 1.0, -0.1, 2.0, math.nan, "a"])
def test_alarm_rates_that_make_no_sense(alarm):
    message = "alarm must lie between 0 and 1"
    with pytest.raises(sf.ScorefnError, match=message):
        check_neutral_selection(cautious, 2, alarm=alarm)
    with pytest.raises(sf.ScorefnError, match=message):
        check_rotation(cautious, lambda x: x.square().sum(1), torch.zeros(2), 1.0, alarm=alarm)
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match=message):
        check_score_mean(Normal(p, 1.0), [p], alarm=alarm)


@pytest.mark.parametrize("number", [1, 0, -3, 2.5, True])
def test_samples_too_few_for_a_standard_error(number):
    with pytest.raises(sf.ScorefnError, match="runs must be an integer of at least 2"):
        check_neutral_selection(cautious, 2, runs=number)
    with pytest.raises(sf.ScorefnError, match="runs must be an integer of at least 2"):
        check_rotation(cautious, lambda x: x.square().sum(1), torch.zeros(2), 1.0, runs=number)
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="num_samples must be an integer of at least 2"):
        check_score_mean(Normal(p, 1.0), [p], num_samples=number)


def test_no_parameters():
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="parameters"):
        check_score_mean(Normal(p, 1.0), [])


def test_a_support_that_moves_has_no_score_of_mean_zero():
    p = torch.zeros(1, requires_grad=True)
    with pytest.raises(sf.SupportError, match="support of Uniform moves"):
        check_score_mean(Uniform(p - 1, p + 1), [p])
