"""What ends a search over discrete points, and one by a family without variance: nothing that is about float64."""

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.search import CSANES, DistributionSearch, IntegerSearch, ProductSearch, run


def heavy(family):
    loc = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    return DistributionSearch(lambda: family(loc, log_scale.exp()), [loc, log_scale], popsize=20, seed=0, maxiter=300)


@pytest.mark.parametrize(
    "family",
    [
        td.Cauchy,
        lambda loc, scale: td.StudentT(1.5, loc, scale),
        lambda loc, scale: td.Independent(td.Cauchy(loc, scale), 1),
        lambda loc, scale: td.HalfCauchy(scale + 0 * loc),
        lambda loc, scale: td.Pareto(torch.ones(2, dtype=torch.float64), 1 + scale / (1 + scale) + 0 * loc),
    ],
    ids=["Cauchy", "StudentT", "Independent", "HalfCauchy", "Pareto"],
)
def test_no_finite_variance_is_no_overflow(family):
    strategy = heavy(family)
    assert strategy.sigma.isnan().all()
    result = run(strategy, lambda x: x.square().sum())
    assert "overflow" not in result.stop
    assert result.nit > 20
    assert result.sigma.isnan().all()


def test_a_scale_that_overflows_still_is_one():
    log_scale = torch.full((2,), 300.0, dtype=torch.float64, requires_grad=True)  # exp(710) is infinite
    optimizer = torch.optim.SGD([log_scale], lr=1e4)
    loc = torch.zeros(2, dtype=torch.float64)
    strategy = DistributionSearch(
        lambda: td.Normal(loc, log_scale.exp()), [log_scale], popsize=8, optimizer=optimizer, seed=0
    )
    result = run(strategy, lambda x: -x.abs().sum().double())
    assert "overflow" in result.stop


def test_points_that_are_drawn_at_infinity_are_an_end():
    loc = torch.full((2,), 88.0, requires_grad=True)  # exp of more than 88.7 is infinite in float32
    strategy = DistributionSearch(lambda: td.LogNormal(loc, 1.0), [loc], popsize=20, seed=0)
    assert "overflow" in run(strategy, lambda x: -x.sum()).stop


def test_a_saturated_bit_does_not_end_the_search_of_the_others():
    logits = torch.zeros(12, dtype=torch.float64)
    logits[0] = 60.0  # the standard deviation is 1e-13, a fifth of it vanishes beside 1
    logits.requires_grad_()
    strategy = DistributionSearch(
        lambda: td.Bernoulli(logits=logits), [logits], popsize=12, natural=True, seed=0, maxiter=400
    )
    result = run(strategy, lambda x: (1 - x).sum())
    assert not {"noeffectcoord", "noeffectaxis"} & set(result.stop)
    assert result.best_fun == 0


def corner(low):
    return [low, low], [low + 40, low + 40]


@pytest.mark.parametrize("low", [0, 2**53 - 40, -(2**53), 2**52])
def test_integers_near_the_end_of_float64_are_searched_like_those_near_zero(low):
    strategy = IntegerSearch(*corner(low), seed=0, ftarget=0.0, maxiter=300)
    twin = IntegerSearch(*corner(0), seed=0, ftarget=0.0, maxiter=300)
    best = torch.tensor([13, 29])
    while not strategy.stop:
        x, y = strategy.ask(), twin.ask()
        assert torch.equal(x.long() - low, y.long())
        strategy.tell(x, (x.long() - low - best).square().sum(1))
        twin.tell(y, (y.long() - best).square().sum(1))
    assert strategy.stop == twin.stop == {"ftarget": 0.0}
    assert (strategy.result.best_x.long() - low).tolist() == best.tolist()
    assert torch.equal(strategy.mean.long() - low, twin.mean.long())


def test_a_product_looks_at_the_resolution_of_its_continuous_parts_only():
    def product(x0, low):
        blocks = {
            "x": CSANES([x0], 1e-3, popsize=8, seed=0),
            "n": IntegerSearch([low], [low + 3], popsize=8, seed=1),
        }
        return ProductSearch(blocks, maxiter=5, tolx=0)

    for x0, low, stop in [(0.0, 2**53 - 3, {"maxiter"}), (1e16, 0, {"noeffectcoord"})]:
        strategy = product(x0, low)
        result = run(strategy, lambda x: x["x"].abs().sum() + x["n"].abs().sum() / 2**53)
        assert set(result.stop) & {"maxiter", "noeffectcoord"} == stop


def test_an_empty_parameter_is_refused():
    empty = torch.zeros(0, requires_grad=True)
    loc = torch.zeros(2, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="parameters .*0 numbers"):
        DistributionSearch(lambda: td.Normal(loc, 1.0), [loc, empty], popsize=8)
