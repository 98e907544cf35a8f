"""Clipped and squashed actions: densities and scores by quadrature."""

import gymnasium
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.distributions import Normal, TransformedDistribution, transforms

import scorefn as sf
from scorefn.trajectories import Clip, GaussianPolicy, Tanh

LOW, HIGH = [-1.0, 0.0], [2.0, 0.5]


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


class Fixed(nn.Module):
    """A mean that does not depend on the observation."""

    def __init__(self, *mean):
        super().__init__()
        self.mean = nn.Parameter(doubles(*mean))

    def forward(self, observations):
        return self.mean.expand(*observations.shape[:-1], -1)


def policy(kind, mean=(0.3, -0.2), log_scale=(0.4, -0.7), low=LOW, high=HIGH):
    return GaussianPolicy(Fixed(*mean), doubles(*log_scale), bounds=kind(doubles(*low), doubles(*high)))


def score(value, module):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()), retain_graph=True)])


# ------------------------------------------------------------------------------------------------------------ values


def test_clipped_between_the_ends():
    clip = Clip([-1.0, -torch.inf], [torch.inf, 0.5])
    assert clip(torch.tensor([[-3.0, -9.0], [9.0, 3.0]])).tolist() == [[-1.0, -9.0], [9.0, 0.5]]


def test_squashed_onto_the_ends_and_never_beyond():
    tanh = Tanh(torch.tensor([0.1, -3.0]), torch.tensor([0.7, 1.0]))
    u = torch.cat([torch.linspace(-60, 60, 10_001), torch.tensor([-1e30, 1e30, torch.inf, -torch.inf])])
    given = tanh(u.unsqueeze(-1).expand(-1, 2))
    assert (given >= tanh.low).all()
    assert (given <= tanh.high).all()
    by_hand = tanh.low + (tanh.high - tanh.low) * (1 + u.unsqueeze(-1).tanh()) / 2
    assert (given - by_hand).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [Clip, Tanh])
def test_from_a_space(kind):
    box = gymnasium.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 0.5], np.float32))
    bounds = kind.from_space(box)
    assert bounds.low.tolist() == LOW
    assert bounds.high.tolist() == HIGH
    assert bounds.low.dtype == torch.float32
    assert not bounds.state_dict()
    given = bounds(torch.randn(1000, 2) * 5)
    assert all(box.contains(action) for action in given.numpy())
    assert bounds.double().low.dtype == torch.float64
    assert "low=[-1.0, 0.0], high=[2.0, 0.5]" in repr(bounds)


def test_integers_become_floats():
    assert Clip([-1], [1]).low.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_jacobian_is_right_and_safe_for_large_actions(dtype):
    tanh = Tanh(torch.tensor([-2.0], dtype=dtype), torch.tensor([4.0], dtype=dtype))
    u = torch.linspace(-3, 3, 101, dtype=dtype, requires_grad=True).unsqueeze(-1)
    (slope,) = torch.autograd.grad(tanh.low + 3 + 3 * u.tanh().sum(), u)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-4
    assert (tanh.log_abs_det(u) - slope.squeeze(-1).log()).abs().max() < tolerance
    far = torch.tensor([[50.0], [-50.0], [1e4], [-1e4]], dtype=dtype, requires_grad=True)
    expected = np.log(3) + np.log(4) - 2 * np.array([50, 50, 1e4, 1e4])
    assert np.allclose(tanh.log_abs_det(far).detach().numpy(), expected, rtol=1e-6)
    (gradient,) = torch.autograd.grad(tanh.log_abs_det(far).sum(), far)
    assert gradient.flatten().tolist() == [-2, 2, -2, 2]


def test_the_squashed_density_is_that_of_torch():
    squashed = policy(Tanh)
    chain = [transforms.TanhTransform(), transforms.AffineTransform(doubles(0.5, 0.25), doubles(1.5, 0.25))]
    oracle = TransformedDistribution(squashed(torch.zeros(1)).base_dist, chain)
    u = torch.randn(50, 2, dtype=torch.float64)
    log_prob = squashed.executed_log_prob(torch.zeros(50, 1), u)
    assert log_prob.shape == (50,)
    assert (log_prob - oracle.log_prob(squashed.executed(u)).sum(-1)).abs().max() < 1e-10


# --------------------------------------------------------------------------------------------------- laws of densities


def test_the_squashed_density_integrates_to_one():
    squashed = policy(Tanh, (0.3,), (0.4,), (-1.0,), (2.0,))

    def density(a):
        u = torch.atanh(doubles((a - 0.5) / 1.5)).unsqueeze(0)
        return squashed.executed_log_prob(torch.zeros(1, 1), u).exp().item()

    total, _ = integrate.quad(density, -1, 2, epsabs=1e-11, epsrel=1e-11)
    assert abs(total - 1) < 1e-9


def test_the_clipped_distribution_adds_up_to_one():
    clipped = policy(Clip, (0.3,), (0.4,), (-1.0,), (2.0,))

    def density(u):
        return clipped.executed_log_prob(torch.zeros(1, 1), doubles(u).unsqueeze(0)).exp().item()

    inside, _ = integrate.quad(density, -1 + 1e-13, 2 - 1e-13, epsabs=1e-12)
    normal = stats.norm(0.3, np.exp(0.4))
    assert abs(density(-7.0) - normal.cdf(-1)) < 1e-14
    assert density(-1.0) == density(-7.0)
    assert abs(density(2.0) - normal.sf(2)) < 1e-14
    assert abs(density(0.7) - normal.pdf(0.7)) < 1e-14
    assert abs(inside + density(-7.0) + density(9.0) - 1) < 1e-10


def test_dimensions_of_the_action_are_summed():
    clipped = policy(Clip)
    u = doubles(-5.0, 0.2).unsqueeze(0)
    by_hand = stats.norm(0.3, np.exp(0.4)).logcdf(-1) + stats.norm(-0.2, np.exp(-0.7)).logpdf(0.2)
    assert abs(clipped.executed_log_prob(torch.zeros(1, 1), u).item() - by_hand) < 1e-13


def test_one_score_before_and_after_squashing():
    squashed = policy(Tanh)
    x = torch.zeros(1, 1)
    for u in 3 * torch.randn(20, 1, 2, dtype=torch.float64):
        assert torch.equal(
            score(squashed(x).log_prob(u).sum(), squashed), score(squashed.executed_log_prob(x, u).sum(), squashed)
        )


def quadrature(module, nodes=200, reach=12.0):
    """Gauss-Legendre below, between and above the ends of one-dimensional actions: u ``[S, 1]``, weights ``[S]``."""
    normal = Normal(module.mean.mean.detach(), module.log_scale.detach().exp())
    low, high = (float((end - normal.loc) / normal.scale) for end in (module.bounds.low, module.bounds.high))
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))
    pieces = [(a, b - a) for a, b in ((-reach, low), (low, high), (high, reach))]
    z = torch.cat([a + length * (node + 1) / 2 for a, length in pieces])
    weights = torch.cat([weight * length / 2 for _, length in pieces])
    return (normal.loc + normal.scale * z).unsqueeze(-1), weights * (-z.square() / 2).exp() / np.sqrt(2 * np.pi)


def test_only_the_score_of_what_was_sampled_or_of_what_was_executed_is_unbiased():
    """E[f(clip(u)) score] for three scores; the true gradient is that of the integral over the clipped distribution."""
    clipped = policy(Clip, (0.3,), (0.4,), (-1.0,), (2.0,))
    u, weight = quadrature(clipped)
    x = torch.zeros(len(u), 1)
    given = clipped.executed(u)
    fx = (given - 0.45).square().squeeze(-1) + given.squeeze(-1).sin()

    mean, scale = clipped.mean.mean, clipped.log_scale.exp()
    z = ((u - mean) / scale).detach().squeeze(-1)
    reparameterised = (mean + scale * z.unsqueeze(-1)).clamp(-1, 2)
    exact = score(weight @ ((reparameterised - 0.45).square() + reparameterised.sin()).squeeze(-1), clipped)

    sampled = score((weight * fx) @ clipped(x).log_prob(u), clipped)
    executed = score((weight * fx) @ clipped.executed_log_prob(x, u), clipped)
    wrong = score((weight * fx) @ clipped(x).log_prob(given), clipped)
    assert (sampled - exact).abs().max() < 1e-12
    assert (executed - exact).abs().max() < 1e-12
    assert (wrong - exact).abs().max() > 0.1

    for log_prob, mean_is_zero in (
        (clipped(x).log_prob(u), True),
        (clipped.executed_log_prob(x, u), True),
        (clipped(x).log_prob(given), False),
    ):
        assert (score(weight @ log_prob, clipped).abs().max() < 1e-12) == mean_is_zero


def test_the_score_of_the_clipped_action_is_the_mean_of_the_others_given_it():
    """Hence its second moment is no larger (Fujita & Maeda, 2018)."""
    clipped = policy(Clip, (0.3,), (0.4,), (-1.0,), (2.0,))
    u, weight = quadrature(clipped)
    z = ((u - clipped.mean.mean) / clipped.log_scale.exp()).detach().squeeze(-1)
    sampled = torch.stack([z / clipped.log_scale.exp().item(), z.square() - 1], -1)
    parameters = clipped.mean.mean, clipped.log_scale
    mean, log_scale = (p.detach().expand(len(u), 1).clone().requires_grad_() for p in parameters)
    log_prob = clipped.bounds.log_prob(Normal(mean, log_scale.exp()), u)
    executed = torch.cat(torch.autograd.grad(log_prob.sum(), [mean, log_scale]), -1)
    for region in (u <= -1, u >= 2):
        inside = torch.where(region.squeeze(-1), weight, 0)
        assert ((inside @ sampled / inside.sum()) - executed[region.squeeze(-1)][0]).abs().max() < 1e-12
    between = ((u > -1) & (u < 2)).squeeze(-1)
    assert (sampled - executed)[between].abs().max() < 1e-12
    assert (weight @ executed.square() < weight @ sampled.square()).all()


def test_an_infinite_end_spoils_no_gradient():
    clipped = policy(Clip, low=(-torch.inf, 0.0), high=(torch.inf, torch.inf))
    x, u = torch.zeros(3, 1), doubles(-9.0, -9.0, 0.1, 0.1, 99.0, 99.0).reshape(3, 2)
    log_prob = clipped.executed_log_prob(x, u)
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(score(log_prob.sum(), clipped)).all()


def test_far_in_the_tail_nothing_underflows():
    clipped = policy(Clip, (0.0,), (0.0,), (-1000.0,), (2000.0,))
    log_prob = clipped.executed_log_prob(torch.zeros(1, 1), doubles(3000.0).unsqueeze(0))
    assert abs(log_prob.item() - stats.norm.logsf(2000)) < 1e-6
    assert torch.isfinite(score(log_prob.sum(), clipped)).all()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("high", [torch.inf, 3.4e38])
def test_an_infinite_end_cannot_be_squashed_onto(high):
    with pytest.raises(sf.ScorefnError, match="Tanh squashes actions between two finite ends, but low is.*use Clip"):
        Tanh([-3.4e38, 0.0], [high, 1.0])


@pytest.mark.parametrize("kind", [Clip, Tanh])
def test_ends_that_are_no_bounds_are_refused(kind):
    with pytest.raises(
        sf.ScorefnError, match=rf"{kind.__name__} needs low < high in every dimension, but low is \[0.0\]"
    ):
        kind([0.0], [0.0])
    with pytest.raises(sf.ScorefnError, match="needs low < high"):
        kind([0.0], [torch.nan])
    with pytest.raises(sf.ShapeError, match=r"low of shape \(\) and high of shape \(2,\).*shape of one action"):
        kind(-1.0, [1.0, 1.0])
    with pytest.raises(sf.ScorefnError, match=r"Discrete\(2\) has no low and high.*Box"):
        kind.from_space(gymnasium.spaces.Discrete(2))


@pytest.mark.parametrize("wrong", [(5,), (5, 1), (2, 5)])
@pytest.mark.parametrize("call", [Clip(LOW, HIGH), Tanh(LOW, HIGH), Tanh(LOW, HIGH).log_abs_det])
def test_actions_of_another_shape_are_refused(call, wrong):
    with pytest.raises(sf.ShapeError, match=r"actions have shape .* has ends of shape \(2,\)"):
        call(torch.zeros(wrong))
