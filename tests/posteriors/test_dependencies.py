"""Tracked dependencies: exact, and of lower variance than program order."""

import warnings

import pyro
import pytest
import torch

import scorefn as sf
from scorefn.tracking import EscapeWarning
from tests.posteriors import problems
from tests.posteriors.dependency_programs import (
    bystander,
    error,
    independent,
    loss_of,
    moments,
    through_noise,
    two_chains,
)
from tests.posteriors.enumeration import Problem, distance, exact_gradient
from tests.posteriors.problems import coin, number, observe, parameters


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("make", problems.SMALL)
@pytest.mark.parametrize("num_particles", [1, 2])
def test_tracked_is_exact(make, num_particles):
    problem = make()
    assert error(problem, num_particles) < 1e-10


SHARPER = [independent, two_chains, bystander, through_noise]


@pytest.mark.parametrize(
    ("make", "num_particles"), [*((make, 1) for make in SHARPER), (independent, 2), (through_noise, 2)]
)
def test_tracked_is_exact_and_of_lower_variance_than_order(make, num_particles):
    problem = make()
    exact = exact_gradient(problem)
    means, variances = zip(
        *(moments(problem, loss_of(problem, num_particles, d)) for d in ("order", "tracked")), strict=True
    )
    assert distance(means[0], exact) < 1e-10
    assert distance(means[1], exact) < 1e-10
    assert variances[1] < 0.97 * variances[0]


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("make", [*SHARPER, *problems.ALL])
def test_tracked_never_charges_more_than_order(make):
    problem = make()
    masks = []
    for dependencies in ("order", "tracked"):
        pyro.set_rng_seed(0)
        draws = loss_of(problem, 1, dependencies).draws(problem.model, problem.guide)
        basis = torch.eye(draws.fx.shape[-1], dtype=torch.float64)[:, None]
        masks.append(torch.stack([draws.credit.influence(row)[0] for row in basis]))
    order, tracked = masks
    assert bool(((tracked == 0) | (tracked == 1)).all())
    assert bool((tracked <= order).all())
    assert make not in SHARPER or bool((tracked < order).any())


@pytest.mark.parametrize("make", SHARPER)
def test_the_credit_equals_its_dense_twin(make):
    problem = make()
    draws = loss_of(problem, 3).draws(problem.model, problem.guide)
    credit, J, K = draws.credit, draws.fx.shape[-1], draws.log_prob.shape[-1]
    mask = credit.influence(torch.eye(J, dtype=torch.float64)).T > 0
    dense, generator = sf.Influence(mask), torch.Generator().manual_seed(0)
    u = torch.randn(5, K, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(credit.influence_adjoint(u), dense.influence_adjoint(u))
    torch.testing.assert_close(credit.predecessors(u), dense.predecessors(u))


def test_a_map_found_on_one_path_is_sound_on_another():
    """At z = 0 Python does not look at y; at z = 1 it does, and sites and shapes are the same."""
    logits, weight = parameters(3, (), seed=16)

    def model():
        z, y = coin("z", number(0.2)), coin("y", number(-0.4))
        v = coin("v", number(0.1))
        loc = -weight
        if z:
            loc = 2 * weight if y else weight
        observe("w", loc, 0.8)
        observe("x", v * weight, 0.1)

    def guide():
        for i, name in enumerate("zyv"):
            coin(name, logits[i])

    problem = Problem("two paths", [logits, weight], model, guide, batched=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EscapeWarning)
        assert error(problem) < 1e-10
        assert error(problem, 2) < 1e-10
