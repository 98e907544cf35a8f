"""Expectations over the uniforms of relaxed draws, by quadrature."""

import torch
from torch import nn
from torch.distributions import Bernoulli, OneHotCategorical
from torch.nn.functional import one_hot

from scorefn.estimators import relaxed
from tests.estimators.discrete_problems import PSI, expected
from tests.oracles.toys import coordinates


def trapezoid(h, reach):
    w = torch.arange(-reach, reach + h / 2, h, dtype=torch.float64)
    return w.sigmoid(), h * w.sigmoid() * (-w).sigmoid()


def grid(sites, h, reach):
    """Nodes `[T, sites]` in the unit cube and their weights `[T]`."""
    nodes, weight = trapezoid(h, reach)
    choice = coordinates(*[len(nodes)] * sites)
    return nodes[choice], weight[choice].prod(-1)


class Network(nn.Module):
    """A smooth function of z that is not additive over the sites."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes
        self.weight = nn.Parameter(torch.tensor([0.9, -0.7, 0.4, 1.1, 0.3, -0.5], dtype=torch.float64))

    def forward(self, z):
        flat = (z / 2).tanh().flatten(-self.axes)
        return (flat * self.weight[: flat.shape[-1]] + 0.2).sum(-1).sin() + flat.prod(-1)


class Given:
    """Stands in for `uniform`: z's noise at the first call, that of z' at the second; and again."""

    def __init__(self, *noise):
        self.noise, self.calls = noise, 0

    def __call__(self, shape, like):
        values = self.noise[self.calls % len(self.noise)]
        self.calls += 1
        return values.expand(shape)


def bernoulli_cell(p, t, b):
    """The uniform of z in the cell of the hard value b, at t of its width."""
    return torch.where(b > 0, 1 - p * (1 - t), (1 - p) * t)


def mean_over_cells(given, monkeypatch, estimator, sample, h, reach, middle=0.4):
    """The expected value and gradients, `A(z) + B(b, z')` integrated one after the other.

    `sample(b, t)` makes the estimator see the hard value b and z at t of its cell.
    """
    outcomes = coordinates(*[given.values] * given.logits.shape[1])
    sites = given.logits.shape[1]
    dimension = sites if given.family is Bernoulli else sites * given.values
    nodes, weight = grid(dimension, h, reach)
    shape = (-1, 1, *given.logits.shape[1:])
    log_p = given.logits if given.family is not Bernoulli else torch.stack((0 * given.logits, given.logits), -1)
    log_p = log_p.log_softmax(-1)
    total, gradients = torch.zeros(2, dtype=torch.float64), None
    held = torch.full((1, 1, *given.logits.shape[1:]), middle, dtype=torch.float64)

    def part(b, z_noise, again_noise, weight):
        tuples = max(len(z_noise), len(again_noise))
        sample(b, z_noise.expand(tuples, 2, *given.logits.shape[1:]), again_noise)
        return expected(given, weight.unsqueeze(-1).expand(tuples, 2), estimator)

    for b in outcomes:
        probability = torch.stack([log_p[:, d, b[d]] for d in range(sites)]).sum(0).exp()
        one = torch.ones(1, dtype=torch.float64)
        parts = [
            (1, part(b, nodes.reshape(shape), held, weight)),
            (1, part(b, held, nodes.reshape(shape), weight)),
            (-1, part(b, held, held, one)),
        ]
        for sign, (value, grads) in parts:
            total = total + sign * probability * value
            scaled = [sign * probability.reshape((2,) + (1,) * (g.ndim - 1)) * g for g in grads]
            gradients = scaled if gradients is None else [a + g for a, g in zip(gradients, scaled, strict=True)]
    return total, gradients


def check(given, total, gradients, tolerance):
    value, truth = given.truth(PSI)
    assert (total - value).abs().max() < tolerance
    for ours, true in zip(gradients, truth, strict=True):
        assert (ours - true).abs().max() < tolerance, (ours - true).abs().max()


def hard_point(given, b):
    return one_hot(b, given.values).double() if given.family is OneHotCategorical else given.point(b)


def gumbel_uniform(given, b, t):
    """The uniforms of Gumbel noise that decide for b, at t of the conditional law: truncated Gumbels, anew."""
    log_p = given.logits.log_softmax(-1)
    e = -t.log()
    hard = one_hot(b, given.values).double()
    top = (hard * e).sum(-1, keepdim=True)
    e_of_z = torch.where(hard > 0, top, e / log_p.exp() + top)  # exp(-z)
    return (-(e_of_z * log_p.exp())).exp().clamp(max=1 - 2**-53)


def rebar_sampler(monkeypatch, given):
    def sample(b, z_noise, again_noise):
        if given.family is Bernoulli:
            first = bernoulli_cell(given.logits.sigmoid(), z_noise, b)
        else:
            first = gumbel_uniform(given, b, z_noise)
        monkeypatch.setattr(relaxed, "uniform", Given(first, again_noise))

    return sample


def relax_sampler(monkeypatch, given):
    def sample(b, z_noise, again_noise):
        monkeypatch.setattr(relaxed, "uniform", Given(z_noise, again_noise))
        monkeypatch.setattr(
            given.family,
            "sample",
            lambda self, shape: hard_point(given, b).expand(1, *self.batch_shape, *self.event_shape).clone(),
        )

    return sample
