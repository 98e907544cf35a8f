"""Which families are accepted as they are, and right; which supports move, and are refused."""

import pytest
import torch
import torch.distributions as td
from torch.distributions import transforms as tr

import scorefn as sf
from tests.core.families import FAMILIES, double_exponential, integrated

pytestmark = pytest.mark.usefixtures("float64")
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
