"""Gaussians with known gradients, by quadrature."""

import copy
import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger

from scorefn.posteriors import ScoreFunctionELBO
from tests.oracles.quadrature import gauss_hermite
from tests.posteriors.enumeration import Problem
from tests.posteriors.problems import number
from tests.posteriors.pyro_cases import DATA


class Nodes(Messenger):
    """Gives site "z" of a guide mean + scale * node; the other sites are at their means."""

    def __init__(self, nodes):
        super().__init__()
        self.nodes = nodes

    def _pyro_sample(self, msg):
        if msg["done"] or msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn = msg["fn"]
        value = fn.mean + fn.variance.sqrt() * (self.nodes if msg["name"] == "z" else 0.0)
        msg["value"], msg["done"] = value if fn.has_rsample else value.detach(), True


def gaussian(reparameterised, nuisance, dim=-1):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1), with latents that have nothing to do with it, met in opposite orders."""
    loc, scale = number([0.0, 0.0]).requires_grad_(), number([1.0]).requires_grad_()

    def normal(mean, sd):
        return dist.Normal(number(mean) if isinstance(mean, float) else mean, sd).has_rsample_(reparameterised)

    def other(name, mean, sd):
        if nuisance:
            pyro.sample(name, normal(mean, sd))

    def model():
        other("first", 0.0, 1.0)
        data = pyro.plate("data", 2, dim=dim)
        with data:
            z = pyro.sample("z", normal(torch.zeros(2, dtype=torch.float64).reshape(2, *[1] * (-dim - 1)), 1.0))
        other("second", 2.0, 3.0)
        with data:
            pyro.sample("x", dist.Normal(z, number(1.0)), obs=DATA.reshape(2, *[1] * (-dim - 1)))
        other("third", 4.0, 5.0)

    def guide():
        other("third", 4.0, 5.0)
        with pyro.plate("data", 2, dim=dim):
            pyro.sample("z", normal(loc.reshape(2, *[1] * (-dim - 1)), scale))
        other("second", 2.0, 3.0)
        other("first", 0.0, 1.0)

    return Problem("gaussian", [loc, scale], model, guide, nesting=-dim)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("nuisance", [False, True])
@pytest.mark.parametrize("reparameterised", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_gaussians_by_quadrature(num_particles, reparameterised, nuisance, dim):
    """At loc 0 and scale 1 the loss has slopes -data and 1 for each scale; f is a quadratic of z."""
    problem = gaussian(reparameterised, nuisance, dim)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=-dim, vectorize_particles=False)
    nodes, weights = gauss_hermite(3)  # the estimate is of degree 4 in each draw
    total = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    cells = list(product(range(3), repeat=2))
    for choice in product(cells, repeat=num_particles):
        given = iter([nodes[list(cell)].reshape(2, *[1] * (-dim - 1)) for cell in choice])

        def guide(given=given):
            with Nodes(next(given)):
                problem.guide()

        weight = math.prod(float(weights[i]) for cell in choice for i in cell)
        value = copy.deepcopy(loss).differentiable_loss(problem.model, guide)
        for k, part in enumerate(torch.autograd.grad(value, problem.params)):
            total[k] += weight * part
    torch.testing.assert_close(total, [number([0.5, -2.0]), number([2.0])], rtol=0, atol=1e-9)
