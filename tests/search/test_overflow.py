"""A search that runs away ends with a result that says so; a generation that overflows changes nothing."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import (
    PGPE,
    SNES,
    DistributionSearch,
    PenalizedBounds,
    ResampledBounds,
    SmoothBounds,
    minimize,
    run,
)

METHODS = ["csanes", "rank_one", "separable", "snes", "xnes", "pgpe", "openai_es", "coordinates"]
FREE = {"tolfacupx": math.inf, "tolfunhist": 0, "tolfun": 0, "tolstagnation": 0, "tolx": 0, "tolconditioncov": math.inf}


def ended(result):
    assert result.stop
    assert set(result.stop) <= {
        "overflow",
        "maxiter",
        "noeffectcoord",
        "noeffectaxis",
        "swept",
        "tolfacupx",
        "tolflatfitness",
    }
    assert all(name in result.message for name in result.stop)
    assert np.isfinite(result.x).all()
    assert np.isfinite(result.mean).all()
    assert not np.isnan(result.sigma).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma0", [1.0, 1e100, 1e149])
def test_descent_without_end(method, sigma0):
    maxiter = 500 if method in ("pgpe", "openai_es") else 3000  # their widths run away slowly, if at all
    result = minimize(
        lambda x: float(x.sum()), [0.0, 0.0], sigma0, method=method, seed=0, popsize=10, maxiter=maxiter, **FREE
    )
    ended(result)
    if sigma0 == 1e149 and method in ("csanes", "separable", "snes", "rank_one", "xnes"):
        assert set(result.stop) & {"overflow", "noeffectaxis"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [SmoothBounds, PenalizedBounds, ResampledBounds])
@pytest.mark.parametrize("sigma0", [1e-150, 1e-8, 1.0, 1e8, 1e140])
def test_boxes(method, kind, sigma0):
    def fun(x):
        return float(1e3 * x[0] - x[1] ** 2 + math.sin(50 * x[0]))

    bounds = kind([0.0, -math.inf], [1.0, 3.0])
    ended(minimize(fun, [0.3, 0.5], sigma0, method=method, bounds=bounds, seed=0, maxiter=30, **FREE))


@pytest.mark.parametrize("method", METHODS)
def test_random_values(method):
    generator = np.random.default_rng(0)
    result = minimize(lambda x: float(generator.random()), [0.0, 0.0], 1.0, method=method, seed=0, maxiter=500, **FREE)
    ended(result)


def test_a_generation_that_overflows_is_an_end_with_a_result_and_the_parameters_stay():
    strategy = SNES([0.0, 0.0], 1e149, seed=0, eta_sigma=1e4, tolfacupx=math.inf)
    mean, sigma = strategy.result.mean, strategy.result.sigma
    result = run(strategy, lambda x: -x.abs().sum())
    assert result.stop == {"overflow": 1e150}
    assert result.message == "overflow: the distribution would leave what float64 can hold"
    assert (result.status, result.success, result.nit) == (3, False, 1)
    assert torch.equal(strategy.mean, mean)
    assert torch.equal(strategy.sigma, sigma)


def test_a_distribution_too_wide_stops_and_learns_no_more():
    strategy = SNES([0.0, 0.0], 0.9e150, seed=0, tolfacupx=math.inf)
    while not strategy.stop:
        strategy.tell(x := strategy.ask(), -x.abs().sum(1))
    assert strategy.stop == {"overflow": 1e150}
    before = strategy.result
    with pytest.raises(sf.NonFiniteError, match=r"has passed 1e\+150.*Start anew"):
        strategy.tell(x, x.sum(1))
    assert torch.equal(strategy.mean, before.mean)
    assert strategy.result.evaluations == before.evaluations


def test_other_errors_of_tell_are_no_overflow():
    loc = torch.zeros(2, requires_grad=True)
    strategy = DistributionSearch(
        lambda: td.Normal(loc, 1.0), [loc], popsize=6, seed=0, shape=None, baseline=sf.LeaveOneOut()
    )
    calls = []

    def fun(x):
        calls.append(x)
        return math.nan if len(calls) == 3 else float(x.sum())

    with pytest.raises(sf.NonFiniteError):
        run(strategy, fun)


def test_an_optimizer_that_overflows_is_an_end():
    strategy = PGPE([0.0], 1e3, seed=0, optimizer=lambda p: torch.optim.SGD(p, lr=1e308), tolfacupx=math.inf)
    for _ in range(3):
        result = run(strategy, lambda x: x.sum() * 1.0)
        assert "overflow" in result.stop
        assert math.isfinite(float(result.mean))
