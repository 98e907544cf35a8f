"""Programs with dependencies that order alone does not see."""

import pyro
import pyro.distributions as dist
import torch

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors.enumeration import Problem, distance, exact_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters


def loss_of(problem, num_particles=1, dependencies="tracked", **options):
    return ScoreFunctionELBO(
        num_particles,
        max_plate_nesting=problem.nesting,
        vectorize_particles=problem.batched,
        dependencies=dependencies,
        **{"baseline": sf.LeaveOneOut() if num_particles > 1 else None, **options},
    )


def moments(problem, loss):
    """Expected gradient of ``-loss`` and the variance of all its components, exactly; one loss runs every path."""
    mean, square = [torch.zeros_like(param) for param in problem.params], 0.0
    for probability, value in paths(lambda: loss.differentiable_loss(problem.model, problem.guide)):
        parts = torch.autograd.grad(-value, problem.params, allow_unused=True, materialize_grads=True)
        for total, part in zip(mean, parts, strict=True):
            total += probability.detach() * part
        square += float(probability.detach()) * sum(float(part.square().sum()) for part in parts)
    return mean, square - sum(float(total.square().sum()) for total in mean)


def error(problem, *args, **options):
    return distance(moments(problem, loss_of(problem, *args, **options))[0], exact_gradient(problem))


def independent():
    """Three coins, each with a datum of its own; the model meets all of them first."""
    logits, weight = parameters(3, (), seed=12)

    def model():
        z = [coin(f"z{i}", number(0.3)) for i in range(3)]
        for i in range(3):
            observe(f"x{i}", weight * z[i], 0.5 + i)

    def guide():
        for i in range(3):
            coin(f"z{i}", logits[i])

    return Problem("independent coins", [logits, weight], model, guide)


def two_chains():
    """Two chains of two coins, sampled in turn."""
    logits, weight = parameters(4, (), seed=13)

    def model():
        a = coin("a", number(0.3))
        b = coin("b", number(-0.2))
        c, d = coin("c", a - weight), coin("d", b + weight)
        observe("x", weight * c, 0.4)
        observe("y", weight * d, -0.8)

    def guide():
        a = coin("a", logits[0])
        b = coin("b", logits[1])
        coin("c", logits[2] + a)
        coin("d", logits[3] - b)

    return Problem("two chains", [logits, weight], model, guide)


def bystander():
    """A global coin between two entries of a plate, which does not read the plate: indices stay apart."""
    slopes, top, weight = parameters(3, (), (), seed=14)

    def model():
        data = pyro.plate("data", 3)
        with data:
            z = coin("z", number(0.3))
        s = coin("s", weight)
        with data:
            pyro.sample("x", dist.Normal(weight * s + z, 1.0), obs=number([0.3, -1.0, 0.8]))

    def guide():
        with pyro.plate("data", 3):
            coin("z", slopes)
        coin("s", top)

    return Problem("a bystander", [slopes, top, weight], model, guide, nesting=1)


def through_noise():
    """What a coin does passes through a reparameterised site."""
    logit, loc, weight = parameters((), (), (), seed=22)

    def model():
        a, b = coin("a", number(0.2)), coin("b", number(0.1))
        y = pyro.sample("y", dist.Normal(a, 1.0))
        observe("x", weight * y, 0.4)
        observe("w", weight * b, 0.4)

    def guide():
        a = coin("a", logit)
        coin("b", 2 * logit)
        pyro.sample("y", dist.Normal(loc + a, number(0.8)))

    return Problem("through a reparameterised site", [logit, loc, weight], model, guide)
