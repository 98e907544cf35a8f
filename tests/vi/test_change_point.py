"""The change point: what the program calls exact is, by another computation."""

import math

import pytest
import torch
from torch.distributions import Gamma, Poisson

import scorefn as sf
from applications.vi import change_point


@pytest.fixture(scope="module")
def change():
    return change_point.load()


def test_the_rates_integrate_out_as_by_quadrature(change):
    grid = torch.linspace(1e-9, 12, 20_001, dtype=torch.float64)
    prior = Gamma(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)).log_prob(grid)
    for index in (0, 40, 109):
        expected = -math.log(110)
        for counts in (change.counts[: index + 1], change.counts[index + 1 :]):
            values = prior + Poisson(grid).log_prob(counts[:, None]).sum(0)
            top = values.max()
            expected += (top + torch.trapezoid((values - top).exp(), grid).log()).item()
        assert change.log_joint()[index].item() == pytest.approx(expected, abs=1e-6)


def test_the_data_and_the_posterior(change):
    assert change.counts.sum().item() == 191
    assert (change.years[0], change.years[-1]) == (1852, 1961)
    assert change.posterior().sum().item() == pytest.approx(1, abs=1e-12)
    assert change.log_evidence() == pytest.approx(-176.857035, abs=1e-6)


@pytest.mark.parametrize("family", list(change_point.FAMILIES.values()))
def test_the_optimum_is_stationary_and_highest(change, family):
    problem = family(change)
    start = problem.exact_bound().item()
    problem.to_optimum()
    bound = problem.exact_bound()
    gradient = torch.autograd.grad(bound, list(problem.parameters()))
    assert max(part.abs().max().item() for part in gradient) < 1e-9
    assert start < bound.item() <= change.log_evidence() + 1e-9


def test_the_closed_form_is_what_the_programs_estimate(change):
    """The estimate is unbiased and its standard error is given: 5 sigma."""
    torch.manual_seed(0)
    for family in change_point.FAMILIES.values():
        problem = family(change)
        problem.to_optimum()
        loss = sf.posteriors.ScoreFunctionELBO(32, max_plate_nesting=1)
        found = sf.posteriors.diagnose(loss, problem.model, problem.guide, num_draws=4000, repeats=2).bound
        error = 5 * found.standard_error.item() + 1e-9
        assert abs(found.value.item() - problem.exact_bound().item()) < error


@pytest.mark.parametrize(
    ("counts", "prior", "message"),
    [([3.0], {}, r"\(1,\).*T of 2"), ([1.0, -1.0], {}, "-1.0.*mend"), ([1.0, 2.0], {"rate": 0.0}, "0.0.*above 0")],
)
def test_a_change_refuses(counts, prior, message):
    with pytest.raises(ValueError, match=message):
        change_point.Change(1851, torch.tensor(counts, dtype=torch.float64), **prior)
