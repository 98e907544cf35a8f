"""Exact certificates of joint estimators: their own randomness is enumerated, nothing is sampled.

Every outcome has parameters of its own along a leading axis of T outcomes, so that one backward pass gives the gradient
estimate of each; their mean, by the probability of the outcomes, is compared with the enumerated expectation. A problem
is a pair of independent problems, `[2]`, of a joint draw with S values. The truth uses nothing of the library.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch.distributions import Bernoulli, Categorical, Independent, OneHotCategorical

EXACT = 1e-10
OFFSET = torch.tensor([0.3, -0.7], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A family, the points of its joint support `[S, *event]`, and how many batch dimensions are problems."""

    build: object
    shape: tuple
    points: torch.Tensor
    batch_ndim: int | None

    @property
    def theta(self):
        """The parameters of the pair, `[2, *shape]`."""
        generator = torch.Generator().manual_seed(7)
        return torch.randn(2, *self.shape, dtype=torch.float64, generator=generator)

    def log_prob(self, theta):
        """`[..., *shape]` to the log-probability of each joint value, `[S, ...]`."""
        p = self.build(theta)
        lead = theta.ndim - len(self.shape)
        x = self.points.reshape(len(self.points), *[1] * lead, *self.points.shape[1:])
        log_prob = p.log_prob(x.expand(-1, *theta.shape[:lead], *self.points.shape[1:]))
        return log_prob.reshape(len(self.points), *theta.shape[:lead], -1).sum(-1)

    def f(self, x, c):
        """A function that is neither additive nor centred, with a parameter of its own; x `[M, ..., 2, *event]`."""
        flat = x.reshape(*x.shape[: x.ndim - len(self.points.shape[1:])], -1).double()
        weight = torch.tensor([1.3, -0.4, 0.8, 2.1, -1.7, 0.6], dtype=torch.float64)[: flat.shape[-1]]
        inner = flat @ weight + OFFSET
        return c * inner.square() + (c + inner).sin() + 2.0


def cube(sizes):
    return torch.tensor(list(product(*[range(size) for size in sizes])))


def hot(index, size):
    return torch.nn.functional.one_hot(index, size).double()


PROBLEMS = {
    "Categorical": Problem(lambda t: Categorical(logits=t), (4,), torch.arange(4), 2),
    "Bernoulli, sites in the batch": Problem(lambda t: Bernoulli(logits=t), (2,), cube([2, 2]).double(), 2),
    "Independent Bernoulli": Problem(
        lambda t: Independent(Bernoulli(logits=t), 2), (1, 2), cube([2, 2]).double().reshape(4, 1, 2), None
    ),
    "Independent Categorical": Problem(lambda t: Independent(Categorical(logits=t), 1), (2, 3), cube([3, 3]), None),
    "OneHotCategorical, sites in the batch": Problem(
        lambda t: OneHotCategorical(logits=t), (2, 2), hot(cube([2, 2]), 2), 2
    ),
    "Bernoulli of probabilities": Problem(
        lambda t: Independent(Bernoulli(probs=t.sigmoid()), 1), (2,), cube([2, 2]).double(), None
    ),
}


def truth(problem):
    """E f `[2]`, its gradient in theta `[2, *shape]` and in the parameter of f `[2]`."""
    theta, c = problem.theta.requires_grad_(), torch.full((2,), 1.7, dtype=torch.float64, requires_grad=True)
    x = problem.points.unsqueeze(1).expand(-1, 2, *problem.points.shape[1:])
    value = (problem.log_prob(theta).exp() * problem.f(x, c)).sum(0)
    return value.detach(), *torch.autograd.grad(value.sum(), (theta, c))


def outcomes(problem, count):
    """T copies of the parameters of the pair and of f's own, all requiring grad."""
    theta = problem.theta.expand(count, *problem.theta.shape).clone().requires_grad_()
    c = torch.full((count, 2), 1.7, dtype=torch.float64, requires_grad=True)
    return theta, c


def at(problem, number):
    """The points with these numbers, `[M, T, 2] -> [M, T, 2, *event]`."""
    return problem.points[number]


def check_unbiased(problem, estimate, weight):
    """`estimate(theta, c)` `[T, 2]`, by outcome, has the right mean, gradient and direct gradient.

    Args:
        problem: the problem.
        estimate: from the parameters `[T, 2, *shape]` and `[T, 2]`.
        weight: the probability of each outcome for each of the two problems, `[T, 2]`.
    """
    theta, c = outcomes(problem, len(weight))
    value = estimate(theta, c)
    assert value.shape == weight.shape
    gradients = torch.autograd.grad(value.sum(), (theta, c))
    assert torch.allclose(weight.sum(0), torch.ones(2, dtype=torch.float64), atol=1e-12)
    for found, right in zip((value.detach(), *gradients), truth(problem), strict=True):
        scale = weight.reshape(*weight.shape, *[1] * (found.ndim - 2))
        error = ((scale * found).sum(0) - right).abs().max()
        assert error <= EXACT, float(error)
        assert right.abs().max() > 1e-3
