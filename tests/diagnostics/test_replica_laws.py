"""Replicates follow the law of the estimate, and are independent."""

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.replicas import replicas
from tests.diagnostics.replica_cases import F64, a, expectation


def deviation(sample, exact):
    """How many standard errors a sample variance is off the exact one, by the fourth moment of the sample."""
    centred = (sample - sample.mean()).square()
    return abs(float((centred.mean() - exact) / (centred.std() / len(sample) ** 0.5)))


@pytest.mark.parametrize(
    ("probability", "loo", "disarm"), [(0.5, 0.0625, 0.0), (0.3, 0.0609, 0.0294), (0.1, 0.0369, 0.0324)]
)
def test_the_law_in_one_bernoulli(probability, loo, disarm):
    """Exact variances of leave-one-out and DisARM; a false alarm has a probability below 1e-6 each."""
    torch.manual_seed(0)
    eta = torch.tensor(probability, dtype=F64).logit().requires_grad_()
    p = td.Bernoulli(logits=eta)
    for estimator, exact in ((expectation(2), loo), (sf.DisARM(), disarm)):
        found = replicas(Estimation(p, lambda x: x, estimator), (eta,)).gradients(20_000)[:, 0]
        if exact == 0.0:
            assert float(found.var()) < 1e-30
        else:
            assert deviation(found, exact) < 5
        assert abs(float(found.mean()) - probability * (1 - probability)) <= 5 * float(found.std()) / 141 + 1e-15


@pytest.mark.parametrize(
    ("k", "loo", "unordered"), [(2, 0.0072750, 0.0061125), (3, 0.0032, 0.0022625), (4, 0.0019875, 0.00113083)]
)
def test_the_law_in_three_bernoullis_of_one_logit(k, loo, unordered):
    torch.manual_seed(1)
    eta = torch.zeros((), dtype=F64, requires_grad=True)
    p, target = td.Bernoulli(logits=eta.expand(3)), torch.tensor([0.6, 0.51, 0.48], dtype=F64)
    for estimator, exact in ((expectation(k), loo), (sf.UnorderedSet(k), unordered)):
        found = replicas(Estimation(p, lambda x: (x - target).square().sum(-1), estimator), (eta,)).gradients(20_000)
        assert deviation(found[:, 0], exact) < 5


@pytest.mark.parametrize(("baseline", "exact"), [(None, 30.0), (sf.Constant(2.0), 18.0), (sf.Constant(4.0), 14.0)])
def test_the_law_in_a_normal(baseline, exact):
    torch.manual_seed(2)
    mean = torch.ones((), dtype=F64, requires_grad=True)
    estimator = expectation(1, baseline=baseline)
    found = replicas(Estimation(td.Normal(mean, 1.0), torch.square, estimator), (mean,)).gradients(100_000)
    assert deviation(found[:, 0], exact) < 5


@pytest.mark.parametrize("coupling", [None, sf.Antithetic(), sf.Stratified(), sf.Sobol()])
def test_replicates_are_independent_of_each_other(coupling):
    """The correlation of neighbours is that of independent draws."""
    torch.manual_seed(4)
    p = td.Normal(a, 1.0)
    found = replicas(Estimation(p, lambda x: x.exp().sum(-1), expectation(4, coupling=coupling)), (a,)).gradients(4000)
    z = (found - found.mean(0)) / found.std(0)
    for lag in (1, 2, 7):
        assert float((z[lag:] * z[:-lag]).mean(0).abs().max()) < 5 / 4000**0.5 * float(z.square().std())
