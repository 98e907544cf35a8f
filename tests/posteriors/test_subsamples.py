"""Subsampled plates, over every subsample that can be drawn: scale on the cost, one minibatch for all particles."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors.enumeration import Problem, distance, exact_gradient, expected_gradient
from tests.posteriors.problems import coin, number, parameters

EXACT = 1e-10
DATA = number([0.3, -1.0, 1.4])


class Subsample(Messenger):
    """Gives a plate that draws its indices the ones of a list, in order."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen = list(chosen)

    def _pyro_sample(self, msg):
        if type(fn := msg["fn"]).__name__ != "_Subsample" or msg["done"]:
            return
        if fn.subsample_size is not None and fn.subsample_size < fn.size:
            msg["value"], msg["done"] = torch.tensor(self.chosen.pop(0)), True


def drawing(size):
    """A global coin and a plate of three data, of which each run draws some."""
    top, slopes, weight = parameters((), 3, ())

    def model():
        g = coin("g", number(0.3))
        with pyro.plate("data", 3, subsample_size=size) as index:
            z = coin("z", weight * g - 0.2)
            pyro.sample("x", dist.Normal(z + weight * g, 1.0), obs=DATA[index])

    def guide():
        g = coin("g", top)
        with pyro.plate("data", 3, subsample_size=size) as index:
            coin("z", slopes[index] + g)

    return Problem("drawn subsample", [top, slopes, weight], model, guide, nesting=1)


def over_subsamples(problem, loss, size):
    """Expectation over the subsamples, all equally likely, and over the draws."""
    chosen = list(itertools.permutations(range(3), size))
    total = [torch.zeros_like(param) for param in problem.params]
    for indices in chosen:

        def guide(indices=indices):
            with Subsample([indices]):
                problem.guide()

        one = Problem("fixed", problem.params, problem.model, guide, nesting=1)
        for k, part in enumerate(expected_gradient(one, loss)):
            total[k] += part / len(chosen)
    return total


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("num_particles", "size"), [(1, 1), (1, 2), (2, 1)])
def test_the_mean_over_subsamples_is_the_gradient_of_all_data(num_particles, size, vectorize):
    problem = drawing(size)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1, vectorize_particles=vectorize)
    truth = exact_gradient(drawing(3))
    assert distance(over_subsamples(problem, loss, size), truth) < EXACT


@pytest.mark.parametrize("baseline", ["auto", None, sf.MovingAverage(0.5)])
def test_together_and_one_after_the_other_agree_in_expectation(baseline):
    problem = drawing(1)
    losses = [
        ScoreFunctionELBO(2, max_plate_nesting=1, vectorize_particles=v, baseline=baseline) for v in (True, False)
    ]
    assert distance(*(over_subsamples(problem, loss, 1) for loss in losses)) < EXACT


def test_particles_one_after_the_other_meet_one_minibatch():
    problem, seen = drawing(1), []

    def guide():
        with Watch(seen):
            problem.guide()

    loss = ScoreFunctionELBO(8, max_plate_nesting=1, vectorize_particles=False)
    for _ in range(3):
        loss.draws(problem.model, guide)
    steps = [tuple(seen[i : i + 8]) for i in range(0, 24, 8)]
    assert all(len(set(step)) == 1 for step in steps)


class Watch(Messenger):
    """Notes the indices of each subsampled plate."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def _pyro_post_sample(self, msg):
        if type(msg["fn"]).__name__ == "_Subsample":
            self.seen.append(tuple(msg["value"].tolist()))


def test_each_step_draws_its_own():
    problem, seen = drawing(1), []

    def guide():
        with Watch(seen):
            problem.guide()

    pyro.set_rng_seed(0)
    loss = ScoreFunctionELBO(2, max_plate_nesting=1, vectorize_particles=False)
    for _ in range(20):
        loss.draws(problem.model, guide)
    assert set(seen) == {(0,), (1,), (2,)}


def test_indices_that_the_program_gives_are_its_own():
    seen, given = [], iter([[0, 1], [1, 2], [0, 2]])

    def guide():
        with Watch(seen), pyro.plate("data", 3, subsample=torch.tensor(next(given))) as index:
            coin("z", torch.ones(3).double().requires_grad_()[index])

    def model():
        with pyro.plate("data", 3, subsample_size=2):
            coin("z", number(0.1))

    ScoreFunctionELBO(3, max_plate_nesting=1, vectorize_particles=False).draws(model, guide)
    assert seen == [(0, 1), (1, 2), (0, 2)]


def test_a_plate_that_only_some_particles_reach_has_one_minibatch_too():
    """By enumeration of draws and of the subsamples: particle one may not have drawn it."""
    logit, slopes = parameters((), 3, seed=2)

    def program(size):
        def model():
            if coin("a", number(0.4)):
                with pyro.plate("data", 3, subsample_size=size) as index:
                    pyro.sample("x", dist.Normal(coin("z", number(0.1)), 1.0), obs=DATA[index])

        def guide():
            if coin("a", logit):
                with pyro.plate("data", 3, subsample_size=size) as index:
                    coin("z", slopes[index])

        return Problem("branch", [logit, slopes], model, guide, nesting=1, batched=False)

    loss = ScoreFunctionELBO(2, max_plate_nesting=1, vectorize_particles=False)
    problem = program(1)
    total = [torch.zeros_like(param) for param in problem.params]
    for index in range(3):

        def guide(index=index):
            with Subsample([[index]]):
                problem.guide()

        one = Problem("fixed", problem.params, problem.model, guide, nesting=1)
        total = [a + b / 3 for a, b in zip(total, expected_gradient(one, loss), strict=True)]
    assert distance(total, exact_gradient(program(3))) < EXACT
