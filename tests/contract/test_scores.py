"""Law 6: scores have mean zero, and the Fisher information is their covariance."""

import pytest
import torch

import scorefn as sf
from tests.oracles.higher_orders import derivative_tensors
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import EXACT, near


def poisson(rate):
    x = torch.arange(60, dtype=torch.float64)
    return x, torch.distributions.Poisson(rate.detach()).log_prob(x).exp()


D = torch.distributions
SCORES = {  # parameter, distribution, points and weights, Fisher information
    "Bernoulli": (
        [0.4], lambda eta: D.Bernoulli(logits=eta[0]),
        lambda eta: (torch.tensor([0.0, 1.0]).double(), torch.stack([1 - eta[0].sigmoid(), eta[0].sigmoid()])),
        lambda eta: (eta.sigmoid() * (1 - eta.sigmoid())).diag(),
    ),
    "Categorical": (
        [0.4, -0.3, 1.0], lambda logits: D.Categorical(logits=logits),
        lambda logits: (torch.arange(3), logits.softmax(-1)),
        lambda logits: logits.softmax(-1).diag() - torch.outer(logits.softmax(-1), logits.softmax(-1)),
    ),
    "OneHotCategorical": (
        [0.4, -0.3, 1.0], lambda logits: D.OneHotCategorical(logits=logits),
        lambda logits: (torch.eye(3).double(), logits.softmax(-1)),
        lambda logits: logits.softmax(-1).diag() - torch.outer(logits.softmax(-1), logits.softmax(-1)),
    ),
    "Binomial": (
        [0.4], lambda eta: D.Binomial(5, logits=eta[0]),
        lambda eta: (torch.arange(6).double(), D.Binomial(5, logits=eta[0]).log_prob(torch.arange(6).double()).exp()),
        lambda eta: (5 * eta.sigmoid() * (1 - eta.sigmoid())).diag(),
    ),
    "Poisson": ([1.7], lambda rate: D.Poisson(rate[0]), lambda rate: poisson(rate[0]), lambda rate: (1 / rate).diag()),
    "Normal": (
        [0.7, 1.3], lambda t: D.Normal(t[0], t[1]),
        lambda t: (t[0] + t[1] * gauss_hermite(10)[0], gauss_hermite(10)[1]),
        lambda t: torch.stack([1 / t[1] ** 2, 2 / t[1] ** 2]).diag(),
    ),
    "LogNormal": (
        [0.7, 1.3], lambda t: D.LogNormal(t[0], t[1]),
        lambda t: ((t[0] + t[1] * gauss_hermite(10)[0]).exp(), gauss_hermite(10)[1]),
        lambda t: torch.stack([1 / t[1] ** 2, 2 / t[1] ** 2]).diag(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_mean_zero_and_covariance_fisher(name):
    """The first and second derivative of `dice` of a constant vanish: E[s] = 0, E[s s^T] = -E[Hessian log p]."""
    start, build, points, fisher = SCORES[name]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    x, weight = points(theta.detach())
    p = build(theta)
    p.sample = lambda shape: x
    ones = sf.draw(p, lambda x: torch.ones(len(weight), dtype=torch.float64), len(weight))
    mean, second = derivative_tensors((weight * sf.dice(ones)).sum(), (theta,), 2)
    assert mean.abs().max() < EXACT
    assert second.abs().max() < EXACT
    scores = torch.stack(
        [torch.autograd.grad(each, theta, retain_graph=True)[0] for each in sf.surrogate(ones).unbind()]
    )
    covariance = (weight[:, None, None] * scores[:, :, None] * scores[:, None, :]).sum(0)
    assert near(covariance, fisher(theta.detach()))
