"""Exact sums where a probability is 0 or 1: log_prob has no slope there, the probabilities themselves have one."""

from functools import partial

import pytest
import torch
import torch.distributions as td
from torch.autograd.functional import hessian

import scorefn as sf
from scorefn.diagnostics import check_unbiased, exact_expectation, exact_gradient

pytestmark = pytest.mark.usefixtures("float64")

INF = torch.inf


def line(x):
    return 1 + 4 * x


def table(x):
    return torch.tensor([1.0, 2.0, 30.0])[x]


def both(p, f, *parameters):
    """The gradient by the oracle, and the one of Enumerate."""
    value = sf.Enumerate()(p, f)
    torch.testing.assert_close(value, exact_expectation(p, f))
    found = torch.autograd.grad(value.sum(), parameters, retain_graph=True)
    exact = exact_gradient(p, f, parameters)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    return exact[0]


@pytest.mark.parametrize("probability", [0.0, 1.0, 1e-300, 0.3])
def test_a_bit_whose_probability_is_at_the_edge(probability):
    t = torch.tensor(probability, requires_grad=True)
    p = td.Bernoulli(probs=t)
    assert abs(exact_expectation(p, line).item() - (1 + 4 * probability)) <= 1e-15
    assert both(p, line, t).item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_below_the_precision_of_its_type(dtype):
    t = torch.tensor(1e-9, dtype=dtype, requires_grad=True)
    torch.testing.assert_close(both(td.Bernoulli(probs=t), line, t), torch.tensor(4.0, dtype=dtype))


@pytest.mark.parametrize("one_hot", [False, True])
def test_a_category_of_probability_zero(one_hot):
    w = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    p = td.OneHotCategorical(probs=w) if one_hot else td.Categorical(probs=w)
    f = (lambda x: table(x.argmax(-1))) if one_hot else table
    torch.testing.assert_close(both(p, f, w), torch.tensor([-0.5, 0.5, 28.5]), rtol=1e-12, atol=1e-12)


def test_joint_bits_at_both_edges():
    """E of the product of 1 + 2 x_i is the product of 1 + 2 t_i."""
    t = torch.tensor([0.0, 1.0, 0.0, 0.25], requires_grad=True)
    right = torch.tensor([2.0 * 3 * 1 * 1.5, 2 * 1 * 1 * 1.5, 2 * 1 * 3 * 1.5, 2 * 1 * 3 * 1])
    for p in (td.Bernoulli(probs=t), td.Independent(td.Bernoulli(probs=t), 1)):
        torch.testing.assert_close(both(p, lambda x: (1 + 2 * x).prod(-1), t), right)

    def mean(t):
        return exact_expectation(td.Bernoulli(probs=t), lambda x: (1 + 2 * x).prod(-1))

    second = hessian(lambda t: (1 + 2 * t[0]) * (1 + 2 * t[1]) * (1 + 2 * t[2]) * (1 + 2 * t[3]), t.detach())
    torch.testing.assert_close(hessian(mean, t.detach()), second)


def test_problems_of_their_own_at_the_edges():
    t = torch.tensor([[0.0, 0.5], [1.0, 0.25]], requires_grad=True)
    p = td.Independent(td.Bernoulli(probs=t), 1)
    values = sf.Enumerate()(p, lambda x: (1 + 2 * x).prod(-1))
    right = (1 + 2 * t).prod(-1)
    torch.testing.assert_close(values, right)
    for a, b in zip(*(torch.autograd.grad(v.sum(), t, retain_graph=True) for v in (values, right)), strict=True):
        torch.testing.assert_close(a, b)
    x = sf.Enumerate().sample(p)
    assert sf.Enumerate().weights(p, x).sum(0).tolist() == [1, 1]


@pytest.mark.parametrize("probability", [0.0, 1.0, 0.3])
def test_a_binomial_against_its_moments(probability):
    """E x^2 = n t (1 - t) + n^2 t^2, with two derivatives."""

    def mean(t):
        return exact_expectation(td.Binomial(4, probs=t), torch.square)

    t = torch.tensor(probability, requires_grad=True)
    (slope,) = exact_gradient(td.Binomial(4, probs=t), torch.square, t)
    torch.testing.assert_close(slope, 4 * (1 - 2 * t.detach()) + 32 * t.detach())
    torch.testing.assert_close(hessian(mean, t.detach()), torch.tensor(24.0))


def test_mixtures_whose_weight_or_part_is_at_the_edge():
    w, q = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.0, 0.5], requires_grad=True)
    logit = torch.tensor([0.0, 0.7], requires_grad=True)
    right = torch.tensor([0.0, 4 * 0.5])  # d / dw of (w . q) / sum(w), times 4
    torch.testing.assert_close(both(td.MixtureSameFamily(td.Categorical(w), td.Bernoulli(q)), line, w), right)
    found = exact_gradient(td.MixtureSameFamily(td.Categorical(w), td.Bernoulli(q)), line, q)[0]
    torch.testing.assert_close(found, torch.tensor([4.0, 0.0]))
    by_logits = td.MixtureSameFamily(td.Categorical(w), td.Binomial(2, logits=logit))
    gap = 2 * 4 * (logit[1].sigmoid() - 0.5).item()
    torch.testing.assert_close(both(by_logits, line, w), torch.tensor([0.0, gap]))


def test_masked_actions_keep_their_zero_gradient():
    """Logits of -inf, and probabilities that a mask makes 0: no gradient passes to what is masked."""
    theta = torch.tensor([0.3, -0.2, 5.0], requires_grad=True)
    allowed = torch.tensor([True, True, False])
    free = theta[:2]
    right = torch.zeros(3)
    right[:2] = torch.autograd.grad((free.softmax(0) * torch.tensor([1.0, 2.0])).sum(), free)[0]
    by_logits = td.Categorical(logits=theta.masked_fill(~allowed, -INF))
    by_probs = td.Categorical(probs=theta.softmax(0) * allowed)
    for p in (by_logits, by_probs):
        torch.testing.assert_close(both(p, table, theta), right, rtol=1e-12, atol=1e-12)
        report = check_unbiased((p, table, partial(sf.expectation, num_samples=2)), params=theta)
        assert (report.verdict, report.method) == ("unbiased", "exact")


@pytest.mark.parametrize("logit", [INF, -INF, 800.0])
def test_infinite_logits_of_a_bit_are_a_constant(logit):
    t = torch.tensor([logit, 0.0], requires_grad=True)
    p = td.Bernoulli(logits=t)
    torch.testing.assert_close(both(p, lambda x: line(x).sum(-1), t), torch.tensor([0, 1.0]))


@pytest.mark.parametrize(
    ("family", "given", "f"),
    [
        (td.Bernoulli, 0.0, line),
        (td.Bernoulli, 1.0, line),
        (td.Categorical, [0.5, 0.5, 0.0], table),
        (td.OneHotCategorical, [0.5, 0.5, 0.0], lambda x: table(x.argmax(-1))),
    ],
)
def test_an_estimate_that_cannot_see_an_outcome_is_not_certified(family, given, f):
    t = torch.tensor(given, requires_grad=True)
    p = family(probs=t)
    report = check_unbiased((p, f, partial(sf.expectation, num_samples=2)), params=t)
    assert (report.verdict, report.method) == ("biased", "exact")
    assert check_unbiased((p, f, sf.Enumerate()), params=t).verdict == "unbiased"
    with pytest.raises(AssertionError, match="biased"):
        sf.diagnostics.assert_unbiased((p, f, sf.LocalExpectation()), params=t)


def test_a_family_with_a_density_of_its_own_is_summed_by_it():
    class Squared(td.Bernoulli):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    p = Squared(probs=torch.tensor(0.5))
    torch.testing.assert_close(exact_expectation(p, lambda x: x), torch.tensor(0.25))
