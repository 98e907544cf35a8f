"""Exact variances beside Pyro's TraceGraph_ELBO, by enumeration, on programs where that is right."""

import copy

import pyro
import pytest
import torch
from pyro.infer import TraceGraph_ELBO

from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors import problems
from tests.posteriors.dependency_programs import bystander
from tests.posteriors.enumeration import Problem, distance, exact_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10


def chain(length):
    logits, weight = parameters(length, (), seed=31)

    def model():
        z = number(0.0)
        for i in range(length):
            z = coin(f"z{i}", weight * z - 0.2)
            observe(f"x{i}", weight * z, 0.5 * i - 0.8)

    def guide():
        z = number(0.0)
        for i in range(length):
            z = coin(f"z{i}", logits[i] + z)

    return Problem("chain", [logits, weight], model, guide)


def diamond():
    """One coin above two branches that meet in a fourth, and one that stands by itself."""
    logits, weight = parameters(5, (), seed=32)

    def model():
        a = coin("a", number(0.3))
        b, c = coin("b", weight * a), coin("c", -a)
        observe("x", weight * b, 0.4)
        d = coin("d", b - c)
        e = coin("e", number(-0.3))
        observe("y", d + weight * c, -0.8)
        observe("w", 2 * weight * e, 1.1)

    def guide():
        a = coin("a", logits[0])
        b, c = coin("b", logits[1] + a), coin("c", logits[2] - a)
        coin("d", logits[3] + b * c)
        coin("e", logits[4])

    return Problem("diamond", [logits, weight], model, guide)


def trace_graph(problem, num_particles):
    """A run whose result is the gradient: that loss is known by its gradients alone."""
    loss = TraceGraph_ELBO(num_particles, max_plate_nesting=problem.nesting)

    def gradient():
        for param in problem.params:
            param.grad = None
        loss.loss_and_grads(problem.model, problem.guide)
        return [torch.zeros_like(param) if param.grad is None else -param.grad for param in problem.params]

    return gradient


def tracked(problem, num_particles, **options):
    """The same of ours; every path meets the loss as it is given."""
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=problem.nesting, dependencies="tracked", **options)
    loss.differentiable_loss(problem.model, problem.guide)  # the map is found and audited once

    def gradient():
        value = -loss.differentiable_loss(problem.model, problem.guide)
        return torch.autograd.grad(value, problem.params, allow_unused=True, materialize_grads=True)

    return gradient


def moments(problem, gradient):
    """Mean, and the variance of every component, exactly."""
    mean, square = [[torch.zeros_like(param) for param in problem.params] for _ in range(2)]
    for probability, parts in paths(gradient):
        for index, part in enumerate(parts):
            mean[index] += probability.detach() * part
            square[index] += probability.detach() * part.square()
    return mean, torch.cat([(s - m.square()).flatten() for s, m in zip(square, mean, strict=True)])


RIGHT = [
    lambda: chain(5),
    diamond,
    bystander,
    problems.single,
    problems.categorical,
    problems.plate,
    problems.nested_small,
    problems.masked,
    problems.auxiliary,
    problems.swapped,
    problems.mixed,
    problems.event,
]


@pytest.mark.parametrize("make", RIGHT)
def test_with_one_particle_every_variance_is_the_same(make):
    """Both charge a decision with what depends on it: the same estimator where both are right, found in two ways."""
    problem = make()
    exact = exact_gradient(problem)
    theirs, ours = moments(problem, trace_graph(problem, 1)), moments(problem, tracked(problem, 1))
    assert distance(theirs[0], exact) < EXACT
    assert distance(ours[0], exact) < EXACT
    torch.testing.assert_close(ours[1], theirs[1], rtol=EXACT, atol=EXACT)
    assert float(ours[1].max()) > 0.01


@pytest.mark.parametrize("make", [problems.local_first, problems.crossed])
def test_where_a_site_reads_a_plate_trace_graph_is_wrong(make):
    """A later site that sums over a plate carries each of its elements to all others."""
    problem = make()
    exact = exact_gradient(problem)
    assert distance(moments(problem, trace_graph(problem, 1))[0], exact) > 0.01
    assert distance(moments(problem, tracked(problem, 1))[0], exact) < EXACT


def test_two_particles_of_trace_graph_halve_its_variance():
    problem = problems.swapped()
    one, two = (moments(problem, trace_graph(problem, num_particles))[1] for num_particles in (1, 2))
    torch.testing.assert_close(two, one / 2, rtol=EXACT, atol=EXACT)


def total_ratio(problem):
    """Variance of our defaults with two particles, of all components together, by TraceGraph_ELBO's."""
    pyro.set_rng_seed(0)
    ours = moments(problem, by_default(problem))[1]
    return float(ours.sum() / (moments(problem, trace_graph(problem, 1))[1] / 2).sum())


def by_default(problem):
    """Every path meets the loss as it is after its first step, when no coefficient is known."""
    loss = ScoreFunctionELBO(2, max_plate_nesting=problem.nesting, dependencies="tracked")
    loss.differentiable_loss(problem.model, problem.guide)

    def gradient():
        value = -copy.deepcopy(loss).differentiable_loss(problem.model, problem.guide)
        return torch.autograd.grad(value, problem.params, allow_unused=True, materialize_grads=True)

    return gradient


LESS = {
    "chain": (lambda: chain(4), 0.29),
    "bystander": (bystander, 0.25),
    "plate": (problems.plate, 0.54),
    "nested plates": (problems.nested_small, 0.24),
    "auxiliary": (problems.auxiliary, 0.23),
    "opposite order": (problems.swapped, 0.29),
    "reparameterised and not": (problems.mixed, 0.52),
    "event": (problems.event, 0.92),
}


@pytest.mark.parametrize("name", LESS)
def test_with_two_particles_the_defaults_have_less(name):
    make, most = LESS[name]
    assert total_ratio(make()) < most


def test_but_leaving_one_of_two_out_is_no_theorem():
    """A signal that is centred already is only made noisier by another particle's: this coin's is, nearly."""
    assert 5 < total_ratio(problems.single()) < 6
