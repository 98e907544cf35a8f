"""Which distributions are accepted, that their gradients are right, and which are refused.

Nothing is sampled: a coupling hands the nodes of a quadrature, or all points of a finite support, to the estimator as
its draws; f carries the weights. So what is integrated is the estimator itself, with its own log_prob.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch.distributions import transforms as tr

import scorefn as sf

pytestmark = pytest.mark.usefixtures("float64")


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

APPROXIMATE = {"VonMises": 1e-6}  # torch's own series for the Bessel functions has seven digits


@pytest.mark.parametrize("family", FAMILIES, ids=[family[0] for family in FAMILIES])
def test_accepted_and_right(family):
    name, start, make, nodes, f, truth = family
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start]
    p = make(*parameters)
    estimate, exact = integrated(p, f, *nodes(p)), truth(*parameters)
    close = {"rtol": APPROXIMATE.get(name, 1e-8), "atol": APPROXIMATE.get(name, 1e-9)}
    torch.testing.assert_close(estimate, exact, **close)
    found = torch.autograd.grad(estimate, parameters)
    for gradient, right in zip(found, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(gradient, right, **close)
        assert right.abs().max() > 1e-2  # a gradient of zero would prove nothing


@pytest.mark.parametrize("family", FAMILIES, ids=[family[0] for family in FAMILIES])
def test_accepted_when_sampled(family):
    """The quadrature above hands over its own draws; the distribution's own are scored as well."""
    _, start, make, _, f, _ = family
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start]
    value = sf.expectation(make(*parameters), f, 5)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, parameters))


def scale():
    return torch.tensor(1.5, requires_grad=True)


def pair():
    return torch.tensor([1.5, 2.5], requires_grad=True)


def uniforms(high):
    return td.Uniform(torch.zeros_like(high), high)


def transformed(base, *chain):
    return td.TransformedDistribution(base, list(chain))


def mixed(components):
    return td.MixtureSameFamily(td.Categorical(torch.ones(2)), components)


MOVING = [
    ("Uniform high", lambda: td.Uniform(0.0, scale())),
    ("Uniform low", lambda: td.Uniform(-scale(), 2.0)),
    ("Uniform, expanded", lambda: td.Uniform(0.0, scale()).expand((3,))),
    ("Pareto scale", lambda: td.Pareto(scale(), torch.tensor(2.0))),
    ("Independent Uniform", lambda: td.Independent(uniforms(pair()), 1)),
    ("Mixture of Uniforms", lambda: mixed(uniforms(pair()))),
    ("Independent Mixture of Uniforms", lambda: td.Independent(mixed(uniforms(pair().expand(3, 2))), 1)),
    ("Uniform, scaled", lambda: transformed(td.Uniform(0.0, 1.0), tr.AffineTransform(0.0, scale()))),
    ("Uniform, shifted", lambda: transformed(td.Uniform(0.0, 1.0), tr.AffineTransform(scale(), 1.0))),
    ("Uniform, its base moving", lambda: transformed(td.Uniform(0.0, scale()), tr.ExpTransform())),
    ("Beta, scaled", lambda: transformed(td.Beta(1.5, 1.5), tr.AffineTransform(0.0, scale()))),
    ("Beta, shifted", lambda: transformed(td.Beta(1.5, 1.5), tr.AffineTransform(scale(), 1.0))),
    ("Exponential, shifted", lambda: transformed(td.Exponential(1.0), tr.AffineTransform(scale(), 1.0))),
    ("LogNormal, shifted", lambda: transformed(td.LogNormal(0.0, 1.0), tr.AffineTransform(scale(), 1.0))),
    ("Poisson, scaled", lambda: transformed(td.Poisson(1.5), tr.AffineTransform(0.0, scale()))),
    (
        "Normal, Sigmoid, scaled",
        lambda: transformed(td.Normal(0.0, scale()), tr.SigmoidTransform(), tr.AffineTransform(0.0, scale())),
    ),
    (
        "Normal, Sigmoid, shifted",
        lambda: transformed(td.Normal(0.0, 1.0), tr.SigmoidTransform(), tr.AffineTransform(scale(), 1.0)),
    ),
    (
        "Normal, Tanh, scaled",
        lambda: transformed(td.Normal(0.0, 1.0), tr.TanhTransform(), tr.AffineTransform(0.0, scale())),
    ),
    (
        "Normal, Exp, shifted, Log",
        lambda: transformed(
            td.Normal(0.0, 1.0), tr.ExpTransform(), tr.AffineTransform(scale(), 1.0), tr.ExpTransform().inv
        ),
    ),
    (
        "Uniform, composed",
        lambda: transformed(
            td.Uniform(0.0, 1.0), tr.ComposeTransform([tr.ExpTransform(), tr.AffineTransform(0.0, scale())])
        ),
    ),
    (
        "Uniform, composed and independent",
        lambda: transformed(
            td.Uniform(torch.zeros(2), 1.0),
            tr.IndependentTransform(tr.ComposeTransform([tr.AffineTransform(0.0, scale())]), 1),
        ),
    ),
    ("Uniform to a power", lambda: transformed(td.Uniform(1.0, 2.0), tr.PowerTransform(scale()))),
    ("Uniform, inverse scale", lambda: transformed(td.Uniform(0.0, 1.0), tr.AffineTransform(0.0, scale()).inv)),
    (
        "a chain on a chain",
        lambda: transformed(transformed(td.Uniform(1.0, 2.0), tr.ExpTransform()), tr.AffineTransform(0.0, scale())),
    ),
    (
        "a scale on a shift",
        lambda: transformed(
            transformed(td.Uniform(1.0, 2.0), tr.AffineTransform(0.0, 1.0)), tr.AffineTransform(0.0, scale())
        ),
    ),
    ("a Mixture of fixed Uniforms, scaled", lambda: transformed(mixed(uniforms(torch.ones(2))), affine())),
    (
        "a Mixture of Exponentials, shifted",
        lambda: transformed(mixed(td.Exponential(torch.ones(2))), tr.AffineTransform(scale(), 1.0)),
    ),
    (
        "Uniforms, one of them scaled",
        lambda: transformed(
            td.Uniform(torch.zeros(2), 1.0),
            tr.CatTransform([tr.AffineTransform(0.0, scale()), tr.AffineTransform(0.0, 1.0)], -1, [1, 1]),
        ),
    ),
    (
        "a simplex, scaled",
        lambda: transformed(td.Normal(torch.zeros(2), 1.0), tr.StickBreakingTransform(), affine()),
    ),
]


def affine():
    return tr.AffineTransform(0.0, scale())


@pytest.mark.parametrize("make", [case[1] for case in MOVING], ids=[case[0] for case in MOVING])
def test_a_support_that_moves_is_refused_before_f_is_called(make):
    p = make()

    def f(x):
        raise AssertionError("f was called")

    with pytest.raises(sf.SupportError, match=f"{type(p).__name__}.*[Dd]etach"):
        sf.expectation(p, f, 4)


@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), (torch.zeros(2, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))]
)
def test_a_support_that_stands_still_is_accepted(bounds):
    """A Uniform is no sinner by name: as the base of a chain its end points may be fixed or sent to infinity."""
    c = torch.tensor(1.5, requires_grad=True)
    p = transformed(td.Uniform(*bounds), tr.AffineTransform(0.0, 1.0))
    with torch.no_grad():
        assert sf.expectation(p, lambda x: x, 4).isfinite().all()
    chain = [tr.AffineTransform(0.0, 1 / bounds[1]), tr.SigmoidTransform().inv, tr.AffineTransform(c, c)]
    value = sf.expectation(transformed(td.Uniform(*bounds), *chain), lambda x: x, 4)
    assert torch.autograd.grad(value.sum(), c)[0].isfinite()


def test_a_distribution_may_be_used_again():
    """Transforms remember their inverses from the first use on."""
    m = torch.tensor(0.3, requires_grad=True)
    p = transformed(td.Normal(0.0, 1.0), tr.AffineTransform(m, 1.0), tr.ExpTransform())
    for _ in range(2):
        assert sf.expectation(p, lambda x: x, 4).requires_grad
    moving = transformed(td.Exponential(1.0), tr.AffineTransform(m, 1.0))
    moving.log_prob(moving.sample())
    with pytest.raises(sf.SupportError):
        sf.expectation(moving, lambda x: x, 4)


def test_why_a_moving_support_is_refused():
    """U(a, b) at (-1, 2), f = x^2: the score gives (1/3, -1/3), the gradient is (0, 1)."""
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x, weight = double_exponential("unit")
    x = -1 + 3 * x
    log_prob = -(high - low).log().expand(len(x))
    draws = sf.Draws(x, log_prob.unsqueeze(-1), (len(x) * weight * x**2).unsqueeze(-1))
    score = torch.autograd.grad(sf.surrogate(draws).mean(), (low, high))
    torch.testing.assert_close(torch.stack(score), torch.tensor([1 / 3, -1 / 3]), rtol=1e-8, atol=0.0)
    exact = torch.autograd.grad((high**3 - low**3) / (3 * (high - low)), (low, high))
    torch.testing.assert_close(torch.stack(exact), torch.tensor([0.0, 1.0]))


def test_a_transform_that_remembers_its_last_sample_keeps_its_gradient():
    """With cache_size=1 torch scores the sample it made through the cached inverse, which has no gradient."""
    location = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(1.2, requires_grad=True)

    def gradients(cache_size):
        torch.manual_seed(1)
        base = td.Normal(location, 1.0)
        p = td.TransformedDistribution(base, [tr.AffineTransform(location, scale, cache_size=cache_size)])
        return torch.autograd.grad(sf.expectation(p, lambda x: x.square(), 50), (location, scale))

    for remembered, fresh in zip(gradients(1), gradients(0), strict=True):
        torch.testing.assert_close(remembered, fresh)
