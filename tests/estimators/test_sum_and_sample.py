"""Sum and sample: every tuple of draws from the rest is enumerated."""

from itertools import product

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf
from tests.estimators.certificates import PROBLEMS, at, check_unbiased
from tests.test_anchors import close, doubles, moments

CASES = [
    (name, k, m)
    for name, problem in PROBLEMS.items()
    for k, m in [(1, 1), (1, 2), (2, 1), (1, 3), (5, 2)]
    if k + m < len(problem.points)
]


def numbers(log_prob, k, m):
    """The k most probable `[S, 2]`, with every tuple of the others: `[k + m, T, 2]`, and the tuple's probability."""
    order = log_prob.argsort(0, descending=True)
    rest = order[k:]
    tuples = torch.tensor(list(product(range(len(rest)), repeat=m))).T
    number = torch.cat((order[:k, None].expand(k, tuples.shape[1], 2), rest[tuples]))
    weight = log_prob.gather(0, rest).softmax(0)[tuples].prod(0)
    return number, weight


def certificate(problem, estimator):
    number, weight = numbers(problem.log_prob(problem.theta), estimator.num_summed, estimator.num_samples)

    def estimate(theta, c):
        x = at(problem, number)
        return estimator.surrogate(problem.build(theta), x, problem.f(x, c))

    check_unbiased(problem, estimate, weight)


@pytest.mark.parametrize(("name", "k", "m"), CASES)
def test_the_mean_over_every_tuple_of_draws_is_exact(name, k, m):
    problem = PROBLEMS[name]
    certificate(problem, sf.SumAndSample(k, m, batch_ndim=problem.batch_ndim))


@pytest.mark.parametrize(
    "mutate",
    [
        lambda self, weights, baseline: (weights / weights.sum(0) * 0.99, baseline),
        lambda self, weights, baseline: (torch.cat((weights[:1], weights[1:] * 0 + 0.5)), baseline),
        lambda self, weights, baseline: (weights, lambda v: v.mean(0, keepdim=True).expand_as(v)),
        lambda self, weights, baseline: (weights, lambda v: torch.cat((0 * v[:1], baseline(v)[1:]))),
    ],
    ids=["a share lost", "no probability of the rest", "the own draw in the baseline", "no baseline of the sum"],
)
def test_a_wrong_weight_or_baseline_is_seen(monkeypatch, mutate):
    original = sf.SumAndSample._weigh
    monkeypatch.setattr(
        sf.SumAndSample, "_weigh", lambda self, log_prob, number: mutate(self, *original(self, log_prob, number))
    )
    with pytest.raises(AssertionError):
        certificate(PROBLEMS["Categorical"], sf.SumAndSample(1, 2, batch_ndim=2))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_variance_of_the_value_is_that_of_the_draws_shrunk(m):
    """(1 - p(C))^2 Var[f | rest] / m."""
    p, f = doubles([0.5, 0.2, 0.15, 0.1, 0.05]), doubles([3.0, -1.0, 2.0, 0.5, 7.0])
    number, weight = numbers(p.log().unsqueeze(-1).expand(5, 2), 2, m)
    number, weight = number[..., 0], weight[..., 0]
    q = Categorical(p.expand(number.shape[1], 5))
    estimator = sf.SumAndSample(2, m, batch_ndim=1)
    if m == 3:  # as many evaluations as values: exact instead
        assert close(sf.SumAndSample(2, 3)(Categorical(p), lambda x: f[x]), (p * f).sum())
        return
    mean, variance = moments(weight, estimator.surrogate(q, number, f[number]))
    tail = p[2:] / p[2:].sum()
    spread = (tail * f[2:].square()).sum() - (tail * f[2:]).sum().square()
    assert close(mean, (p * f).sum())
    assert close(variance, p[2:].sum().square() * spread / m)


def test_a_constant_has_no_variance_in_the_gradient():
    """The centred gradient of a constant is 0 for two draws or more, and where one draw has the sum beside it."""
    logits = torch.randn(6, requires_grad=True, dtype=torch.float64)
    for k, m in [(1, 1), (2, 2), (3, 1)]:
        value = sf.SumAndSample(k, m)(Categorical(logits=logits), lambda x: torch.full((len(x),), 5.0).double())
        assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-13
        assert close(value.detach(), 5.0)


@pytest.mark.parametrize(("k", "m"), [(4, 1), (3, 1), (2, 2), (9, 9)])
def test_with_as_many_evaluations_as_values_it_is_exact(k, m):
    problem = PROBLEMS["Bernoulli, sites in the batch"]

    def estimate(theta, c):
        def f(x):
            assert len(x) == 4
            return problem.f(x, c)

        return sf.SumAndSample(k, m, batch_ndim=2)(problem.build(theta), f)

    check_unbiased(problem, estimate, torch.ones(1, 2, dtype=torch.float64))


def test_the_most_probable_are_summed_and_the_rest_is_drawn_by_probability():
    """Frequencies of 2 x 10^5 draws: false alarm 1e-6 over six counts (5.2 sigma)."""
    p = doubles([0.1, 0.3, 0.05, 0.35, 0.2])
    x = sf.SumAndSample(2, 1, batch_ndim=1).sample(Categorical(p.expand(200_000, 5)))
    assert (x[0] == 3).all()
    assert (x[1] == 1).all()
    found = torch.bincount(x[2], minlength=5).double() / 200_000
    right = doubles([0.1, 0.0, 0.05, 0.0, 0.2]) / 0.35
    assert ((found - right).abs() <= 5.2 * (right * (1 - right) / 200_000).sqrt()).all()


def test_both_phases_are_the_call():
    logits = torch.randn(3, 3, requires_grad=True, dtype=torch.float64)
    p, estimator = Independent(Bernoulli(logits=logits), 1), sf.SumAndSample(2, 3)

    def f(x):
        return x.cumsum(-1).sum(-1).square()

    torch.manual_seed(3)
    once = estimator(p, f)
    torch.manual_seed(3)
    x = estimator.sample(p)
    assert x.shape == (5, 3, 3)
    twice = estimator.surrogate(p, x, f(x))
    assert torch.equal(once, twice)
    assert torch.equal(*[torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (once, twice)])
    torch.testing.assert_close((estimator.weights(p, x) * f(x)).sum(0), once.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [30.0, 200.0, 5000.0, torch.inf])
@pytest.mark.parametrize("m", [1, 2])
def test_no_nan_in_single_precision_as_probabilities_go_to_zero(scale, m):
    logits = torch.tensor([0.0, -1.0, -2.0, -2.5, -3.0]) * scale
    logits[0] = 0.0
    logits.requires_grad_()
    value = sf.SumAndSample(2, m, batch_ndim=1)(Categorical(logits=logits.expand(50, 5)), lambda x: x.float() + 1)
    value.sum().backward()
    torch.testing.assert_close(value, torch.ones(50), rtol=0, atol=1e-5)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.SumAndSample(0), sf.ScorefnError, "num_summed must be an integer of at least 1.*0"),
        (lambda: sf.SumAndSample(2, 0), sf.ScorefnError, "num_samples must be an integer of at least 1.*0"),
        (
            lambda: sf.SumAndSample(2)(Normal(torch.zeros(3), 1.0), lambda x: x.sum(-1)),
            sf.ScorefnError,
            "SumAndSample does not serve Normal",
        ),
        (
            lambda: sf.SumAndSample(2)(Categorical(torch.ones(4, 4, 30)), lambda x: x.sum((-1, -2))),
            sf.ScorefnError,
            r"30\^16 joint values.*1048576",
        ),
        (
            lambda: sf.SumAndSample(2)(Bernoulli(torch.full((3,), 0.5)), lambda x: x),
            sf.ShapeError,
            r"SumAndSample\(\.\.\., batch_ndim=1\)",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
