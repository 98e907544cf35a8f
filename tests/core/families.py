"""Every family of torch, with a rule that integrates it."""

import math

import numpy as np
import torch
import torch.distributions as td
from torch.distributions import transforms as tr

import scorefn as sf


def double_exponential(kind, steps=600, reach=3.3):
    """Nodes and weights of the tanh-sinh rule on (0, 1), (0, inf) or the real line."""
    t = torch.linspace(-reach, reach, steps, dtype=torch.float64)
    u, du = math.pi / 2 * t.sinh(), math.pi / 2 * t.cosh() * (t[1] - t[0])
    if kind == "unit":
        x, dx = torch.sigmoid(2 * u), 2 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)
        inside = (x > 1e-13) & (1 - x > 1e-13)
        return x[inside], (dx * du)[inside]
    x, dx = (u.exp(), u.exp()) if kind == "positive" else (u.sinh(), u.cosh())
    return x, dx * du


class Nodes:
    """A coupling that returns given draws."""

    unbiased = True

    def __init__(self, x):
        self.x = x

    def sample(self, p, num_samples):
        return self.x, None


def integrated(p, f, x, weight):
    """`expectation`, whose mean over the draws is turned into a weighted sum over p: value E f, gradient grad E f."""
    n = len(x)
    density = (p.log_prob(x).detach().exp() if weight is None else weight) * n
    return sf.expectation(p, lambda x: density * f(x), n, coupling=Nodes(x), baseline=None)


def on(kind, shift=0.0, scale=1.0):
    def nodes(p):
        x, weight = double_exponential(kind)
        x = shift + scale * x
        log_prob = p.log_prob(x).detach()
        seen = log_prob.isfinite()  # far out, some log-densities overflow
        return x[seen], (scale * weight * log_prob.exp())[seen]

    return nodes


def both_sides(middle):
    def nodes(p):
        x, weight = double_exponential("positive")
        x = torch.cat([middle - x, middle + x])
        return x, weight.repeat(2) * p.log_prob(x).detach().exp()

    return nodes


def counted(upto):
    return lambda p: (torch.arange(upto + 1.0), None)


def listed(*points):
    return lambda p: (torch.tensor(points, dtype=torch.float64), None)


def hermite(p):
    node, weight = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(12))
    z = torch.cartesian_prod(*[node] * p.event_shape[0])
    w = torch.cartesian_prod(*[weight / weight.sum()] * p.event_shape[0]).prod(-1)
    return (p.mean + z @ torch.linalg.cholesky(p.covariance_matrix).T).detach(), w


def simplex(p):
    x, weight = double_exponential("unit")
    x = torch.stack([x, 1 - x], -1)
    return x, weight * p.log_prob(x).detach().exp()


def cubic(mean, variance):
    return mean**3 + 3 * mean * variance


C2 = torch.tensor([0.5, -1.5], dtype=torch.float64)
C3 = torch.tensor([0.5, -1.5, 1.0], dtype=torch.float64)
LOWER = torch.tensor([[1.2, 0.0], [0.4, 0.7]], dtype=torch.float64)
FACTOR = torch.tensor([[0.3], [-0.6], [0.8]], dtype=torch.float64)
BELL = torch.tensor([0.5772156649015329], dtype=torch.float64)
COUNTS = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]


def lower(values):
    return LOWER * torch.stack([torch.stack([values[0], values[1]]), torch.stack([values[1], values[0]])])


def bessel_ratio(k):
    return torch.special.i1(k) / torch.special.i0(k)


def mixture(weights, means, scales):
    return td.MixtureSameFamily(td.Categorical(logits=weights), td.Normal(means, scales))


def mixture_mean_square(weights, means, scales):
    return (weights.softmax(-1) * (means**2 + scales**2)).sum()


# name, parameters, p, nodes, f, E f
FAMILIES = [
    ("Normal", (0.3, 0.8), td.Normal, on("line"), lambda x: x**3, lambda m, s: cubic(m, s**2)),
    ("Laplace", (0.3, 0.8), td.Laplace, both_sides(0.3), lambda x: x**2, lambda m, s: m**2 + 2 * s**2),
    (
        "Cauchy",
        (0.3, 0.8),
        td.Cauchy,
        on("line"),
        lambda x: 1 / (1 + x**2),
        lambda m, s: (1 + s) / ((1 + s) ** 2 + m**2),
    ),
    (
        "StudentT",
        (9.0, 0.3, 0.8),
        td.StudentT,
        on("line"),
        lambda x: x**2,
        lambda d, m, s: m**2 + s**2 * d / (d - 2),
    ),
    (
        "Gumbel",
        (0.3, 0.8),
        td.Gumbel,
        on("line"),
        lambda x: x**2,
        lambda m, s: (m + BELL[0] * s) ** 2 + (math.pi * s) ** 2 / 6,
    ),
    ("LogNormal", (0.3, 0.8), td.LogNormal, on("positive"), lambda x: x, lambda m, s: (m + s**2 / 2).exp()),
    (
        "Weibull",
        (1.3, 1.7),
        td.Weibull,
        on("positive"),
        lambda x: x**2,
        lambda scale, k: scale**2 * torch.lgamma(1 + 2 / k).exp(),
    ),
    ("Gamma", (1.3, 0.7), td.Gamma, on("positive"), lambda x: x**2, lambda a, b: a * (a + 1) / b**2),
    ("InverseGamma", (4.0, 0.7), td.InverseGamma, on("positive"), lambda x: x, lambda a, b: b / (a - 1)),
    ("Chi2", (3.0,), td.Chi2, on("positive"), lambda x: x**2, lambda d: d * (d + 2)),
    ("Exponential", (0.7,), td.Exponential, on("positive"), lambda x: x**2, lambda r: 2 / r**2),
    ("HalfNormal", (0.8,), td.HalfNormal, on("positive"), lambda x: x, lambda s: s * math.sqrt(2 / math.pi)),
    ("Beta", (1.3, 2.2), td.Beta, on("unit"), lambda x: x**2, lambda a, b: a * (a + 1) / ((a + b) * (a + b + 1))),
    (
        "Kumaraswamy",
        (1.3, 2.2),
        td.Kumaraswamy,
        on("unit"),
        lambda x: x,
        lambda a, b: b * (torch.lgamma(1 + 1 / a) + torch.lgamma(b) - torch.lgamma(1 + 1 / a + b)).exp(),
    ),
    (
        "VonMises",
        (0.3, 1.4),
        td.VonMises,
        on("unit", -math.pi, 2 * math.pi),
        torch.cos,
        lambda m, k: m.cos() * bessel_ratio(k),
    ),
    (
        "Pareto, fixed scale",
        (4.0,),
        lambda a: td.Pareto(torch.tensor(1.5), a),
        on("positive", 1.5),
        lambda x: x,
        lambda a: 1.5 * a / (a - 1),
    ),
    ("Dirichlet", ((1.3, 2.2),), td.Dirichlet, simplex, lambda x: x[:, 0], lambda a: a[0] / a.sum()),
    ("Poisson", (1.7,), td.Poisson, counted(80), lambda x: x**2, lambda r: r + r**2),
    ("Geometric", (0.3,), td.Geometric, counted(400), lambda x: x, lambda q: (1 - q) / q),
    (
        "NegativeBinomial",
        (0.4,),
        lambda q: td.NegativeBinomial(3.0, q),
        counted(200),
        lambda x: x,
        lambda q: 3 * q / (1 - q),
    ),
    (
        "Binomial",
        (0.4,),
        lambda q: td.Binomial(5, q),
        counted(5),
        lambda x: x**2,
        lambda q: 5 * q * (1 - q) + 25 * q**2,
    ),
    ("Bernoulli", (0.4,), td.Bernoulli, counted(1), lambda x: (x - 0.45) ** 2, lambda q: 0.45**2 + 0.1 * q),
    (
        "OneHotCategorical",
        ((0.1, -0.4, 0.7),),
        lambda a: td.OneHotCategorical(logits=a),
        listed((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        lambda x: x @ C3,
        lambda a: a.softmax(-1) @ C3,
    ),
    (
        "Multinomial",
        ((0.1, -0.4, 0.7),),
        lambda a: td.Multinomial(3, logits=a),
        listed(*COUNTS),
        lambda x: x[:, 0] * x[:, 1],
        lambda a: 6 * a.softmax(-1)[0] * a.softmax(-1)[1],
    ),
    (
        "MixtureSameFamily",
        ((0.1, -0.4), (-0.7, 1.1), (0.6, 0.9)),
        mixture,
        on("line"),
        lambda x: x**2,
        mixture_mean_square,
    ),
    (
        "MultivariateNormal",
        ((0.3, -0.2), (1.1, 0.6)),
        lambda m, s: td.MultivariateNormal(m, scale_tril=lower(s)),
        hermite,
        lambda x: (x @ C2) ** 3,
        lambda m, s: cubic(m @ C2, (C2 @ lower(s)).square().sum()),
    ),
    (
        "LowRankMultivariateNormal",
        ((0.3, -0.2, 0.5), (0.8, 0.9, 1.1), 0.7),
        lambda m, d, c: td.LowRankMultivariateNormal(m, c * FACTOR, d),
        hermite,
        lambda x: (x @ C3) ** 3,
        lambda m, d, c: cubic(m @ C3, (C3**2 * d).sum() + (c * C3 @ FACTOR).square().sum()),
    ),
    (
        "Independent Normal",
        ((0.3, -0.2), (0.7, 1.1)),
        lambda m, s: td.Independent(td.Normal(m, s), 1),
        lambda p: hermite(td.MultivariateNormal(p.mean, torch.diag_embed(p.variance))),
        lambda x: (x @ C2) ** 3,
        lambda m, s: cubic(m @ C2, (C2 * s).square().sum()),
    ),
    (
        "Normal under Affine",
        (0.3, 0.8),
        lambda m, s: td.TransformedDistribution(td.Normal(0.0, 1.0), [tr.AffineTransform(m, s)]),
        on("line"),
        lambda x: x**3,
        lambda m, s: cubic(m, s**2),
    ),
    (
        "Exponential, scaled",
        (0.7, 1.4),
        lambda r, c: td.TransformedDistribution(td.Exponential(r), [tr.AffineTransform(0.0, c)]),
        on("positive"),
        lambda x: x**2,
        lambda r, c: 2 * (c / r) ** 2,
    ),
    (
        "Normal under Exp and a scale",
        (0.3, 0.8, 1.4),
        lambda m, s, c: td.TransformedDistribution(td.Normal(m, s), [tr.ExpTransform(), tr.AffineTransform(1.0, c)]),
        on("positive", 1.0),
        lambda x: x,
        lambda m, s, c: 1 + c * (m + s**2 / 2).exp(),
    ),
    (
        "Normal under Affine and Exp",
        (0.3, 0.8),
        lambda m, s: td.TransformedDistribution(td.Normal(0.0, 1.0), [tr.AffineTransform(m, s), tr.ExpTransform()]),
        on("positive"),
        lambda x: x.log() ** 2,
        lambda m, s: m**2 + s**2,
    ),
    (
        "Normal under Sigmoid",
        (0.3, 0.8),
        lambda m, s: td.TransformedDistribution(td.Normal(m, s), [tr.SigmoidTransform()]),
        on("unit"),
        lambda x: torch.logit(x) ** 2,
        lambda m, s: m**2 + s**2,
    ),
    (
        "Uniform under a power",
        (1.5,),
        lambda c: td.TransformedDistribution(td.Uniform(0.0, 1.0), [tr.PowerTransform(c)]),
        on("unit"),
        lambda x: x,
        lambda c: 1 / (1 + c),
    ),
    (
        "the logistic, from a Uniform",
        (0.3, 0.8),
        lambda m, s: td.TransformedDistribution(
            td.Uniform(0.0, 1.0), [tr.SigmoidTransform().inv, tr.AffineTransform(m, s)]
        ),
        on("line", 0.0, 0.2),
        lambda x: x**2,
        lambda m, s: m**2 + (math.pi * s) ** 2 / 3,
    ),
]
