"""The update of SNES is the natural gradient, with its utilities."""

import itertools
import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import SNES
from tests.search.snes_cases import parameters


def step(strategy, x, f):
    """The natural gradient that tell follows: the change of (m, log sigma) divided by the two rates."""
    before = parameters(strategy)
    strategy.tell(x, f)
    after = parameters(strategy)
    dimension = len(after[0])
    eta_sigma = (3 + math.log(dimension)) / (5 * math.sqrt(dimension))
    return after[0] - before[0], (after[1] - before[1]) / eta_sigma


def natural_gradient(strategy, draws):
    """Fisher^-1 x the gradient of the core's surrogate; Fisher of (m, log sigma): diag(1/sigma^2, 2)."""
    gradient = torch.autograd.grad(sf.surrogate(draws).mean(), [strategy.location, strategy.log_scale])
    sigma = strategy.log_scale.detach().exp()
    return sigma**2 * gradient[0], gradient[1] / 2


# --- the update is the gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 7, 40])
@pytest.mark.parametrize("values", ["distinct", "tied", "failed"])
def test_tell_follows_the_natural_gradient_of_the_surrogate(dimension, values):
    torch.manual_seed(3)
    sigma0 = torch.rand(dimension, dtype=torch.float64) + 0.3
    strategy = SNES(torch.randn(dimension, dtype=torch.float64), sigma0, popsize=9)
    x = strategy.ask()
    f = x.square().sum(-1)
    if values == "tied":
        f = torch.tensor([1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 5.0, 2.0, 7.0])
    if values == "failed":
        f[2], f[5] = torch.nan, -torch.inf
    expected = natural_gradient(strategy, strategy.scored(x, f))
    mean, log_scale = step(strategy, x, f)
    torch.testing.assert_close(mean, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_scale, expected[1], rtol=1e-12, atol=1e-12)
    assert mean.abs().max() > 1e-3


def test_the_fisher_information_is_what_the_closed_form_inverts():
    strategy = SNES([0.7], 1.6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)  # exact for polynomials of degree 39
    x = 0.7 + 1.6 * torch.tensor(nodes)[:, None]
    scores = torch.stack(
        [
            torch.cat(torch.autograd.grad(strategy.distribution.log_prob(xi), [strategy.location, strategy.log_scale]))
            for xi in x
        ]
    )
    fisher = torch.einsum("n,na,nb->ab", torch.tensor(weights / weights.sum()), scores, scores)
    torch.testing.assert_close(
        fisher, torch.diag(torch.tensor([1.6**-2, 2.0], dtype=torch.float64)), rtol=0, atol=1e-12
    )


def test_expected_step_of_two_points_is_the_one_of_order_statistics():
    """f(x) = x, N = 2, u = (1/2, -1/2): E sum u z = -1/sqrt(pi), and sigma stays; by quadrature over both points."""
    strategy = SNES([2.0], 0.5, popsize=2)
    half, half_weights = np.polynomial.legendre.leggauss(60)
    difference, difference_weights = (
        6 * (half + 1),
        6 * half_weights,
    )  # (z_1 - z_2)/sqrt 2 > 0; the other half by symmetry
    total, total_weights = np.polynomial.hermite_e.hermegauss(6)
    mean = log_scale = mass = 0.0
    for (d, wd), (t, wt) in itertools.product(
        zip(difference, difference_weights, strict=True), zip(total, total_weights, strict=True)
    ):
        z = torch.tensor([[t + d], [t - d]], dtype=torch.float64) / math.sqrt(2)
        weight = 2 * wd * math.exp(-(d**2) / 2) * wt
        x = 2.0 + 0.5 * z
        gradient = natural_gradient(strategy, strategy.scored(x, x[:, 0]))
        mean, log_scale, mass = mean + weight * gradient[0], log_scale + weight * gradient[1], mass + weight
    torch.testing.assert_close(
        mean / mass, torch.tensor([-0.5 / math.sqrt(math.pi)], dtype=torch.float64), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(log_scale / mass, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-10)


def test_unselected_values_move_nothing_on_average():
    """Over all orders of the values the mean step is zero, in the mean and in log sigma (utilities sum to zero)."""
    torch.manual_seed(0)
    x = SNES(torch.zeros(3), 1.0, popsize=5).ask()
    steps = []
    for order in itertools.permutations(range(5)):
        steps.append(torch.cat(step(SNES(torch.zeros(3), 1.0, popsize=5), x, torch.tensor(order))))
    torch.testing.assert_close(torch.stack(steps).mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_distribution_is_a_measure():
    strategy = SNES([1.0, -1.0], [0.5, 2.0])
    draws = sf.draw(strategy.distribution, lambda x: x.square().sum(-1), 50)
    assert draws.x.shape == (50, 2)
    sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean().backward()
    assert strategy.location.grad.shape == strategy.log_scale.grad.shape == (2,)
    points = torch.tensor([[1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    reference = torch.distributions.Normal(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])).log_prob(points).sum(-1)
    torch.testing.assert_close(strategy.distribution.log_prob(points).detach(), reference, rtol=1e-12, atol=0)


def test_making_draws_changes_no_state():
    strategy = SNES([1.0, -1.0], 0.5, seed=0)
    x, before = strategy.ask(), parameters(strategy)
    draws = strategy.scored(x, x.sum(-1))
    assert all(map(torch.equal, before, parameters(strategy)))
    assert strategy.result.evaluations == 0
    assert draws.fx.shape == draws.log_prob.shape == (strategy.popsize, 1)


# --- utilities: ranks, ties and failures -----------------------------------------------------------------------------


def utilities(f):
    strategy = SNES(torch.zeros(2), 1.0, popsize=len(f), seed=0)
    return strategy.scored(strategy.ask(), f).fx.squeeze(-1) / len(f)


def expected_utilities(n):
    height = [max(0.0, math.log(n / 2 + 1) - math.log(k)) for k in range(1, n + 1)]
    return [h / sum(height) - 1 / n for h in height]


def test_published_utilities_lowest_value_first():
    u = expected_utilities(4)
    torch.testing.assert_close(utilities([10.0, -3.0, 5.0, 7.0]).tolist(), [u[3], u[0], u[1], u[2]], rtol=0, atol=1e-15)
    assert u[0] == pytest.approx(0.480423, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_utilities_sum_to_zero_and_their_positive_part_before_centring_to_one(n):
    u = utilities(torch.arange(n))
    assert abs(u.sum()) < 1e-14
    assert (u + 1 / n).sum() == pytest.approx(1.0)
    assert bool((u.diff() <= 0).all())


def test_equal_values_share_the_mean_of_their_utilities():
    u = expected_utilities(5)
    shared = (u[1] + u[2]) / 2
    got = utilities([3.0, 1.0, 3.0, 0.0, 9.0])
    assert got[0] == got[2]
    # values 0, 1, 3, 3, 9 have ranks 1, 2, 3-4, 5
    torch.testing.assert_close(
        got.tolist(), [(u[2] + u[3]) / 2, u[1], (u[2] + u[3]) / 2, u[0], u[4]], rtol=0, atol=1e-15
    )
    torch.testing.assert_close(utilities([2, 2, 1, 5, 5]).tolist()[:2], [shared, shared], rtol=0, atol=1e-15)


def test_failures_rank_last_and_tied_whatever_their_kind():
    u = expected_utilities(5)
    worst = (u[3] + u[4]) / 2
    for failure in (math.nan, math.inf, -math.inf):
        torch.testing.assert_close(
            utilities([failure, 1e300, 2.0, -1e300, math.nan]).tolist(),
            [worst, u[2], u[1], u[0], worst],
            rtol=0,
            atol=1e-15,
        )


@pytest.mark.parametrize("value", [0.0, 1.5, -1e300, math.nan, math.inf, -math.inf])
def test_constant_values_leave_the_parameters_to_the_bit(value):
    strategy = SNES(torch.randn(10), 0.3, seed=1)
    before = parameters(strategy)
    for _ in range(8):
        strategy.tell(strategy.ask(), np.full(strategy.popsize, value))
    assert all(map(torch.equal, before, parameters(strategy)))
    assert not utilities([value] * 7).any()


def test_values_of_any_kind_and_dtype():
    results = []
    for convert in (
        lambda f: f,
        lambda f: f.numpy(),
        lambda f: f.tolist(),
        lambda f: list(f),
        lambda f: f.float(),
        lambda f: f.to(torch.int64),
        lambda f: tuple(np.float32(v) for v in f),
        lambda f: f.clone().requires_grad_(),
    ):
        strategy = SNES([0.0, 0.0], 1.0, seed=0)
        x = strategy.ask()
        strategy.tell(list(x) if len(results) % 2 else x.numpy(), convert((x.sum(-1) * 100).round()))
        results.append(torch.cat(parameters(strategy)))
        assert strategy.location.dtype == strategy.log_scale.dtype == torch.float64
    assert all(torch.equal(result, results[0]) for result in results)


def test_changed_points_are_scored_as_they_are():
    strategy = SNES([1.0, 1.0, 1.0], 2.0, seed=4)
    x = strategy.ask().clamp(min=0.0)  # repaired into the region
    expected = natural_gradient(strategy, strategy.scored(x, x.sum(-1)))
    mean, log_scale = step(strategy, x, x.sum(-1))
    torch.testing.assert_close(mean, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_scale, expected[1], rtol=1e-12, atol=1e-12)
