"""The families, with points that integrate them, and what the tests of this folder share.

The truth is a finite sum everywhere: supports are enumerated, Gauss-Hermite nodes are exact for the normals' scores,
and the trapezoid rule on a whole line has an error below rounding. Scores are torch's own derivatives of log_prob.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Chi2,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
)

import scorefn as sf
from tests.oracles.toys import coordinates


def hermite(dimensions: int, nodes: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes `[M, D]` and weights `[M]` of a standard normal."""
    node, weight = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    index = coordinates(*[nodes] * dimensions)
    return node[index], (weight / weight.sum())[index].prod(-1)


def line(low: float, high: float, step: float, to_x: Callable, slope: Callable, p) -> tuple[Tensor, Tensor]:
    """The trapezoid rule in u, for x = to_x(u)."""
    u = torch.arange(low, high, step)
    x = to_x(u)
    return x, p.log_prob(x).exp() * slope(u) * step


def finite(support: Tensor, p) -> tuple[Tensor, Tensor]:
    return support, p.log_prob(support).exp()


def positive(p):
    return line(-90.0, 6.0, 0.02, torch.exp, torch.exp, p)


def unit_interval(p):
    return line(-70.0, 30.0, 0.02, torch.sigmoid, lambda u: u.sigmoid() * (-u).sigmoid(), p)


def both_sides(p):
    """The two half-lines that meet in the kink of a Laplace."""
    parts = [line(-90.0, 6.0, 0.02, lambda u, s=s: p.loc + s * p.scale * u.exp(), lambda u: p.scale * u.exp(), p)
             for s in (-1, 1)]  # fmt: skip
    return torch.cat([x for x, _ in parts]), torch.cat([weight for _, weight in parts])


def broken_stick(p):
    """Three categories: the first part, and how the rest is divided."""
    u = torch.arange(-70.0, 70.0, 0.4)
    first, share = (u[index] for index in coordinates(len(u), len(u)).T)
    rest = (-first).sigmoid()
    x = torch.stack([first.sigmoid(), rest * share.sigmoid(), rest * (-share).sigmoid()], -1)
    slope = first.sigmoid() * rest * rest * share.sigmoid() * (-share).sigmoid()
    return x, p.log_prob(x).exp() * slope * 0.4**2


def log_normal_nodes(p):
    x, weight = normal_nodes(p)
    return x.exp(), weight


def normal_nodes(p):
    z, weight = hermite(1)
    return p.loc + p.scale * z[:, 0], weight


def multivariate_nodes(p):
    z, weight = hermite(p.event_shape[0], 5)
    return p.loc + z @ torch.linalg.cholesky(p.covariance_matrix).mT, weight


def pair_nodes(p):
    z, weight = hermite(2)
    return p.base_dist.loc + p.base_dist.scale * z, weight


TRIL = [[0.7, 0.0, 0.0], [-0.4, 1.3, 0.0], [0.2, 0.9, 0.5]]
FACTOR = [[0.7, -0.3], [-0.4, 1.3], [0.2, 0.9], [1.1, 0.1], [0.4, -0.6]]


@dataclass(frozen=True)
class Case:
    """A distribution, by constructor and parameters, with nodes `x [M, *event]` and their probabilities."""

    name: str
    make: Callable
    values: dict
    nodes: Callable
    still: int = 0  # directions in which the distribution does not change

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.values.items()}

    @property
    def p(self):
        return self.make(**self.parameters)


def independent_normal(**parameters):
    return Independent(Normal(**parameters), 1)


def independent_bernoulli(**parameters):
    return Independent(Bernoulli(**parameters), 1)


counts, tail = torch.arange(8.0, dtype=torch.float64), torch.arange(400.0, dtype=torch.float64)
bits = coordinates(2, 2).double()
CASES = [
    Case("Normal", Normal, {"loc": 0.3, "scale": 1.7}, normal_nodes),
    Case("Independent(Normal)", independent_normal, {"loc": [0.3, -1.0], "scale": [1.7, 0.2]}, pair_nodes),
    Case("MultivariateNormal", MultivariateNormal, {"loc": [0.3, -1.0, 2.0], "scale_tril": TRIL}, multivariate_nodes),
    Case(
        "LowRank 1", LowRankMultivariateNormal,
        {"loc": [0.3, -1.0, 2.0], "cov_factor": [[0.7], [-0.4], [1.2]], "cov_diag": [0.5, 1.2, 0.8]},
        multivariate_nodes,
    ),
    Case(
        "LowRank 2", LowRankMultivariateNormal,
        {"loc": [0.3, -1.0, 2.0, 0.0, 1.0], "cov_factor": FACTOR, "cov_diag": [0.5, 1.2, 0.8, 0.3, 1.0]},
        multivariate_nodes, still=1,
    ),
    Case("Bernoulli logits", Bernoulli, {"logits": 0.8}, partial(finite, torch.tensor([0.0, 1.0]).double())),
    Case("Bernoulli probs", Bernoulli, {"probs": 0.2}, partial(finite, torch.tensor([0.0, 1.0]).double())),
    Case("Independent(Bernoulli)", independent_bernoulli, {"probs": [0.2, 0.7]}, partial(finite, bits)),
    Case("Binomial logits", partial(Binomial, total_count=7), {"logits": -0.6}, partial(finite, counts)),
    Case("Binomial probs", partial(Binomial, total_count=7), {"probs": 0.3}, partial(finite, counts)),
    Case("Categorical logits", Categorical, {"logits": [0.4, -1.0, 0.3, 2.0]}, partial(finite, torch.arange(4)), 1),
    Case("Categorical probs", Categorical, {"probs": [0.1, 0.2, 0.4, 0.3]}, partial(finite, torch.arange(4)), 1),
    Case("OneHot logits", OneHotCategorical, {"logits": [0.4, -1.0, 0.3]}, partial(finite, torch.eye(3).double()), 1),
    Case("OneHot probs", OneHotCategorical, {"probs": [0.1, 0.6, 0.3]}, partial(finite, torch.eye(3).double()), 1),
    Case("Poisson", Poisson, {"rate": 2.3}, partial(finite, torch.arange(40.0, dtype=torch.float64))),
    Case("Exponential", Exponential, {"rate": 1.8}, positive),
    Case("Gamma", Gamma, {"concentration": 0.8, "rate": 1.4}, positive),
    Case("Gamma, large", Gamma, {"concentration": 6.5, "rate": 0.9}, positive),
    Case("Chi2", Chi2, {"df": 1.7}, positive),
    Case("Beta", Beta, {"concentration1": 0.8, "concentration0": 2.5}, unit_interval),
    Case("Dirichlet", Dirichlet, {"concentration": [0.8, 2.5, 1.3]}, broken_stick),
    Case("LogNormal", LogNormal, {"loc": 0.3, "scale": 0.7}, log_normal_nodes),
    Case("Laplace", Laplace, {"loc": 0.3, "scale": 1.7}, both_sides),
    Case("Geometric logits", Geometric, {"logits": -0.6}, partial(finite, tail)),
    Case("Geometric probs", Geometric, {"probs": 0.3}, partial(finite, tail)),
    Case("NegativeBinomial logits", partial(NegativeBinomial, 3.5), {"logits": -0.6}, partial(finite, tail)),
    Case("NegativeBinomial probs", partial(NegativeBinomial, 3.5), {"probs": 0.3}, partial(finite, tail)),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def free(name: str, value: Tensor) -> Tensor:
    """Positions of the numbers of a parameter that can change."""
    if name != "scale_tril":
        return torch.arange(value.numel())
    return torch.ones_like(value).tril().flatten().nonzero().flatten()


def packed(vector: dict[str, Tensor], lead: int = 0) -> Tensor:
    """`[..., *shape]` of each parameter to `[..., P]`."""
    parts = []
    for name, value in vector.items():
        flat = value.reshape(*value.shape[:lead], -1)
        parts.append(flat[..., free(name, value[(0,) * lead])])
    return torch.cat(parts, -1)


def unpacked(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    vector, start = {}, 0
    for name, value in like.items():
        index = free(name, value)
        vector[name] = torch.zeros(value.numel()).index_put((index,), flat[start : start + len(index)])
        vector[name] = vector[name].reshape(value.shape)
        start += len(index)
    return vector


def moments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the weights, E[score] `[P]` and E[score score^T] `[P, P]`."""
    x, weight = case.nodes(case.p)
    leaves = {
        name: value.expand(len(x), *value.shape).clone().requires_grad_() for name, value in case.parameters.items()
    }
    scores = torch.autograd.grad(case.make(**leaves).log_prob(x).sum(), list(leaves.values()))
    S = packed(dict(zip(leaves, scores, strict=True)), lead=1)
    return weight.sum(), weight @ S, S.mT @ (weight[:, None] * S)


def gradient_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """A gradient as draws give it: a combination of scores."""
    x, weight = case.nodes(case.p)
    leaves = {name: value.clone().requires_grad_() for name, value in case.parameters.items()}
    fx = torch.randn(len(x), generator=torch.Generator().manual_seed(seed))
    objective = (weight * fx * case.make(**leaves).log_prob(x)).sum()
    return dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))


# ------------------------------------------------------------------------------------------------ natural gradients


def exact_draws(p, f, support: Tensor) -> sf.Draws:
    """All points of a finite support, weighted so that means over draws are expectations."""
    log_prob = p.log_prob(support)
    behaviour = torch.full_like(log_prob, -np.log(len(support)))
    return sf.Draws(
        support, log_prob.unsqueeze(-1), f(support).unsqueeze(-1), behaviour_log_prob=behaviour.unsqueeze(-1)
    )


# ---------------------------------------------------------------------------------------------- estimated information


def network(dtype=torch.float64, draws=12, width=6):
    """A measure whose logits a network computes from a context, draws of it, and the network's parameters."""
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    p = Categorical(logits=module(torch.randn(3, dtype=dtype)))
    return p, sf.draw(p, lambda x: (x - 1.3).square().to(dtype), draws), tuple(module.parameters())


def dense_truth(draws, params, damping, baseline=None) -> Tensor:
    """Row by row, and a general solve."""
    flat = [torch.autograd.grad(row, params, retain_graph=True) for row in draws.log_prob.sum(-1).flatten()]
    S = torch.stack([torch.cat([part.flatten() for part in row]) for row in flat])
    parts = torch.autograd.grad(sf.surrogate(draws, baseline=baseline).mean(0).sum(), params, retain_graph=True)
    F = S.mT @ S / len(draws) + damping * torch.eye(S.shape[1], dtype=S.dtype)
    return torch.linalg.solve(F, torch.cat([part.flatten() for part in parts]))


def flat(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


class Walk:
    """A structured measure: up to three coins, the next one thrown where the last one fell on heads."""

    def __init__(self, logits):
        self.logits = logits

    def draws(self, f, num_samples, *, coupling=None):
        p = Bernoulli(logits=self.logits)
        x = p.sample((num_samples,))
        mask = torch.cat([torch.ones(num_samples, 1), x[:, :-1].cumprod(-1)], -1).bool()
        log_prob = torch.where(mask, p.log_prob(x), torch.nan)
        return sf.Draws(x, log_prob, torch.where(mask, f(x), 0.0), credit=sf.RewardToGo(), mask=mask)


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(call, *patterns, error=sf.ScorefnError):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error
    assert text.endswith(".")
    for pattern in patterns:
        assert pattern in text, text
