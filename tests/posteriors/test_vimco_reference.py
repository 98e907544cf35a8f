"""VIMCO against quadrature over the noise, and against RenyiELBO."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from torch.distributions import Bernoulli

from scorefn.posteriors import VIMCO, ArithmeticMean, BoundOnly, GeometricMean
from tests.posteriors.enumeration import Problem, distance, expected_gradient, paths
from tests.posteriors.problems import coin, number, observe
from tests.posteriors.vimco_cases import EXACT, Given, exact_gradient, loss_for


def anchor(num_particles, estimate):
    """Mean and variance of the gradient, all K-tuples at once: each is an element of a plate, with its own logit."""
    tuples = number(list(itertools.product([0.0, 1.0], repeat=num_particles))).T
    M = tuples.shape[1]
    logits = torch.full((M,), 0.4, dtype=torch.float64, requires_grad=True)

    def model():
        with pyro.plate("tuples", M):
            z = pyro.sample("z", dist.Bernoulli(number(0.3)))
            pyro.sample("x", dist.Normal(2 * z - 1, number(1.0)), obs=number(0.7).expand(M))

    def guide():
        with pyro.plate("tuples", M):
            coin("z", logits)

    with Given({"z": tuples if num_particles > 1 else tuples[0]}):
        value = estimate(model, guide)
    gradient = torch.autograd.grad(value, logits)[0]
    weight = Bernoulli(logits=number(0.4)).log_prob(tuples).sum(0).exp()
    mean = (weight * gradient).sum()
    return mean.item(), (weight * (gradient - mean).square()).sum().item()


def ours(num_particles, **options):
    loss = VIMCO(num_particles, max_plate_nesting=1, **options)
    return lambda model, guide: -loss.differentiable_loss(model, guide)


GRADIENT = {1: 0.0366883, 2: 0.01810355, 5: 0.00716539}


@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("baseline", [None, GeometricMean(), ArithmeticMean()])
def test_anchor_e_gradient(num_particles, baseline):
    assert anchor(num_particles, ours(num_particles, baseline=baseline))[0] == pytest.approx(
        GRADIENT[num_particles], abs=5e-8 if num_particles == 1 else 5e-9
    )


@pytest.mark.parametrize(
    ("num_particles", "baseline", "variance", "unit"),
    [
        (2, None, 2.37897, 1e-5),
        (2, GeometricMean(), 0.12405788, 1e-8),
        (2, ArithmeticMean(), 0.12405788, 1e-8),
        (5, None, 4.41069, 1e-5),
        (5, GeometricMean(), 0.04852573, 1e-8),
        (5, ArithmeticMean(), 0.04872686, 1e-8),
    ],
)
def test_anchor_e_variance(num_particles, baseline, variance, unit):
    published = None if baseline is None else BoundOnly(baseline)
    mean, found = anchor(num_particles, ours(num_particles, baseline=published))
    assert mean == pytest.approx(GRADIENT[num_particles], abs=5.1e-9)
    assert found == pytest.approx(variance, abs=0.51 * unit)


def test_anchor_e_without_the_score_in_the_weights():
    """Centring the score that log w carries as well leaves 1/350 (K = 2) and 1/6,900 (K = 5) of the variance."""
    assert anchor(2, ours(2))[1] == pytest.approx(0.000354309, abs=1e-9)
    assert anchor(5, ours(5))[1] == pytest.approx(6.98745e-6, abs=1e-11)
    assert anchor(5, ours(5, baseline=ArithmeticMean()))[1] == pytest.approx(7.15212e-6, abs=1e-11)


def test_renyi_elbo_does_not_train_a_discrete_guide():
    """Pyro's bound at alpha = 0 has no gradient in the coin's logit; the exact one is not zero."""
    logit = number(0.4).requires_grad_()

    def model():
        observe("x", 2 * pyro.sample("z", dist.Bernoulli(number(0.3))) - 1, 0.7)

    def guide():
        pyro.param("trains", number(1.0))  # without a parameter Pyro does not even call backward
        coin("z", logit)

    problem = Problem("anchor E", [logit], model, guide)
    truth = exact_gradient(problem, 2)
    assert truth[0].item() == pytest.approx(0.01810355, abs=5e-9)
    assert distance(expected_gradient(problem, loss_for(problem, 2)), truth) < EXACT

    def theirs():
        logit.grad = None
        RenyiELBO(0, 2, max_plate_nesting=0).loss_and_grads(model, guide)
        return 0.0 if logit.grad is None else -logit.grad

    assert sum(probability.detach() * gradient for probability, gradient in paths(theirs)) == 0.0
