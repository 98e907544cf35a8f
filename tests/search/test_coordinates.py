"""One coordinate at a time: separable problems are solved whatever their lines look like, and others are left alone."""

import math

import pytest
import torch

import scorefn as sf
from scorefn.search import CoordinateSearch, Portfolio, minimize

OPTIMUM = torch.tensor([1.7, -3.2, 0.4, 2.9], dtype=torch.float64)


def waves(x):
    """Rastrigin's function with stretched halves; about a dozen optima on each line."""
    y = x - OPTIMUM
    y = torch.where(y > 0, 3 * y, y)
    return (y.square() + 10 * (1 - torch.cos(2 * math.pi * y))).sum(-1)


def swept(f, x0=(0.0, 0.0, 0.0, 0.0), **options):
    strategy = CoordinateSearch(list(x0), 1.5, seed=0, **options)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, f(x))
    return strategy


def test_each_generation_lies_on_one_line_and_the_first_covers_it():
    strategy = CoordinateSearch([1.0, 5.0], [1.0, 2.0], seed=0)
    x = strategy.ask()
    assert x.shape == (64, 2)
    assert (x[:, 1] == 5.0).all()
    gaps = x[:, 0].diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 8 / 64))
    assert -3 - 1e-12 <= x[0, 0] < -3 + 8 / 64
    strategy.tell(x, x[:, 0])
    best = x[:10, 0]  # the ten lowest places
    places = strategy.ask()[:, 0].view(10, 4)
    torch.testing.assert_close(places, best.unsqueeze(1) + torch.tensor([-0.6, -0.3, 0.3, 0.6]) * 8 / 64)


def test_a_separable_function_with_many_optima_is_solved_by_one_sweep():
    strategy = swept(waves)
    assert strategy.stop == {"swept": 4}
    assert strategy.result.best_f < 1e-8
    assert (strategy.mean - OPTIMUM).abs().max() < 1e-6
    assert strategy.result.evaluations < 4 * 320
    assert strategy.sigma.max() < 1e-7


@pytest.mark.parametrize("transform", [torch.exp, lambda f: -1 / (1 + f), lambda f: 7 * f - 100])
def test_only_the_order_of_values_enters(transform):
    assert torch.equal(swept(waves).mean, swept(lambda x: transform(waves(x))).mean)


def test_a_coordinate_that_f_ignores_is_passed_over():
    strategy = swept(lambda x: (x[:, 0] - 1).square() + (x[:, 2] + 1).square())
    assert strategy.stop == {"swept": 4}
    torch.testing.assert_close(strategy.mean[[0, 2]], torch.tensor([1.0, -1.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_failures_are_no_places_to_look_at():
    strategy = swept(lambda x: torch.where(x[:, 0] > 1.0, torch.nan, waves(x)))
    assert strategy.mean[0] <= 1.0
    assert strategy.result.failed > 0
    with pytest.raises(sf.NonFiniteError, match="10 generations in a row"):
        swept(lambda x: x[:, 0] * math.nan)


def test_a_resumed_sweep_is_the_same_to_the_bit():
    whole, part = CoordinateSearch([0.0] * 4, 1.5, seed=3), CoordinateSearch([0.0] * 4, 1.5, seed=3)
    for strategy in (whole, part):
        for _ in range(7):
            x = strategy.ask()
            strategy.tell(x, waves(x))
    other = CoordinateSearch([9.0] * 4, 1.0)
    other.load_state_dict(part.state_dict())
    while not whole.stop:
        x, y = whole.ask(), other.ask()
        assert torch.equal(x, y)
        whole.tell(x, waves(x))
        other.tell(y, waves(y))
    assert other.stop == whole.stop


def test_what_makes_no_sense_is_refused():
    with pytest.raises(sf.ScorefnError, match="tolwidth must lie between 0 and 1, but it is 2"):
        CoordinateSearch([0.0], 1.0, tolwidth=2)
    with pytest.raises(sf.ScorefnError, match="popsize must be an integer of at least 10, but it is 9"):
        CoordinateSearch([0.0], 1.0, popsize=9)
    with pytest.raises(sf.ScorefnError, match="CoordinateSearch has no option 'eta'"):
        CoordinateSearch([0.0], 1.0, eta=2)


def test_the_portfolio_sweeps_once_after_the_first_run():
    arms = Portfolio(4).runs(14, uniform=lambda: 0.5)
    seen, arm = [], next(arms)
    while True:
        seen.append((arm.popsize, arm.method))
        try:
            arm = arms.send(1000)
        except StopIteration:
            break
    assert seen == [(14, None), (64, "coordinates"), (28, None), (14, None), (56, None)]


def test_minimize_solves_by_the_portfolio_what_the_first_run_does_not():
    def fun(x):
        return waves(torch.as_tensor(x)).item()

    alone = minimize(fun, [0.0] * 4, 1.5, ftarget=1e-8, maxfevals=4000, restarts=0, seed=1)
    result = minimize(fun, [0.0] * 4, 1.5, ftarget=1e-8, maxfevals=4000, restarts=Portfolio(1), seed=1)
    assert not alone.success
    assert result.success
    assert result.restarts == 1


def test_a_constant_leaves_the_point_where_it_is_and_the_end_may_be_passed():
    strategy = swept(lambda x: torch.ones(len(x)))
    assert strategy.stop == {"swept": 4}
    assert strategy.mean.tolist() == [0.0] * 4
    x = strategy.ask()
    strategy.tell(x, waves(x))
    assert strategy.stop == {"swept": 4}
