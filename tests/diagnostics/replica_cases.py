"""Families, values, and replicates one by one."""

from functools import partial

import torch
from torch import distributions as td

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.replicas import Replicas, replicas

F64 = torch.float64


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=F64, generator=generator).requires_grad_() for shape in [(3,), (3,), (2, 3)]]


a, b, c = PARAMETERS = parameters()
LOWER = torch.eye(3, dtype=F64) + torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).tril(-1)
FAMILIES = {
    "Bernoulli": lambda: td.Bernoulli(logits=c),
    "Bernoulli of probabilities": lambda: td.Bernoulli(c.sigmoid()),
    "Independent": lambda: td.Independent(td.Bernoulli(logits=c), 1),
    "Categorical": lambda: td.Categorical(logits=c),
    "OneHotCategorical": lambda: td.OneHotCategorical(logits=c),
    "Binomial": lambda: td.Binomial(4, logits=c),
    "Poisson": lambda: td.Poisson(c.exp()),
    "Geometric": lambda: td.Geometric(logits=c),
    "Normal": lambda: td.Normal(a, b.exp()),
    "Normal of a batch": lambda: td.Normal(c, 1.0),
    "LogNormal": lambda: td.LogNormal(a, b.exp()),
    "StudentT": lambda: td.StudentT(a.exp(), b, 1.0),
    "Gamma": lambda: td.Gamma(a.exp(), b.exp()),
    "Beta": lambda: td.Beta(a.exp(), b.exp()),
    "Dirichlet": lambda: td.Dirichlet(c.exp()),
    "MultivariateNormal": lambda: td.MultivariateNormal(a, scale_tril=LOWER * b.exp()),
    "MultivariateNormal of a batch": lambda: td.MultivariateNormal(c, scale_tril=LOWER * b.exp()),
    "MultivariateNormal of covariances": lambda: td.MultivariateNormal(
        c, torch.eye(3, dtype=F64) * torch.stack([a.exp(), b.exp()]).unsqueeze(-1)
    ),
    "MixtureSameFamily": lambda: td.MixtureSameFamily(td.Categorical(logits=c), td.Normal(c * a, b.exp().expand(2, 3))),
    "a network": lambda: td.Bernoulli(logits=(c @ a.tanh()).exp() * b[:2]),
    "one tensor twice": lambda: td.Normal(a, a.exp()),
}
DISCRETE = ("Bernoulli", "Bernoulli of probabilities", "Independent", "Categorical", "OneHotCategorical", "a network")
RELAXED = ("Bernoulli", "Independent", "OneHotCategorical", "a network")


def value(p):
    """An integrand of p whose problems are all batch dimensions."""
    events, batch = len(p.event_shape), len(p.batch_shape)

    def f(x):
        x = x.to(F64)
        return ((x + 0.3).square().flatten(1 + batch).sum(-1) if events else (x + 0.3).square()) + 1

    return f


def joint(p):
    """An integrand of p whose batch dimensions are drawn jointly."""
    return lambda x: (x.to(F64).flatten(1) - 0.2).sum(-1).square()


class Given:
    """A coupling that returns given draws."""

    unbiased = True

    def __init__(self, x, block=None):
        self.drawn = x, block

    def sample(self, p, num_samples):
        return self.drawn


def singly(p, f, estimator, x, block=None, parameters=PARAMETERS):
    """Gradients ``[R, P]`` of the single runs from the draws x ``[N, R, ...]``: the oracle."""
    rows = []
    for r in range(x.shape[1]):
        one = x[:, r].detach().clone()
        if isinstance(estimator, partial):
            options = {**estimator.keywords, "coupling": Given(one, block)}
            estimate = sf.expectation(p, f, **options)
        else:
            one.requires_grad_(isinstance(estimator, sf.REBAR | sf.DoubleControlVariate))
            estimate = estimator.surrogate(p, one, f(one))
        found = torch.autograd.grad(
            estimate.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def check(p, f, estimator, parameters=PARAMETERS, moves=True):
    torch.manual_seed(3)
    found = replicas(Estimation(p, f, estimator), tuple(parameters))
    assert isinstance(found, Replicas), found
    x = found.draws(5)
    gradients = found.gradients_at(x)
    expected = singly(p, f, estimator, x, getattr(found._work, "_block", None), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()) + 1e-15)
    assert not moves or bool(expected.any())
    found._sweep = 2  # the last sweep is smaller
    torch.testing.assert_close(found.gradients_at(x), gradients, rtol=1e-10, atol=1e-10)
    values, again = found.estimates(5)
    assert values.shape == (5,)
    assert again.shape == gradients.shape
    assert all(q.grad is None for q in parameters)


def expectation(n=4, **options):
    return partial(sf.expectation, num_samples=n, **options)
