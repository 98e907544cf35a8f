"""The loss's expected gradient, by enumeration of all that the particles may draw, is the gradient of the bound."""

import pytest
import torch

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors import problems
from tests.posteriors.enumeration import (
    Problem,
    distance,
    exact_gradient,
    expected_gradient,
    paths,
    second_derivative_error,
)

EXACT = 1e-10


def loss_for(problem, num_particles, **options):
    options.setdefault("vectorize_particles", problem.batched)
    return ScoreFunctionELBO(num_particles, max_plate_nesting=problem.nesting, **options)


@pytest.mark.parametrize("make", problems.ALL)
def test_one_particle(make):
    problem = make()
    assert distance(expected_gradient(problem, loss_for(problem, 1)), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize("make", problems.SMALL)
def test_two_particles_with_leave_one_out(make):
    problem = make()
    assert distance(expected_gradient(problem, loss_for(problem, 2)), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize("make", [problems.single, problems.masked, problems.mixed, problems.swapped])
def test_two_particles_one_after_the_other(make):
    """The same expectation as together, and as the bound's gradient."""
    problem = make()
    loss = loss_for(problem, 2, vectorize_particles=False)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize("make", [problems.plate, problems.branch, problems.crossed])
@pytest.mark.parametrize("options", [{"baseline": sf.Constant(-3.0)}, {"credit": sf.Total()}, {"baseline": None}])
def test_other_baselines_and_total_credit(make, options):
    problem = make()
    assert distance(expected_gradient(problem, loss_for(problem, 1, **options)), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize(
    "make", [problems.single, problems.plate, problems.branch, problems.mixed, problems.subsampled]
)
@pytest.mark.parametrize("baseline", [None, sf.Constant(-2.0)])
def test_second_derivative_by_dice(make, baseline):
    assert second_derivative_error(make(), baseline) < EXACT


def test_no_noise_remains_where_the_bound_is_tight():
    """With the posterior as guide, every single estimate is zero: -log q carries no gradient of its own."""
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    posterior = logit.detach().clone()

    def model():
        problems.coin("z", posterior)

    def guide():
        problems.coin("z", logit)

    problem = Problem("tight", [logit], model, guide)
    for _, loss in paths(lambda: loss_for(problem, 2).differentiable_loss(model, guide)):
        assert torch.autograd.grad(loss, logit)[0].abs() < 1e-15
