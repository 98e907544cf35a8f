"""Spike and slab: what the program calls exact is, by another computation."""

import math

import pytest
import torch

import scorefn as sf
from applications.vi import spike_and_slab
from applications.vi.spike_and_slab import Indicators, Regression


@pytest.fixture(scope="module")
def regression():
    return spike_and_slab.load()


@pytest.fixture(scope="module")
def answers(regression):
    return spike_and_slab.exact(regression)


def test_the_log_joint_is_that_of_a_multivariate_student(regression):
    n, a, b = len(regression.y), regression.shape, regression.rate
    for bits in ([0.0] * 10, [1.0] * 10, [0.0, 1, 1, 1, 0, 0, 1, 0, 1, 0]):
        z = torch.tensor(bits, dtype=torch.float64)
        inside = regression.X[:, z.bool()]
        scale = (torch.eye(n, dtype=torch.float64) + regression.slab * inside @ inside.T) * b / a
        quadratic = regression.y @ torch.linalg.solve(scale, regression.y) / (2 * a)
        expected = math.lgamma(a + n / 2) - math.lgamma(a) - n / 2 * math.log(2 * math.pi * a)
        expected -= scale.logdet() / 2 + (a + n / 2) * quadratic.log1p() + 10 * math.log(2)
        assert regression.log_joint(z).item() == pytest.approx(expected.item(), abs=1e-8)


def test_the_posterior_is_a_distribution_and_the_models_are_all_there(answers):
    assert len(torch.unique(spike_and_slab.states(10), dim=0)) == 1024
    assert (answers.log_joint - answers.log_evidence).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert answers.log_evidence == pytest.approx(-490.59506207646314, abs=1e-8)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_guide_is_a_distribution_and_draws_what_it_says(order):
    torch.manual_seed(0)
    guide = Indicators(4, order)
    with torch.no_grad():
        guide.weights.normal_()
    z = spike_and_slab.states(4)
    probability = guide.log_prob(z).exp().detach()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    draws = guide.sample((20_000,))
    counts = (draws[:, None] == z).all(-1).double().mean(0)
    error = (probability * (1 - probability) / len(draws)).sqrt()
    assert ((counts - probability).abs() < 5 * error + 1e-9).all()  # 5 sigma: one run in 1e5 fails
    assert guide.sample().shape == (4,)


def test_full_order_represents_any_posterior():
    torch.manual_seed(0)
    X = torch.randn(30, 3, dtype=torch.float64)
    y = X[:, 0] + 0.5 * torch.randn(30, dtype=torch.float64)
    answers = spike_and_slab.exact(Regression(X, y, ("a", "b", "c")))
    best = spike_and_slab.best(answers, 2)
    assert answers.bound(best).item() == pytest.approx(answers.log_evidence, abs=1e-6)
    torch.testing.assert_close(spike_and_slab.inclusion(best), answers.inclusion, atol=1e-4, rtol=0)


def test_the_score_function_has_the_exact_gradient(regression, answers):
    """Every pair of draws, weighted by its probability, on a guide of three covariates."""
    small = Regression(regression.X[:, 4:7], regression.y, regression.names[4:7])
    answers, guide = spike_and_slab.exact(small), Indicators(3, 1)
    with torch.no_grad():
        guide.weights.copy_(torch.arange(12.0).reshape(3, 4) / 10 - 0.5)
    z = spike_and_slab.states(3)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    total = torch.zeros_like(guide.weights)
    for i, j in pairs.tolist():
        chosen = z[[i, j]]

        class Fixed:
            def sample(self, sample_shape, chosen=chosen):
                return chosen

            def log_prob(self, x):
                return guide.log_prob(x)

        value = sf.posteriors.elbo(small.log_joint, Fixed(), 2)
        weight = guide.log_prob(chosen).sum().exp().detach()
        total += weight * torch.autograd.grad(value, guide.weights)[0]
    exact = torch.autograd.grad(answers.bound(guide), guide.weights)[0]
    assert exact.norm() > 1e-2
    torch.testing.assert_close(total, exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"X": torch.ones(3, 2), "y": torch.ones(4), "names": ("a", "b")}, r"\(3, 2\), y \(4,\).*\[n, p\]"),
        ({"X": torch.ones(3, 2), "y": torch.ones(3), "names": ("a",)}, "1 names"),
        ({"X": torch.ones(3, 1), "y": torch.ones(3), "names": ("a",), "slab": 0.0}, "slab.*0.0.*above 0"),
    ],
)
def test_a_regression_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regression(**arguments)
