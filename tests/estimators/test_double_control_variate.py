"""DoubleControlVariate: every tuple of draws enumerated, no variance where f is linear, refusals."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, OneHotCategorical, Poisson

import scorefn as sf
from tests.estimators.discrete_problems import check_exact, problem
from tests.oracles.toys import coordinates


def enumerated(monkeypatch, given, K):
    """The weight `[T, B]` of each K-tuple of joint draws, which `sample` of the family now gives out."""
    sites, values = given.logits.shape[1], given.values
    points = coordinates(*[values] * sites)
    choice = coordinates(*[len(points)] * K).T  # [K, T]
    index = points[choice].unsqueeze(2).expand(-1, -1, 2, -1)  # [K, T, B, D]
    log_p = given.logits
    if given.family is Bernoulli:
        log_p = torch.stack((torch.zeros_like(log_p), log_p), -1)
    log_p = log_p.log_softmax(-1).expand(*index.shape, values)
    weight = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1).sum((0, -1)).exp()
    monkeypatch.setattr(given.family, "sample", lambda self, shape: given.point(index).clone())
    return weight


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical])
@pytest.mark.parametrize(("K", "sites"), [(2, 1), (2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("alpha", [1.0, 0.0, -0.6])
def test_it_is_exact(monkeypatch, family, K, sites, alpha):
    given = problem(family, sites, joined=sites == 1)
    check_exact(given, enumerated(monkeypatch, given, K), sf.DoubleControlVariate(K, alpha))


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical])
@pytest.mark.parametrize("K", [2, 4])
def test_without_the_gradients_it_is_leave_one_out(family, K):
    given = problem(family, 2)
    logits = given.logits.requires_grad_()
    psi = torch.tensor([0.7, -0.4], dtype=torch.float64)
    torch.manual_seed(3)
    p = given.distribution(logits)
    ours = sf.DoubleControlVariate(K, alpha=0.0)(p, lambda x: given.f(x, psi, logits)).sum()
    torch.manual_seed(3)
    p = given.distribution(logits)
    other = sf.expectation(p, lambda x: given.f(x, psi, logits), K, baseline=sf.LeaveOneOut()).sum()
    assert (ours - other).abs() < 1e-14
    one, two = (torch.autograd.grad(value, logits)[0] for value in (ours, other))
    assert (one - two).abs().max() < 1e-13


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1])
def test_anchor_c_has_no_variance(p):
    """f is linear on {0, 1}: extended along that line, the expansion around any draw is f itself."""
    D, t = 200, 0.499
    logits = torch.full((64, D), p, dtype=torch.float64).logit().requires_grad_()
    q = Independent(Bernoulli(logits=logits), 1)
    value = sf.DoubleControlVariate(2)(q, lambda x: ((1 - 2 * t) * x + t**2).mean(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    truth = (1 - 2 * t) / D * p * (1 - p)
    assert ((gradient / truth - 1).abs() < 1e-8).all()


def test_a_quadratic_extension_has_the_variance_of_its_formula():
    """One coin, f = (x - t)^2, K = 2, by hand: slopes differ at 0 and 1, so the extension matters."""
    p, t = 0.3, 0.45
    x = coordinates(2, 2).double().T.requires_grad_()
    weight = torch.tensor([0.49, 0.21, 0.21, 0.09], dtype=torch.float64)
    logit = torch.full((4,), p, dtype=torch.float64).logit().requires_grad_()
    value = sf.DoubleControlVariate(2).surrogate(Bernoulli(logits=logit), x, (x - t).square())
    (gradient,) = torch.autograd.grad(value.sum(), logit)
    slope = [-2 * t, 2 - 2 * t]
    f = [t**2, (1 - t) ** 2]
    for k, (a, b) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        one = (f[a] - f[b] - slope[b] * (a - b)) * (a - p)
        two = (f[b] - f[a] - slope[a] * (b - a)) * (b - p)
        assert abs(gradient[k] - ((one + two) / 2 + (slope[a] + slope[b]) / 2 * p * (1 - p))) < 1e-14
    assert abs((weight * gradient).sum() - p * (1 - p) * (1 - 2 * t)) < 1e-14


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical])
def test_extremes_in_float32(family):
    logits = torch.tensor([-100.0, 100.0, -40.0, 40.0], requires_grad=True)
    unit = Bernoulli(logits=logits) if family is Bernoulli else family(logits=torch.stack((logits, -logits), -1))
    x = sf.DoubleControlVariate(3).sample(Independent(unit, 1))
    assert x.requires_grad
    value = sf.DoubleControlVariate(3).surrogate(Independent(unit, 1), x, (3 * x).flatten(1).sum(-1).sin())
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient.abs() < 1e-15).all()


def coin(shape=(3,)):
    return Bernoulli(logits=torch.zeros(shape, requires_grad=True))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x > 0.5).sum(-1),
        lambda x: x.detach().sum(-1),
        lambda x: x.long().sum(-1).float(),
        lambda x: torch.ones(len(x), requires_grad=True) * 2,
    ],
)
def test_values_without_a_slope_are_refused(f):
    with pytest.raises(sf.ScorefnError, match="does not depend on x differentiably: f is constant in x"):
        sf.DoubleControlVariate(2)(coin(), f)


def test_a_copy_of_the_draws_is_refused():
    x = sf.DoubleControlVariate(2).sample(coin()).detach()
    with pytest.raises(sf.ScorefnError, match=r"x does not require grad: pass what sample\(p\) returned"):
        sf.DoubleControlVariate(2).surrogate(coin(), x, x.sum(-1))


def test_an_infinite_slope_is_refused():
    with pytest.raises(sf.NonFiniteError, match="The gradient of f is .* at draw"):
        sf.DoubleControlVariate(2)(coin((200,)), lambda x: x.sqrt().sum(-1))


@pytest.mark.parametrize("p", [Categorical(logits=torch.zeros(3)), Poisson(torch.ones(3))])
def test_other_families_are_refused(p):
    with pytest.raises(sf.ScorefnError, match="it serves Bernoulli, OneHotCategorical"):
        sf.DoubleControlVariate(2).sample(p)


def test_bad_settings_are_refused():
    with pytest.raises(sf.ScorefnError, match="num_samples=1 leaves no other draw"):
        sf.DoubleControlVariate(1)
    with pytest.raises(sf.ScorefnError, match="num_samples must be an integer"):
        sf.DoubleControlVariate(2.0)
    for alpha in (float("nan"), float("inf"), "1", True, None):
        with pytest.raises(sf.ScorefnError, match="alpha must be a finite number"):
            sf.DoubleControlVariate(2, alpha)


def test_value_cost_and_no_grad():
    p, estimator = coin(), sf.DoubleControlVariate(3)
    assert estimator.evaluations == 3
    assert estimator.unbiased
    x = estimator.sample(p)
    fx = x.sum(-1)
    assert torch.equal(estimator.surrogate(p, x, fx), fx.mean(0))
    with torch.no_grad():
        assert not estimator(p, lambda x: x.sum(-1)).requires_grad
        assert not estimator.sample(p).requires_grad
    assert repr(estimator) == "DoubleControlVariate(3, alpha=1.0)"
