"""The strategies for many dimensions: options that make their steps plain."""

import torch
from torch.distributions import Independent, Normal

import scorefn as sf
from scorefn.search import PGPE, OpenAIES, RankOneCSANES, SeparableCSANES

PATHS = [SeparableCSANES, RankOneCSANES]
KINDS = [*PATHS, PGPE, OpenAIES]
SIGMA0 = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 1.0], dtype=torch.float64)
START = torch.linspace(-2, 3, 7, dtype=torch.float64)


def bowl(x):
    return (torch.logspace(0, 2, x.shape[-1], dtype=x.dtype) * (x - 1).square()).sum(-1)


def descent(mean):
    """An optimiser whose step is the gradient itself."""
    return torch.optim.SGD(mean, lr=1.0)


def gradients(strategy, x, weights):
    """Of ``sum_k weights_k log p(x_k)`` in mean and standard deviations, by the core's surrogate."""
    mean = strategy.mean.clone().requires_grad_()
    scale = strategy.sigma.clone().requires_grad_()
    p = Independent(Normal(mean, scale), 1)
    draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), len(x) * weights.unsqueeze(-1))
    return p, draws, torch.autograd.grad(sf.surrogate(draws).mean(), [mean, scale])


def by_rank(f, table):
    """table[k] to the value of rank k; ties share the mean of theirs, failures are tied and last."""
    keys = torch.where(f.isfinite(), f, torch.inf)
    weights = torch.empty(len(f), dtype=torch.float64)
    for key in keys.unique():
        below, tied = int((keys < key).sum()), keys == key
        weights[tied] = table[below : below + int(tied.sum())].mean()
    return weights


VALUES = {
    "distinct": lambda x: bowl(x),
    "tied": lambda x: (bowl(x) / 50).round(),
    "failed": lambda x: torch.where(x[:, 0] > -1.8, torch.nan, bowl(x)),
}
POINTS = {"asked": lambda x: x, "repaired": lambda x: x.clamp(max=2.5)}
