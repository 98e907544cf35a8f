"""Boxes: the smooth map is exact where it can be, penalties follow their formula, what is reported was evaluated."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SNES, PenalizedBounds, ResampledBounds, SmoothBounds, minimize

KINDS = [SmoothBounds, PenalizedBounds, ResampledBounds]


def line(low, high, num=4001):
    return torch.linspace(low, high, num, dtype=torch.float64).unsqueeze(1)


# ------------------------------------------------------------------------------------------------- the smooth transform


@pytest.mark.parametrize(("lower", "upper"), [(-1.0, 3.0), (0.0, 1e-3), (1e6, 1e6 + 1)])
def test_the_smooth_map_is_the_identity_inside_and_reaches_both_bounds(lower, upper):
    box = SmoothBounds(lower, upper)
    width = upper - lower
    inner = line(lower + 0.0501 * width, upper - 0.0501 * width)
    assert torch.equal(box.inside(inner), inner)
    bend = width / 20
    ends = torch.tensor([[lower - bend], [upper + bend]], dtype=torch.float64)
    torch.testing.assert_close(
        box.inside(ends), torch.tensor([[lower], [upper]], dtype=torch.float64), rtol=0, atol=1e-12 * max(1, abs(upper))
    )


def test_the_smooth_map_is_monotone_continuous_and_onto_with_a_continuous_slope():
    box = SmoothBounds(-1.0, 3.0)
    x = line(-1.2, 3.2, 40001)
    y = box.inside(x).squeeze()
    step = float(x[1] - x[0])
    slope = y.diff() / step
    assert float(y.min()) == -1.0
    assert float(y.max()) == 3.0
    assert bool((slope >= -1e-9).all())
    assert float(slope.max()) <= 1 + 1e-9
    assert float(slope.diff().abs().max()) <= 1.01 * step / (2 * 0.2)  # the second derivative of the parabola


def test_the_smooth_map_is_mirrored_at_its_ends_and_periodic():
    box = SmoothBounds(-1.0, 3.0)
    left, right = -1.2, 3.2
    away = line(0.0, 4.4)
    torch.testing.assert_close(box.inside(left - away), box.inside(left + away), rtol=0, atol=1e-12)
    torch.testing.assert_close(box.inside(right - away), box.inside(right + away), rtol=0, atol=1e-12)
    x = line(-5.0, 5.0)
    torch.testing.assert_close(box.inside(x + 3 * 8.8), box.inside(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("lower", "upper"), [(2.0, None), (None, 2.0)])
def test_one_sided_bounds_fold_once(lower, upper):
    box = SmoothBounds(lower, upper)
    bend = 3.0 / 20
    wall = 2.0 - bend if upper is None else 2.0 + bend
    free = line(2.0 + bend, 1e9) if upper is None else line(-1e9, 2.0 - bend)
    assert torch.equal(box.inside(free), free)
    near = line(-50.0, 50.0)
    assert bool((box.inside(near) >= 2).all() if upper is None else (box.inside(near) <= 2).all())
    assert float(box.inside(torch.tensor([[wall]], dtype=torch.float64))) == pytest.approx(2.0, abs=1e-12)
    torch.testing.assert_close(box.inside(wall - near), box.inside(wall + near), rtol=0, atol=1e-12)


def test_open_coordinates_are_left_alone():
    box = SmoothBounds([None, 0.0, -math.inf], [math.inf, 1.0, None])
    x = torch.tensor([[1e300, 0.5, -1e300], [7.0, -3.3, 8.0]], dtype=torch.float64)
    y = box.inside(x)
    assert torch.equal(y[:, [0, 2]], x[:, [0, 2]])
    assert bool(((y[:, 1] >= 0) & (y[:, 1] <= 1)).all())


@pytest.mark.parametrize("margin", [None, 0.5])
def test_start_is_the_preimage(margin):
    box = SmoothBounds([-1.0, 0.0, -4.0, -1.0], [3.0, math.inf, 4.0, 3.0], margin=margin)
    for x0 in ([-1.0, 0.0, 4.0, 1.0], [-0.95, 0.01, 3.9, 2.99]):
        x0 = torch.tensor(x0, dtype=torch.float64)
        torch.testing.assert_close(box.inside(box.start(x0)), x0, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- penalties


def at(mean, sigma):
    return SimpleNamespace(
        mean=torch.tensor(mean, dtype=torch.float64), sigma=torch.tensor(sigma, dtype=torch.float64), ask=None
    )


def test_the_penalty_is_its_formula():
    box = PenalizedBounds([0.0, 0.0], [1.0, 1.0])
    box.start(torch.full((2,), 0.5, dtype=torch.float64))
    strategy = at([0.5, 9.0], [0.5, 2.0])
    x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.5, -1.0], [0.5, 3.0]], dtype=torch.float64)
    f = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    told = box.told(strategy, x, f)
    unit = (4 - 2) / ((0.25 + 4) / 2)  # the interquartile range of 1, 2, 3, 4 by rank
    scale = np.exp(0.9 * (np.log([0.25, 4.0]) - np.log([0.25, 4.0]).mean()))
    far = 8 / 2 - 3 * max(1, 4 * math.sqrt(2) / 4)
    weights = [2 * unit, 2 * unit * math.exp(math.tanh(max(far, 0) / 3) / 2)]
    expected = [4, 1 + weights[0] / scale[0] / 2, 3 + weights[1] / scale[1] / 2, 2 + 4 * weights[1] / scale[1] / 2]
    assert told.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_weight_of_a_coordinate_grows_while_the_mean_is_far_outside_and_shrinks_to_its_limit_afterwards():
    box = PenalizedBounds(0.0, 1.0)
    box.start(torch.full((2,), 0.5, dtype=torch.float64))
    x = torch.tensor([[0.5, 90.0], [0.5, 91.0], [0.5, 92.0], [0.5, 93.0]], dtype=torch.float64)
    f = torch.arange(4.0, dtype=torch.float64)  # the interquartile range is 2, so weights start at 4
    path = []
    for mean in [1e9] * 10 + [0.5] * 20:
        box.told(at([0.5, mean], [1.0, 1.0]), x, f)
        path.append(box.state_dict()["weights"].tolist())
    assert {weight[0] for weight in path} == {4.0}
    weights = [4.0] + [weight[1] for weight in path]
    for before, after in itertools.pairwise(weights[:11]):
        grown = before * math.exp(0.5)
        assert after == pytest.approx(grown if grown <= 10 else grown * math.exp(-1 / 3), rel=1e-12)
    for before, after in itertools.pairwise(weights[10:]):
        assert after == pytest.approx(before if before <= 10 else before * math.exp(-1 / 3), rel=1e-12)
    assert weights[-1] <= 10


def test_points_inside_and_failures_pay_nothing():
    box = PenalizedBounds(0.0, 1.0)
    box.start(torch.full((1,), 0.5, dtype=torch.float64))
    f = torch.tensor([1.0, math.nan, 3.0, math.inf], dtype=torch.float64)
    told = box.told(at([0.5], [1.0]), torch.full((4, 1), 0.25, dtype=torch.float64), f)
    assert torch.equal(told.nan_to_num(), f.nan_to_num())
    outside = box.told(at([0.5], [1.0]), torch.full((4, 1), 2.0, dtype=torch.float64), f)
    assert outside[1].isnan()
    assert outside[3].isinf()
    assert outside[0] > 1


def test_a_penalized_loop_goes_on_from_its_state_to_the_bit():
    def steps(box, strategy, num):
        for _ in range(num):
            x, points = box.asked(strategy)
            strategy.tell(x, box.told(strategy, x, (points - 2).square().sum(1)))

    def fresh():
        box = PenalizedBounds(0.0, 1.0)
        return box, SNES(box.start(torch.full((3,), 0.5, dtype=torch.float64)), 0.5, seed=1)

    box, strategy = fresh()
    steps(box, strategy, 15)
    saved = box.state_dict(), strategy.state_dict()
    steps(box, strategy, 15)
    other_box, other = fresh()
    other_box.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(other_box, other, 15)
    assert torch.equal(other.mean, strategy.mean)
    assert torch.equal(other_box.state_dict()["weights"], box.state_dict()["weights"])


# --------------------------------------------------------------------------------------------------------- resampling


def test_resampled_points_are_inside_and_those_inside_are_kept():
    box, twin = ResampledBounds(0.0), SNES([0.3, 0.3], 1.0, seed=0)
    first = twin.ask()
    box.start(torch.full((2,), 0.3, dtype=torch.float64))
    x, points = box.asked(SNES([0.3, 0.3], 1.0, seed=0))
    assert x is points
    assert bool((x >= 0).all())
    kept = (first >= 0).all(1)
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(x[kept], first[kept])


def test_points_that_stay_outside_are_clipped():
    asked = []

    def ask():
        asked.append(0)
        return torch.full((4, 2), 7.0, dtype=torch.float64)

    box = ResampledBounds(0.0, 1.0, attempts=5)
    box.start(torch.zeros(2, dtype=torch.float64))
    x, _ = box.asked(SimpleNamespace(ask=ask, mean=None, sigma=None))
    assert torch.equal(x, torch.ones(4, 2, dtype=torch.float64))
    assert len(asked) == 6


# ------------------------------------------------------------------------------------------------------- whole searches


@pytest.mark.parametrize(
    ("kind", "optimum"), [*[(kind, 0.3) for kind in KINDS], (SmoothBounds, 2.0), (PenalizedBounds, 2.0)]
)
def test_every_point_is_inside_and_the_reported_ones_were_evaluated(kind, optimum):
    seen = {}

    def fun(x):
        assert ((x >= -1) & (x <= 1)).all()
        seen[x.tobytes()] = value = float(((x - optimum) ** 2).sum())
        return value

    result = minimize(fun, np.zeros(4), 0.5, bounds=kind(-1.0, 1.0), seed=3, maxfevals=3000)
    best = 4 * max(0.0, optimum - 1) ** 2
    assert result.fun == pytest.approx(best, abs=1e-6)
    assert seen[result.x.tobytes()] == result.fun
    assert seen[result.best_x.tobytes()] == result.best_fun == result.history.best.min()
    assert np.abs(result.x - min(optimum, 1.0)).max() < 1e-3
    assert ((result.mean >= -1) & (result.mean <= 1)).all()


def test_the_standard_deviations_stay_about_as_wide_as_the_box_while_the_optimum_is_on_its_edge():
    widest = []
    minimize(
        lambda x: float(x.sum()),
        [0.5, 0.5],
        0.1,
        bounds=(0.0, 1.0),
        seed=0,
        maxfevals=600,
        callback=lambda strategy: widest.append(float(strategy.sigma.max())),
    )
    assert max(widest) < 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_around_everything_changes_nothing(kind):
    def fun(x):
        return float(((x - 0.3) ** 2).sum())

    free = minimize(fun, np.zeros(3), 0.1, seed=0)
    boxed = minimize(fun, np.zeros(3), 0.1, seed=0, bounds=kind(-100, 100))
    assert np.array_equal(free.x, boxed.x)
    assert free.nfev == boxed.nfev


@pytest.mark.parametrize("kind", KINDS)
def test_sides_that_are_no_sides(kind):
    with pytest.raises(sf.ShapeError, match=r"lower bounds have shape \(2,\) and the upper ones \(3,\)"):
        kind([0.0, 0.0], [1.0, 1.0, 1.0])
    with pytest.raises(sf.ScorefnError, match="lower bounds must be numbers, or None"):
        kind("low", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_of_two_numbers_serves_searches_of_any_dimension(kind):
    box = kind(0.0, 1.0)
    for dimension in (2, 3):
        result = minimize(lambda x: float(((x - 0.5) ** 2).sum()), np.full(dimension, 0.25), 0.1, bounds=box, seed=0)
        assert result.x == pytest.approx([0.5] * dimension, abs=1e-5)


def test_margins_and_attempts():
    with pytest.raises(sf.ScorefnError, match="at most half of the smallest width, 0.5, but it is 0.7"):
        SmoothBounds(0.0, 1.0, margin=0.7)
    with pytest.raises(sf.ScorefnError, match="attempts must be an integer of at least 1"):
        ResampledBounds(0.0, 1.0, attempts=0)


def test_bounds_work_in_a_loop_of_ones_own():
    box = SmoothBounds([-1.0, -1.0], [1.0, 1.0])
    strategy = CSANES(box.start(torch.tensor([0.9, -0.9], dtype=torch.float64)), 0.3, seed=0, ftarget=2 + 1e-6)
    while not strategy.stop:
        x, points = box.asked(strategy)
        strategy.tell(x, box.told(strategy, x, (points - 2).square().sum(1)))
    assert strategy.stop == {"ftarget": 2 + 1e-6}
