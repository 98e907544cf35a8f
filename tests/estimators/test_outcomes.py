"""What an estimator lists as its outcomes is all of them: their probabilities sum to one, and their mean is exact."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent

import scorefn as sf

VALUES = torch.tensor([1.5, -0.5, 2.0, 0.25], dtype=torch.float64)


def categorical():
    logits = torch.tensor([0.3, -0.6, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    return logits, Categorical(logits=logits)


def over_outcomes(estimator, p, f, theta):
    """The gradient of each outcome `[T, ...]`, its value `[T]` and its probability `[T]`."""
    points, probability = estimator.outcomes(p)
    values = torch.stack([estimator.surrogate(p, x, f(x)) for x in points.unbind(1)])
    gradients = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in values]
    return torch.stack(gradients), values.detach(), probability


@pytest.mark.parametrize(
    ("estimator", "number"),
    [
        (sf.SumAndSample(1, 1), 3),
        (sf.SumAndSample(1, 2), 9),
        (sf.SumAndSample(2, 2), 1),  # as many evaluations as values
        (sf.UnorderedSet(2), 6),
        (sf.UnorderedSet(3, baseline=False), 4),
        (sf.UnorderedSet(4), 1),
    ],
)
def test_the_mean_over_the_outcomes_is_exact(estimator, number):
    logits, p = categorical()
    gradients, values, probability = over_outcomes(estimator, p, lambda x: VALUES[x], logits)
    assert len(probability) == number
    assert probability.dtype == torch.float64
    expected = (p.probs * VALUES).sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(probability @ values, expected.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(probability @ gradients, wanted, rtol=0, atol=1e-14)


def test_outcomes_of_antithetic_coins_are_exact():
    logits = torch.tensor([0.3, -0.6], dtype=torch.float64, requires_grad=True)
    p, estimator = Independent(Bernoulli(logits=logits), 1), sf.DisARM()
    weight = torch.tensor([1.5, -2.0], dtype=torch.float64)
    gradients, _, probability = over_outcomes(estimator, p, lambda x: (x * weight).sum(-1), logits)
    (wanted,) = torch.autograd.grad((p.mean * weight).sum(), logits)
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(probability @ gradients, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("estimator", "p"),
    [
        (sf.SumAndSample(1, 8), Categorical(logits=torch.zeros(40))),  # 39^8 tuples
        (sf.UnorderedSet(8), Categorical(logits=torch.zeros(80))),  # 80! / (8! 72!) sets
        (sf.SumAndSample(1, 1, batch_ndim=1), Categorical(logits=torch.zeros(2, 4))),  # two problems
        (sf.DisARM(), Independent(Bernoulli(logits=torch.zeros(40)), 1)),  # 2^80 pairs
        (sf.Enumerate(), Categorical(logits=torch.zeros(4))),  # one outcome, which p.enumerate_support lists
    ],
)
def test_no_outcomes_are_listed_where_they_are_too_many_or_the_points_are_those_of_p(estimator, p):
    assert estimator.outcomes(p) is None
