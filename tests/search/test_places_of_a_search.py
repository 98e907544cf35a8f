"""Where a search says it is when its family does not say, and what it refuses to be told, with nothing changed."""

import copy

import pytest
import torch
from torch.distributions import Distribution, Gamma, Normal, StudentT, constraints

import scorefn as sf
from scorefn.search import SNES, DistributionSearch, PenalizedBounds, ProductSearch
from scorefn.search.by_seeds import one_thread_here


class Bare(Distribution):
    """A normal distribution that declares its support, and neither mean, mode nor variance."""

    arg_constraints = {}
    support = constraints.real

    def __init__(self, loc):
        self.normal = Normal(loc, 1.0)
        super().__init__(loc.shape)

    def sample(self, shape=torch.Size()):  # noqa: B008 - as torch has it
        return self.normal.sample(shape)

    def log_prob(self, value):
        return self.normal.log_prob(value)


def test_without_mean_and_mode_it_is_at_its_best_point():
    loc = torch.zeros(2, requires_grad=True)
    strategy = DistributionSearch(lambda: Bare(loc), [loc], popsize=6, seed=0)
    assert strategy.mean.isnan().all()
    assert strategy.mean.shape == (2,)
    points = strategy.ask()
    values = points.square().sum(1)
    strategy.tell(points, values)
    assert torch.equal(strategy.mean, points[values.argmin()])
    assert strategy.sigma.isnan().all()


def test_without_a_finite_mean_it_is_at_its_mode():
    loc = torch.tensor([1.5, -2.0], requires_grad=True)
    strategy = DistributionSearch(lambda: StudentT(0.5, loc, 1.0), [loc], popsize=6, seed=0)
    assert strategy.distribution.mean.isnan().all()
    assert torch.equal(strategy.mean, loc.detach())


def test_points_outside_of_the_support_are_refused_by_the_family_and_change_nothing():
    rate = torch.zeros(2, requires_grad=True)
    strategy = DistributionSearch(lambda: Gamma(2.0, rate.exp()), [rate], popsize=4, seed=0)
    strategy.ask()
    before = copy.deepcopy(strategy.state_dict())
    with pytest.raises(sf.ScorefnError, match=r"(?s)^Gamma cannot score the told .*Tell points of its support"):
        strategy.tell(-torch.ones(4, 2), torch.arange(4.0))
    assert torch.equal(rate, torch.zeros(2))
    assert str(strategy.state_dict()) == str(before)


def test_complex_values_have_no_order():
    strategy = SNES([0.0, 0.0], 1.0, seed=0, popsize=4)
    points = strategy.ask()
    with pytest.raises(sf.ScorefnError, match="is complex, but only real numbers have an order: take a norm"):
        strategy.tell(points, torch.zeros(4, dtype=torch.complex128))


def test_parameters_that_nothing_depends_on_have_no_information():
    loc, other = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    strategy = DistributionSearch(
        lambda: Normal(loc.detach() + 0 * other.sum(), 1.0), [loc, other], popsize=4, natural=True, seed=0
    )
    with pytest.raises(sf.ScorefnError, match="does not depend on the parameters: its Fisher information is zero"):
        strategy.tell(points := strategy.ask(), points.sum(1))
    assert not loc.any()
    assert not other.any()


def test_blocks_of_different_searches_are_no_state_of_one():
    def made():
        return ProductSearch({"a": SNES([0.0], 1.0, seed=0, popsize=6), "b": SNES([0.0, 0.0], 1.0, seed=1, popsize=6)})

    strategy, state = made(), copy.deepcopy(made().state_dict())
    state["blocks"]["b"]["popsize"] = 8
    before = str(strategy.state_dict())
    with pytest.raises(sf.ScorefnError, match="popsize"):
        strategy.load_state_dict(state)
    assert str(strategy.state_dict()) == before


def test_sums_are_made_on_one_thread_and_the_number_comes_back():
    threads = torch.get_num_threads()

    @one_thread_here()
    def fails():
        raise ValueError(f"{torch.get_num_threads()} thread")

    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="^1 thread$"):
            fails()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_bounds_with_the_weights_of_another_search_are_refused():
    bounds = PenalizedBounds(0.0, 1.0)  # for any number of coordinates until start
    two, three = SNES([0.0, 0.0], 5.0, seed=0), SNES([0.0, 0.0, 0.0], 5.0, seed=0)
    points = two.ask()
    assert (bounds.told(two, points, points.sum(1)) > points.sum(1)).any()
    points = three.ask()
    with pytest.raises(sf.ShapeError, match=r"weights of these bounds are of 2 coordinates, but the search has 3"):
        bounds.told(three, points, points.sum(1))
    bounds.start([0.0, 0.0, 0.0])
    assert (bounds.told(three, points, points.sum(1)) > points.sum(1)).any()
