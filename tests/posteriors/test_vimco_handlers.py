"""Masks, scales, conditioning and minibatches under VIMCO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import scorefn as sf
from scorefn.posteriors import VIMCO
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, expected_gradient
from tests.posteriors.problems import coin, number, parameters
from tests.posteriors.vimco_cases import EXACT, exact_gradient, exact_local_gradient, local, loss_for


@pytest.mark.parametrize("num_particles", [2, 3])
def test_a_mask(num_particles):
    problem = problems.masked()
    expected = expected_gradient(problem, loss_for(problem, num_particles, plates=()))
    assert distance(expected, exact_gradient(problem, num_particles)) < EXACT


@pytest.mark.parametrize("make", [problems.single, problems.swapped, local])
def test_a_scale_on_the_whole_program_is_a_scale_on_the_bound(make):
    problem = make()
    scaled = [poutine.scale(program, scale=0.25) for program in (problem.model, problem.guide)]
    both = Problem("scaled", problem.params, *scaled, problem.nesting)
    truth = exact_local_gradient(problem, 2) if make is local else exact_gradient(problem, 2)
    assert distance(expected_gradient(both, loss_for(both, 2)), [0.25 * part for part in truth]) < EXACT


def test_a_scale_on_some_sites_is_refused():
    problem = problems.single()
    model = poutine.scale(problem.model, scale=0.25)
    with pytest.raises(sf.ScorefnError, match="different scales, such as .* use one particle"):
        VIMCO(2, max_plate_nesting=0).loss(model, problem.guide)


def test_a_site_that_is_conditioned_in_the_model_and_hidden_in_the_guide():
    problem = problems.swapped()
    latents = [name for name in poutine.trace(problem.guide).get_trace().nodes if not name.startswith("_")]
    given = {latents[0]: number(1.0)}
    model = poutine.condition(problem.model, data=given)
    guide = poutine.block(poutine.condition(problem.guide, data=given), hide=list(given))
    both = Problem("conditioned", problem.params, model, guide)
    assert distance(expected_gradient(both, loss_for(both, 3)), exact_gradient(both, 3)) < EXACT


def test_inner_latents_share_the_weight_of_the_outer_element():
    """Two plates, of which the inner one does not hold every latent."""
    outer, inner = parameters(2, (1, 2), seed=15)

    def model():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", number(-0.5))
            with pyro.plate("inner", 1, dim=-2):
                pyro.sample("x", dist.Normal(coin("v", u + 0.3) + u, 1.0), obs=number([[0.3, -1.0]]))

    def guide():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", outer)
            with pyro.plate("inner", 1, dim=-2):
                coin("v", inner - u)

    problem = Problem("nested", [outer, inner], model, guide, nesting=2)
    assert distance(expected_gradient(problem, loss_for(problem, 2)), exact_local_gradient(problem, 2)) < EXACT
    assert loss_for(problem, 2).draws(model, guide).log_prob.shape == (1, 2, 2)


def minibatch(index):
    """A coin for each of three data, of which the given ones are in use."""
    slopes, weight = parameters(3, (), seed=16)
    x = number([0.3, -1.0, 1.4])

    def model():
        with pyro.plate("data", 3, subsample=index):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z + weight * z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 3, subsample=index):
            coin("z", slopes[index])

    return Problem("minibatch", [slopes, weight], model, guide, nesting=1)


def test_a_ragged_last_minibatch():
    """One loss serves batches of two and of one; weighed by their sizes they make the gradient of all data."""
    loss = loss_for(minibatch(torch.arange(3)), 2)
    total = [0.0, 0.0]
    for index in (torch.tensor([0, 1]), torch.tensor([2])):
        problem = minibatch(index)
        expected = expected_gradient(problem, loss)
        assert distance(expected, exact_local_gradient(problem, 2, scale=3 / len(index))) < EXACT
        total = [part + len(index) / 3 * more for part, more in zip(total, expected, strict=True)]
    assert distance(total, exact_local_gradient(minibatch(torch.arange(3)), 2)) < EXACT


def test_a_plate_that_does_not_hold_all_is_refused_by_name():
    problem = problems.plate()
    with pytest.raises(sf.ScorefnError, match='each element of the plate "data", because site "g"'):
        loss_for(problem, 2, plates=("data",)).loss(problem.model, problem.guide)
