"""Local expectations: every tuple of base draws is enumerated."""

from itertools import product

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

import scorefn as sf
from tests.estimators.certificates import PROBLEMS, at, check_unbiased
from tests.test_anchors import CUBE, close, doubles, moments, squared_error, three_coins

SMALL = [name for name in PROBLEMS if len(PROBLEMS[name].points) <= 4]


def of_base(estimator, p, base):
    """What the estimator makes of these base draws."""
    p.sample = lambda shape: base
    x = estimator.sample(p)
    del p.sample
    return x


def certificate(problem, estimator):
    log_prob = problem.log_prob(problem.theta)
    number = torch.tensor(list(product(range(len(problem.points)), repeat=estimator.num_samples))).T

    def estimate(theta, c):
        p = problem.build(theta)
        x = of_base(estimator, p, at(problem, number.unsqueeze(-1).expand(*number.shape, 2)))
        return estimator.surrogate(p, x, problem.f(x, c))

    check_unbiased(problem, estimate, log_prob.exp()[number].prod(0))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_mean_over_every_base_draw_is_exact(name):
    certificate(PROBLEMS[name], sf.LocalExpectation(1, PROBLEMS[name].batch_ndim))


@pytest.mark.parametrize("name", SMALL)
def test_the_mean_over_every_pair_of_base_draws_is_exact(name):
    certificate(PROBLEMS[name], sf.LocalExpectation(2, PROBLEMS[name].batch_ndim))


@pytest.mark.parametrize("name", ["Independent Bernoulli", "Independent Categorical"])
def test_a_wrong_base_value_is_seen(monkeypatch, name):
    original = sf.LocalExpectation._estimate
    monkeypatch.setattr(
        sf.LocalExpectation,
        "_estimate",
        lambda self, sites, base, changed, fx: (
            original(self, sites, 0 * base, changed, fx)
            if name == "Independent Bernoulli"
            else original(self, sites, base, changed.flip(-1), fx)
        ),
    )
    with pytest.raises(AssertionError):
        certificate(PROBLEMS[name], sf.LocalExpectation(1))


@pytest.mark.parametrize(
    "p",
    [
        Bernoulli(torch.full((3, 4), 0.4)),
        Independent(Bernoulli(torch.full((3, 2, 2), 0.4)), 2),
        Categorical(torch.ones(3, 4, 3)),
        Independent(OneHotCategorical(torch.ones(3, 4, 3)), 1),
    ],
)
def test_each_variant_changes_one_site_to_each_other_value(p):
    n, D = 2, 4
    estimator = sf.LocalExpectation(n, batch_ndim=1)
    x = estimator.sample(p)
    unit = p.base_dist if isinstance(p, Independent) else p
    index = x.argmax(-1) if isinstance(unit, OneHotCategorical) else x.long()
    steps = 1 if isinstance(unit, Bernoulli) else 2
    assert x.shape == (n * (1 + D * steps), *p.batch_shape, *p.event_shape)
    index = index.reshape(len(x), 3, D)
    variants = index[n:].reshape(n, D, steps, 3, D)
    for s, d in product(range(n), range(D)):
        others = [e for e in range(D) if e != d]
        assert (variants[s, d][..., others] == index[s][:, others]).all()
        values = torch.cat((index[s, :, d][None], variants[s, d, :, :, d]))
        assert (values.sort(0).values == torch.arange(steps + 1)[:, None]).all()
    p.log_prob(x)
    weights = estimator.weights(p, x)
    assert weights.shape == (len(x), 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(3))


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1, 0.05])
def test_one_bernoulli_has_no_variance(p):
    logit = torch.logit(doubles(p)).expand(2).clone().requires_grad_()
    q, estimator = Bernoulli(logits=logit), sf.LocalExpectation(batch_ndim=1)
    x = of_base(estimator, q, doubles([[0.0, 1.0]]))
    value = estimator.surrogate(q, x, (x - 0.45).square())
    for found, right in ((value, p * 0.55**2 + (1 - p) * 0.45**2), (torch.autograd.grad(value.sum(), logit)[0], None)):
        for each in found.detach():
            assert close(each, p * (1 - p) * 0.1 if right is None else right)


@pytest.mark.parametrize("eta", [0.0, -4.0])
def test_an_additive_function_has_no_variance(eta):
    own = doubles(eta).expand(8).clone().requires_grad_()
    p, estimator = three_coins(own), sf.LocalExpectation()
    x = of_base(estimator, p, CUBE.unsqueeze(0))
    gradient = torch.autograd.grad(estimator.surrogate(p, x, squared_error(x)).sum(), own)[0]
    right = torch.sigmoid(doubles(eta)) * torch.sigmoid(-doubles(eta)) * (3 - 2 * 1.59)
    assert all(close(each, right) for each in gradient)


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_the_variance_of_a_product_of_two_coins(p):
    """The derivative at one coin is p q times the other coin, whose variance is p q."""
    own = torch.logit(doubles(p)).expand(4, 2).clone().requires_grad_()
    q, estimator = Independent(Bernoulli(logits=own), 1), sf.LocalExpectation()
    base = doubles([[0, 0], [0, 1], [1, 0], [1, 1]])
    x = of_base(estimator, q, base.unsqueeze(0))
    gradient = torch.autograd.grad(estimator.surrogate(q, x, x.prod(-1)).sum(), own)[0]
    weight = (p**base * (1 - p) ** (1 - base)).prod(-1)
    mean, variance = moments(weight, gradient)
    for i in range(2):
        assert close(mean[i], p * p * (1 - p))
        assert close(variance[i], (p * (1 - p)) ** 3)


def test_both_phases_are_the_call():
    logits = torch.randn(3, 4, 5, requires_grad=True, dtype=torch.float64)
    p, estimator = Independent(Categorical(logits=logits), 1), sf.LocalExpectation(2)

    def f(x):
        return (x.cumsum(-1).sum(-1) % 7).double()

    torch.manual_seed(3)
    once = estimator(p, f)
    torch.manual_seed(3)
    x = estimator.sample(p)
    twice = estimator.surrogate(p, x, f(x))
    assert once.shape == (3,)
    assert torch.equal(once, twice)
    assert torch.equal(*[torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (once, twice)])
    torch.testing.assert_close((estimator.weights(p, x) * f(x)).sum(0), once.detach(), rtol=1e-12, atol=1e-12)


def test_a_site_with_one_value_is_served():
    p = Categorical(logits=torch.zeros(3, 1, requires_grad=True))
    assert sf.LocalExpectation(2)(p, lambda x: x.sum(-1) + 1.5).item() == 1.5


@pytest.mark.parametrize("size", [0.0, 30.0, 200.0, torch.inf])
def test_no_nan_in_single_precision(size):
    wide = torch.tensor([size, -size, 0.3], requires_grad=True)
    sf.LocalExpectation(2)(Bernoulli(logits=wide), lambda x: x.prod(-1) + x.sum(-1)).backward()
    assert torch.isfinite(wide.grad).all()
    logits = torch.tensor([[0.0, -size, 1.0], [-size, 0.0, -size]], requires_grad=True)
    sf.LocalExpectation(2)(Categorical(logits=logits), lambda x: x.prod(-1).float()).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.LocalExpectation(0), sf.ScorefnError, "num_samples must be an integer of at least 1.*0"),
        (lambda: sf.LocalExpectation(batch_ndim=0.5), sf.ScorefnError, "batch_ndim=0.5"),
        (
            lambda: sf.LocalExpectation()(Normal(torch.zeros(3), 1.0), lambda x: x.sum(-1)),
            sf.ScorefnError,
            "LocalExpectation does not serve Normal",
        ),
        (
            lambda: sf.LocalExpectation(2**10)(Bernoulli(torch.full((2**10,), 0.5)), lambda x: x.sum(-1)),
            sf.ScorefnError,
            "1049600 points.*1024 values|1049600 points.*D = 1024.*1048576",
        ),
        (lambda: sf.LocalExpectation()(Bernoulli(torch.zeros(0)), lambda x: x.sum(-1)), sf.ScorefnError, "size 0"),
        (
            lambda: sf.LocalExpectation()(Bernoulli(torch.full((3,), 0.5)), lambda x: x),
            sf.ShapeError,
            r"LocalExpectation\(\.\.\., batch_ndim=1\)",
        ),
        (
            lambda: sf.LocalExpectation().surrogate(Bernoulli(torch.ones(3)), torch.ones(3, 3), torch.ones(3)),
            sf.ShapeError,
            "3 points.*makes 4",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
