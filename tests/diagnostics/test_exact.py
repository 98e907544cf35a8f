"""Exact expectations against sums and moments written out by hand; what cannot be integrated is refused."""

import itertools
import math

import pytest
import torch
import torch.distributions as td

import scorefn as sf
from scorefn.diagnostics import exact_expectation, exact_gradient

pytestmark = pytest.mark.usefixtures("float64")


def parameter(*values):
    return torch.tensor(values).requires_grad_()


def agrees(found, right, *parameters, second=True):
    """Value, gradient and second derivative."""
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-11)
    first = [torch.autograd.grad(v.sum(), parameters, create_graph=True) for v in (found, right)]
    for one, other in zip(*first, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        assert other.abs().max() > 1e-3
    if second:
        level = [torch.autograd.grad(sum(g.square().sum() for g in gs), parameters, retain_graph=True) for gs in first]
        for one, other in zip(*level, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_bernoulli_batch():
    theta = parameter(0.3, -0.2, 1.1)
    right = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=3):
        x = torch.tensor(bits)
        right = right + torch.where(x > 0, theta.sigmoid(), 1 - theta.sigmoid()).prod() * (x.sum() ** 2 + x[0] * x[2])
    p = td.Bernoulli(logits=theta)
    for measure in (p, td.Independent(p, 1)):
        found = exact_expectation(measure, lambda x: x.sum(-1) ** 2 + x[:, 0] * x[:, 2])
        assert found.shape == ()
        agrees(found, right, theta)


def test_independent_problems_keep_their_axes():
    theta = torch.randn(2, 3).requires_grad_()
    c = torch.tensor([1.0, 2.0, 4.0])
    q = theta.sigmoid()
    agrees(exact_expectation(td.Bernoulli(logits=theta), lambda x: (x + 1) ** 3), 1 + 7 * q, theta)
    agrees(exact_expectation(td.Bernoulli(logits=theta), lambda x: x @ c), q @ c, theta, second=True)


def test_categorical():
    theta = torch.randn(2, 3).requires_grad_()
    table = torch.randn(3, 3)
    p = theta.softmax(-1)
    right = torch.einsum("i,j,ij->", p[0], p[1], table)
    agrees(exact_expectation(td.Categorical(logits=theta), lambda x: table[x[:, 0], x[:, 1]]), right, theta)


def test_one_hot_categorical():
    theta = torch.randn(2, 3).requires_grad_()
    table = torch.randn(3, 3)
    right = torch.einsum("i,j,ij->", *theta.softmax(-1), table)

    def f(x):
        return torch.einsum("ni,nj,ij->n", x[:, 0], x[:, 1], table)

    agrees(exact_expectation(td.OneHotCategorical(logits=theta), f), right, theta)
    agrees(exact_expectation(td.Independent(td.OneHotCategorical(logits=theta), 1), f), right, theta)


def test_binomial():
    theta = parameter(0.3, -0.7)
    q = theta.sigmoid()
    found = exact_expectation(td.Binomial(4, logits=theta), lambda x: x**2)
    agrees(found, 4 * q * (1 - q) + 16 * q**2, theta)


def test_mixtures():
    weights, theta, logits = torch.randn(2).requires_grad_(), torch.randn(2, 3).requires_grad_(), parameter(0.4, -1.0)
    mixture = td.MixtureSameFamily(td.Categorical(logits=weights), td.Categorical(logits=theta))
    c = torch.tensor([1.0, -2.0, 5.0])
    agrees(exact_expectation(mixture, lambda x: c[x]), weights.softmax(-1) @ theta.softmax(-1) @ c, weights, theta)
    mixture = td.MixtureSameFamily(td.Categorical(logits=weights), td.Bernoulli(logits=logits))
    right = 2 + 3 * weights.softmax(-1) @ logits.sigmoid()
    agrees(exact_expectation(mixture, lambda x: 2 + 3 * x), right, weights, logits)


def test_a_users_measure_with_its_support():
    class Coins:
        def __init__(self, theta):
            self.theta = theta

        def enumerate_support(self):
            return {"first": torch.tensor([0.0, 0.0, 1.0, 1.0]), "second": torch.tensor([0.0, 1.0, 0.0, 1.0])}

        def log_prob(self, x):
            first = td.Bernoulli(logits=self.theta[0]).log_prob(x["first"])
            return first + td.Bernoulli(logits=self.theta[1] + x["first"]).log_prob(x["second"])

    theta = parameter(0.3, -0.2)
    q = theta[0].sigmoid()
    right = q + 2 * (q * (theta[1] + 1).sigmoid() + (1 - q) * theta[1].sigmoid())
    agrees(exact_expectation(Coins(theta), lambda x: x["first"] + 2 * x["second"]), right, theta)


@pytest.mark.parametrize("power", range(1, 7))
def test_moments_of_a_normal(power):
    """E (m + s z)^k by the binomial theorem."""
    m, s = torch.tensor(0.7, requires_grad=True), torch.tensor(1.3, requires_grad=True)
    right = sum(
        math.comb(power, k) * m ** (power - k) * s**k * math.prod(range(1, k, 2)) for k in range(0, power + 1, 2)
    )
    found = exact_expectation(td.Normal(m, s), lambda x: x**power, nodes=20)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    for one, other in zip(*(exact_or_none(v, (m, s)) for v in (found, right)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def exact_or_none(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_normals_of_several_dimensions(dimensions):
    m, c = torch.randn(dimensions).requires_grad_(), torch.randn(dimensions)
    leaf = (torch.eye(dimensions) + 0.3 * torch.randn(dimensions, dimensions)).requires_grad_()
    a = leaf.tril()
    s = torch.rand(dimensions).add(0.5).requires_grad_()

    def f(x):
        return (x @ c) ** 3 + x.square().sum(-1)

    def right(variance, trace):
        mu = m @ c
        return mu**3 + 3 * mu * variance + m.square().sum() + trace

    full = td.MultivariateNormal(m, scale_tril=a)
    agrees(exact_expectation(full, f, nodes=12), right((c @ a).square().sum(), a.square().sum()), m, leaf)
    joint = td.Independent(td.Normal(m, s), 1)
    agrees(exact_expectation(joint, f, nodes=12), right((c * s).square().sum(), s.square().sum()), m, s)
    agrees(exact_expectation(td.Normal(m, s), f, nodes=12), right((c * s).square().sum(), s.square().sum()), m, s)
    torch.testing.assert_close(exact_expectation(td.Normal(m, s), lambda x: x**2, nodes=12), m**2 + s**2)


def test_a_shared_scale_and_a_smooth_f():
    m = parameter(0.2, -0.5)
    found = exact_expectation(td.Normal(m, 0.8), lambda x: x.cos())
    agrees(found, m.cos() * math.exp(-0.32), m)


def test_the_pathwise_part_is_differentiated_too():
    theta, c = parameter(0.3, -0.2), torch.tensor(2.0, requires_grad=True)
    found = exact_expectation(td.Bernoulli(logits=theta), lambda x: (c * x).sum(-1) ** 2)
    q = theta.sigmoid()
    right = c**2 * (q.sum() + 2 * q.prod())
    agrees(found, right, theta, c)


def test_exact_gradient_sums_over_the_problems_and_fills_with_zeros():
    theta, other = torch.randn(2, 3).requires_grad_(), parameter(1.0, 2.0)
    p = td.Bernoulli(logits=theta)
    found = exact_gradient(p, lambda x: x**2 * 3, [theta, other])
    q = theta.sigmoid().detach()
    torch.testing.assert_close(found[0], 3 * q * (1 - q), rtol=1e-12, atol=1e-14)
    assert torch.equal(found[1], torch.zeros(2))
    (alone,) = exact_gradient(p, lambda x: x**2 * 3, theta)
    assert torch.equal(alone, found[0])
    assert theta.grad is None


def test_f_is_called_once_and_sees_every_joint_value():
    theta = torch.zeros(4).requires_grad_()
    seen = []

    def f(x):
        seen.append(x)
        return x.sum(-1)

    exact_expectation(td.Bernoulli(logits=theta), f)
    assert len(seen) == 1
    assert sorted(map(tuple, seen[0].tolist())) == sorted(itertools.product([0.0, 1.0], repeat=4))


def test_it_is_the_mean_of_the_estimator():
    """One draw, each value of x in turn, weighted by its probability: the estimator's own mean."""
    theta = parameter(0.3, -0.2, 0.8)
    p = td.Bernoulli(logits=theta)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))

    def f(x):
        return (x @ torch.tensor([1.0, 2.0, 4.0])) ** 2

    log_prob = p.log_prob(x).sum(-1, keepdim=True)
    draws = sf.Draws(x, log_prob, f(x).unsqueeze(-1))
    found = torch.autograd.grad((log_prob.detach().exp().squeeze(-1) * sf.surrogate(draws)).sum(), theta)[0]
    torch.testing.assert_close(found, exact_gradient(p, f, theta)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (lambda: td.Bernoulli(logits=torch.zeros(21)), r"2\^21"),
        (lambda: td.Categorical(logits=torch.zeros(2, 2000)[None].expand(2, 2, 2000)), r"2000\^4"),
        (lambda: td.Normal(torch.zeros(4), 1.0), r"1 to 3.*4"),
        (lambda: td.Normal(torch.zeros(2, 2), 1.0), r"1 to 3.*4"),
        (lambda: td.MultivariateNormal(torch.zeros(4), torch.eye(4)), r"1 to 3.*4"),
        (lambda: td.MultivariateNormal(torch.zeros(2, 2), torch.eye(2)), "batch"),
        (lambda: td.Poisson(torch.tensor(1.0)), "Poisson.*finite"),
        (lambda: td.Gamma(torch.tensor(1.0), 1.0), "Gamma.*finite"),
        (lambda: td.Geometric(torch.tensor(0.5)), "Geometric.*finite"),
        (lambda: td.MixtureSameFamily(td.Categorical(torch.ones(2)), td.Normal(torch.zeros(2), 1.0)), "finite"),
        (lambda: object(), "object.*finite"),
        (lambda: td.Binomial(torch.tensor([1, 2]), logits=torch.zeros(2)), "Binomial"),
        (lambda: None, "NoneType"),
    ],
)
def test_what_cannot_be_integrated_is_refused(p, reason):
    with pytest.raises(sf.ScorefnError, match=f"{reason}.*|.*cannot.*{reason}"):
        exact_expectation(p(), lambda x: x.sum(-1))


def test_f_of_the_wrong_shape_is_refused():
    with pytest.raises(sf.ShapeError, match=r"\(8, 1\)"):
        exact_expectation(td.Bernoulli(logits=torch.zeros(3)), lambda x: x.sum(-1, keepdim=True))


def test_a_gradient_of_nothing_is_refused():
    with pytest.raises(sf.ScorefnError, match="require grad"):
        exact_gradient(td.Bernoulli(logits=torch.zeros(3)), lambda x: x.sum(-1), torch.zeros(3))


def test_single_precision_stays_single():
    theta = torch.zeros(2, dtype=torch.float32, requires_grad=True)
    assert exact_expectation(td.Bernoulli(logits=theta), lambda x: x.sum(-1)).dtype == torch.float32
    found = exact_expectation(td.Normal(theta, torch.ones(2, dtype=torch.float32)), lambda x: x**2)
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float32))


def test_a_mixture_of_joint_components_is_enumerated():
    weights = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    probs = torch.tensor([[0.2, 0.7], [0.6, 0.1]], dtype=torch.float64)
    components = torch.distributions.Independent(torch.distributions.Bernoulli(probs), 1)
    p = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), components)

    def f(x):
        return x[..., 0] * 2 + x[..., 0] * x[..., 1]

    by_hand = (weights.softmax(0) * (2 * probs[:, 0] + probs[:, 0] * probs[:, 1])).sum()
    torch.testing.assert_close(sf.diagnostics.exact_expectation(p, f), by_hand)
    torch.testing.assert_close(
        sf.diagnostics.exact_gradient(p, f, weights)[0], torch.autograd.grad(by_hand, weights)[0]
    )
