"""``elbo``, the bound of a log-density and a torch distribution."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import scorefn as sf
from scorefn.posteriors import elbo

WEIGHTS = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64)


class Prescribed(Categorical):
    """Returns given draws instead of sampling."""

    def __init__(self, logits, given):
        super().__init__(logits=logits)
        self.given = torch.tensor(given)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.given


@pytest.mark.parametrize(("num_samples", "baseline"), [(1, "auto"), (2, "auto"), (3, "auto"), (2, None)])
def test_expected_gradient_over_all_draws(num_samples, baseline):
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    log_q = Categorical(logits=logits).logits
    bound = (log_q.exp() * (scale * WEIGHTS - log_q)).sum()
    exact = torch.autograd.grad(bound, [logits, scale])

    value, gradient = 0.0, [torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for draws in itertools.product(range(3), repeat=num_samples):
        q = Prescribed(logits, draws)
        probability = q.log_prob(q.given).sum().exp().detach()
        estimate = elbo(lambda z: scale * WEIGHTS[z], q, num_samples, baseline=baseline)
        value += probability * estimate.detach()
        for total, part in zip(gradient, torch.autograd.grad(estimate, [logits, scale]), strict=True):
            total += probability * part
    torch.testing.assert_close(value, bound.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, list(exact), rtol=0, atol=1e-10)


def test_no_noise_remains_at_the_posterior():
    logits = WEIGHTS.clone().requires_grad_()
    elbo(lambda z: WEIGHTS[z], Categorical(logits=logits), 10).backward()
    assert logits.grad.abs().max() < 1e-15


def test_batch_dimensions_beyond_the_problems_are_summed():
    torch.manual_seed(0)
    logits = torch.randn(4, 5, requires_grad=True)
    assert elbo(lambda z: z.sum(-1), Bernoulli(logits=logits), 8).shape == (4,)
    assert elbo(lambda z: z.sum((-1, -2)), Bernoulli(logits=logits), 8).shape == ()
    assert elbo(lambda z: z, Bernoulli(logits=logits), 8).shape == (4, 5)


def test_a_black_box_in_numpy_will_do():
    mean = torch.zeros((), requires_grad=True)
    elbo(lambda z: -(z.numpy() ** 2) / 2, Normal(mean, 1.0), 16).backward()
    assert mean.grad is not None


@pytest.mark.parametrize("log_joint", [lambda z: z.sum(), lambda z: z.sum(-1, keepdim=True), lambda z: z.sum(0)])
def test_shapes_are_refused_never_repaired(log_joint):
    with pytest.raises(sf.ShapeError, match="log_joint returned shape"):
        elbo(log_joint, Bernoulli(logits=torch.zeros(4, 5, requires_grad=True)), 8)
