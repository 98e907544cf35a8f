"""Eight ordinary ways out of the tensor graph."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceGraph_ELBO

from scorefn.tracking import EscapeWarning
from tests.posteriors.dependency_programs import error, loss_of
from tests.posteriors.enumeration import Problem, distance, exact_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters


def _branch(z, weight):
    return weight if z else -weight


def _item(z, weight):
    return weight * (z.item() + 0.3)


def _listed(z, weight):
    return [-weight, 2 * weight][int(z)]


def _set_value(z, weight):
    m = torch.zeros(2, dtype=torch.float64)
    m[0] = z
    return weight * m.sum()


def _set_index(z, weight):
    m = torch.zeros(2, dtype=torch.float64)
    m[z.long()] = 1
    return weight * m[1]


def _numpy(z, weight):
    return weight * torch.as_tensor(np.sqrt(z.numpy() + 0.3))


def _vmapped(z, weight):
    return weight * torch.vmap(lambda row: row * z)(torch.ones(2, dtype=torch.float64)).sum()


def _out(z, weight):
    m = torch.zeros((), dtype=torch.float64)
    torch.add(z, 0.3, out=m)
    return weight * m


LEAKS = {
    "if z": _branch,
    ".item()": _item,
    "list[int(z)]": _listed,
    "m[0] = z": _set_value,
    "m[z] = 1": _set_index,
    "numpy": _numpy,
    "torch.vmap": _vmapped,
    "out=": _out,
}
PYTHON = ("if z", ".item()", "list[int(z)]", "numpy")


def leaking(pattern):
    logit, weight = parameters((), ())

    def model():
        observe("x", pattern(coin("z", number(-0.5)), weight), 0.9)

    def guide():
        coin("z", logit)

    return Problem("a leak", [logit, weight], model, guide, batched=False)


def by_trace_graph(problem):
    """The expected gradient of TraceGraph_ELBO, which has no differentiable loss."""
    loss = TraceGraph_ELBO(max_plate_nesting=problem.nesting)
    total = [torch.zeros_like(param) for param in problem.params]

    def gradient():
        for param in problem.params:
            param.grad = None
        loss.loss_and_grads(problem.model, problem.guide)
        return [torch.zeros_like(param) if param.grad is None else -param.grad for param in problem.params]

    for probability, parts in paths(gradient):
        for index, part in enumerate(parts):
            total[index] += probability.detach() * part
    return total


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_exact_here_and_wrong_in_trace_graph(name):
    problem = leaking(LEAKS[name])
    for dependencies in ("order", "tracked"):
        assert error(problem, dependencies=dependencies) < 1e-10
        assert error(problem, 2, dependencies=dependencies) < 1e-10
    theirs = distance(by_trace_graph(problem), exact_gradient(problem))
    if theirs < 1e-10:
        pytest.skip(f"this Pyro {pyro.__version__} follows {name!r} too")
    assert theirs > 0.01


def test_trace_graph_is_right_where_nothing_leaks():
    """So that the comparison above is fair."""
    problem = leaking(lambda z, weight: weight * torch.where(z > 0, 1.0, -1.0))
    assert distance(by_trace_graph(problem), exact_gradient(problem)) < 1e-10
    assert error(problem) < 1e-10


@pytest.mark.parametrize("name", PYTHON)
def test_a_site_that_leaves_the_graph_is_named_once(name):
    problem = leaking(LEAKS[name])
    loss = loss_of(problem)
    with pytest.warns(EscapeWarning, match='guide site "z" left the tensor graph by .* line'):
        loss.differentiable_loss(problem.model, problem.guide)
    loss.differentiable_loss(problem.model, problem.guide)  # a second warning would be an error
