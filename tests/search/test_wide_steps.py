"""Steps wider than the box, and values at the end of float64: a bounded search bears both."""

import math
import sys

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, PenalizedBounds, ResampledBounds, SmoothBounds, minimize

ILL = np.logspace(0, 6, 5)


@pytest.mark.parametrize("sigma0", [20.0, 100.0, 1e8])
def test_a_sigma0_wider_than_the_box_is_borne(sigma0):
    for seed in range(6):
        result = minimize(
            lambda x: float((ILL * x**2).sum()), [0.0] * 5, sigma0, bounds=(-10, 10), seed=seed, maxfevals=10000
        )
        assert result.fun < 1e-9
        assert result.nfev < 2500


@pytest.mark.parametrize("method", ["csanes", "separable", "rank_one", "snes", "xnes"])
def test_no_strategy_sees_steps_beyond_a_quarter_of_a_period(method):
    widest = []
    minimize(
        lambda x: float(-x.sum()),  # the optimum is in a corner
        [0.5, 0.5],
        50.0,
        method=method,
        bounds=(0.0, 1.0),
        seed=1,
        maxfevals=600,
        callback=lambda strategy: widest.append(float(strategy.sigma.max())),
    )
    assert max(widest[:1]) < 0.5
    assert max(widest) < 2.2


def test_narrowed_standard_deviations():
    box = SmoothBounds([0.0, 0.0, None], [1.0, 100.0, 1.0])
    box.start(torch.full((3,), 0.5, dtype=torch.float64))
    sigma = torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64)
    narrowed = box.narrowed(sigma)
    assert narrowed.tolist() == pytest.approx([1.1 / 4, 5.0, 5.0])
    for kind in (PenalizedBounds, ResampledBounds):
        assert kind(0.0, 1.0).narrowed(sigma) is sigma


def test_a_strategy_that_is_wider_than_the_box_is_asked_for_its_points_drawn_together():
    box = SmoothBounds(-1.0, 1.0)
    strategy = SNES(box.start(torch.zeros(2, dtype=torch.float64)), [1e3, 1.0], seed=3)
    twin = SNES(torch.zeros(2), [1e3, 1.0], seed=3)
    x, points = box.asked(strategy)
    free = twin.ask()
    ratio = x / free
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))  # one factor for all
    assert float(ratio[0, 0]) == pytest.approx(2.2 / 4 / 1e3)
    assert torch.equal(points, box.inside(x))


def test_values_at_the_end_of_float64_are_values():
    calls = []

    def fun(x):
        calls.append(x)
        return sys.float_info.max if x[0] < 0.4 else float(x @ x)

    result = minimize(fun, [0.5, 0.5], 0.3, bounds=PenalizedBounds(-1, 1), maxfevals=800, seed=0)
    assert result.failed == 0
    assert result.best_fun == pytest.approx(0.16, abs=1e-3)


@pytest.mark.parametrize("sigma", [1e-200, 1.0, 1e150])
@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 2.0, sys.float_info.max], [-sys.float_info.max, 0, 0, sys.float_info.max]]
)
def test_penalised_values_are_finite_where_values_are(sigma, values):
    class At:
        mean = torch.tensor([0.5, 0.5], dtype=torch.float64)

    At.sigma = torch.full((2,), sigma, dtype=torch.float64)
    box = PenalizedBounds(0.0, 1.0)
    box.start(At.mean)
    x = torch.tensor([[0.5, 0.5], [1e-3, 5.0], [1e150, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    f = torch.tensor(values, dtype=torch.float64)
    for _ in range(30):
        told = box.told(At, x, f)
        assert told.isfinite().all()
        assert bool((told >= f).all())
        assert told[0] == f[0]
    failed = torch.tensor([math.nan, math.inf, 1.0, 2.0], dtype=torch.float64)
    assert box.told(At, x, failed).isfinite().tolist() == [False, False, True, True]


# -------------------------------------------------------------------------------------------------------- wrong shapes

KINDS = [SmoothBounds, PenalizedBounds, ResampledBounds]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x0", [0.5, [[0.5, 0.5]], [0.5, 0.5, 0.5], []], ids=str)
def test_starts_of_another_shape(kind, x0):
    with pytest.raises(sf.ShapeError, match="x0"):
        kind([0.0, 0.0], [1.0, 1.0]).start(torch.tensor(x0, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_that_are_no_tensors(kind):
    box = kind([0.0, 0.0], [1.0, 1.0])
    assert box.inside(box.start([0.5, 0.25])).tolist() == pytest.approx([0.5, 0.25])
    with pytest.raises(sf.ScorefnError, match="x0 must hold real numbers"):
        box.start("ab")
    with pytest.raises(sf.NonFiniteError, match="x0 is not finite"):
        box.start([math.nan, 0.5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 1), ()], ids=str)
def test_points_of_another_shape(kind, shape):
    box = kind([0.0, 0.0], [1.0, 1.0])
    with pytest.raises(sf.ShapeError, match=r"points .*2 coordinates"):
        box.inside(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(sf.ScorefnError, match="points must hold real numbers"):
        box.inside("ab")


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_of_another_dimension(kind):
    with pytest.raises(sf.ShapeError, match=r"points .*2 coordinates"):
        kind([0.0, 0.0], [1.0, 1.0]).asked(CSANES([0.0] * 3, 1.0, seed=0))
