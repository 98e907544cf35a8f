"""One weight for each element of a plate."""

import copy
import itertools
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import scorefn as sf
from scorefn.posteriors import VIMCO, particle_loss
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, expected_gradient
from tests.posteriors.problems import coin, number, observe, parameters
from tests.posteriors.test_subsamples import Subsample
from tests.posteriors.vimco_cases import EXACT, exact_gradient, exact_local_gradient, local, loss_for, masked_to


def with_constants():
    """Observed sites before the first latent, inside and outside the plate, do not spoil it."""
    slopes, weight = parameters(2, (), seed=13)

    def model():
        observe("before", weight, 0.5)
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(weight, 1.0), obs=number([1.0, 2.0]))
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", slopes)

    return Problem("with constants", [slopes, weight], model, guide, nesting=1)


LOCAL = [local, problems.event, problems.nested_small]


@pytest.mark.parametrize("make", LOCAL)
@pytest.mark.parametrize("batched", [True, False])
def test_latents_in_a_plate_have_weights_of_their_own(make, batched):
    problem = make()
    loss = loss_for(problem, 2, vectorize_particles=batched)
    assert distance(expected_gradient(problem, loss), exact_local_gradient(problem, 2)) < EXACT


@pytest.mark.parametrize("make", LOCAL)
def test_or_one_weight_where_it_is_asked_for(make):
    problem = make()
    expected = expected_gradient(problem, loss_for(problem, 2, plates=()))
    assert distance(expected, exact_gradient(problem, 2)) < EXACT
    assert distance(expected, exact_local_gradient(problem, 2)) > 1e-3


def test_factors_before_the_first_latent_need_no_weight():
    problem = with_constants()
    weight = problem.params[1]
    without = [torch.zeros(2, dtype=torch.float64), (0.5 - weight + 3.0 - 2 * weight).detach()]

    def model():
        with pyro.plate("data", 2):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    rest = exact_local_gradient(Problem("rest", problem.params, model, problem.guide, nesting=1), 3)
    expected = expected_gradient(problem, loss_for(problem, 3, plates=("data",)))
    assert distance(expected, [a + b for a, b in zip(rest, without, strict=True)]) < EXACT
    draws = loss_for(problem, 3).draws(problem.model, problem.guide)
    assert draws.log_prob.shape == (1, 2 + 1, 3)
    pyro.set_rng_seed(1)
    value = loss_for(problem, 3).loss(problem.model, problem.guide)
    pyro.set_rng_seed(1)
    assert -loss_for(problem, 3).draws(problem.model, problem.guide).fx.sum().item() == pytest.approx(value, rel=1e-14)


def test_the_scale_of_a_subsample_is_outside_the_logarithm():
    problem = local(data=6, index=torch.tensor([0, 3]))
    expected = expected_gradient(problem, loss_for(problem, 2))
    assert distance(expected, exact_local_gradient(problem, 2, scale=3.0)) < EXACT
    assert distance(expected, exact_local_gradient(problem, 2)) > 1e-3


def test_each_element_may_have_a_scale_of_its_own():
    problem = local()
    scale = number([0.5, 2.0])

    def scaled(program):
        def run():
            with poutine.scale(scale=scale):
                program()

        return run

    both = Problem("scaled", problem.params, scaled(problem.model), scaled(problem.guide), nesting=1)
    pieces = [exact_local_gradient(masked_to(problem, index), 2) for index in range(2)]
    truth = [sum(s * piece[k] for s, piece in zip(scale, pieces, strict=True)) for k in range(len(problem.params))]
    assert distance(expected_gradient(both, loss_for(both, 2)), truth) < EXACT


def test_one_particle_may_have_any_scales():
    problem = problems.subsampled()
    assert distance(expected_gradient(problem, loss_for(problem, 1)), exact_gradient(problem, 1)) < EXACT
    with pytest.raises(sf.ScorefnError, match=r'different scales, such as 1 \("g"\) and 3'):
        loss_for(problem, 2).loss(problem.model, problem.guide)


def test_one_after_the_other_shares_the_subsample():
    seen = []

    def guide():
        with pyro.plate("data", 50, subsample_size=3) as index:
            seen.append(index.tolist())
            coin("z", pyro.param("logits", torch.zeros(50, dtype=torch.float64))[index])

    def model():
        with pyro.plate("data", 50, subsample_size=3) as index:
            seen.append(index.tolist())
            z = coin("z", number(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.linspace(0.0, 1.0, 50, dtype=torch.float64)[index])

    loss = VIMCO(3, vectorize_particles=False, max_plate_nesting=1)
    loss.loss_and_grads(model, guide)
    assert all(index == seen[0] for index in seen)
    loss.loss_and_grads(model, guide)
    assert seen[-1] != seen[0]


def subsampled(size):
    """A coin in each element of a plate of three data, of which each run draws some."""
    slopes, weight = parameters(3, (), seed=14)
    x = number([0.3, -1.0, 1.4])

    def model():
        with pyro.plate("data", 3, subsample_size=size) as index:
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z + weight * z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 3, subsample_size=size) as index:
            coin("z", slopes[index])

    return Problem("drawn subsample", [slopes, weight], model, guide, nesting=1)


class Drawing:
    """A loss whose particles meet the given subsamples, one for each that is drawn."""

    def __init__(self, loss, chosen):
        self.loss, self.chosen, self.left = loss, chosen, []

    def __deepcopy__(self, memo):
        return self

    def differentiable_loss(self, model, guide):
        with Subsample(self.chosen) as given:
            value = copy.deepcopy(self.loss).differentiable_loss(model, guide)
        self.left.append(len(given.chosen))
        return value


def over_drawn_subsamples(problem, loss, size):
    """Expectation over coins, and over one subsample for each particle, all equally likely; and how many were drawn."""
    chosen = list(itertools.product(itertools.permutations(range(3), size), repeat=2))
    total, drawn = [torch.zeros_like(param) for param in problem.params], set()
    for indices in chosen:
        drawing = Drawing(loss, indices)
        for k, part in enumerate(expected_gradient(problem, drawing)):
            total[k] += part / len(chosen)
        drawn |= {2 - left for left in drawing.left}
    return total, drawn


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_over_subsamples_is_the_gradient_of_all_data(size, batched):
    problem = subsampled(size)
    loss = loss_for(problem, 2, vectorize_particles=batched)
    gradient, drawn = over_drawn_subsamples(problem, loss, size)
    assert drawn == {1}
    assert distance(gradient, exact_local_gradient(subsampled(3), 2)) < EXACT


def test_a_subsample_for_each_particle_would_be_another_bound(monkeypatch):
    monkeypatch.setattr(particle_loss, "SharedSubsamples", nullcontext)
    problem = subsampled(1)
    gradient, drawn = over_drawn_subsamples(problem, loss_for(problem, 2, vectorize_particles=False), 1)
    assert drawn == {2}
    assert distance(gradient, exact_local_gradient(subsampled(3), 2)) > 1e-3
