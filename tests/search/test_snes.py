"""SNES: the update is the natural score-function gradient, and ranks, ties and failures mean what they should."""

import io
import itertools
import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import SNES


def parameters(strategy):
    return strategy.location.detach().clone(), strategy.log_scale.detach().clone()


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


# --- randomness and resuming -----------------------------------------------------------------------------------------


def sphere(x):
    return x.square().sum(-1)


def run(strategy, generations):
    for _ in range(generations):
        x = strategy.ask()
        strategy.tell(x, sphere(x))
    return strategy


def test_one_seed_reproduces_the_run():
    first, second, third = (run(SNES([1.0, 2.0], 0.5, seed=seed), 5).location for seed in (7, np.int64(7), 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_without_a_seed_the_global_generator_decides_and_with_one_it_is_left_alone():
    torch.manual_seed(5)
    first = SNES([1.0, 2.0], 0.5).ask()
    torch.manual_seed(5)
    assert torch.equal(first, SNES([1.0, 2.0], 0.5).ask())
    state = torch.get_rng_state()
    run(SNES([1.0, 2.0], 0.5, seed=0), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_as_seed_gives_each_strategy_its_own_stream():
    generator = torch.Generator().manual_seed(0)
    first, second = SNES([0.0], 1.0, seed=generator).ask(), SNES([0.0], 1.0, seed=generator).ask()
    assert not torch.equal(first, second)
    assert torch.equal(first, SNES([0.0], 1.0, seed=torch.Generator().manual_seed(0)).ask())


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit():
    limits = {"ftarget": 1e-8, "popsize": 9, "eta_mean": 0.9}
    whole = SNES([1.0, 2.0, 3.0], 0.5, seed=0, **limits)
    run(whole, 15).ask()  # also between ask and tell
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    run(whole, 30)
    resumed = SNES([0.0, 0.0, 0.0], 9.0, seed=99, ftarget=1e-8)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.result.iterations == 15
    run(resumed, 30)
    while not whole.stop:
        run(whole, 1)
        run(resumed, 1)
    assert all(map(torch.equal, parameters(whole), parameters(resumed)))
    assert torch.equal(whole.ask(), resumed.ask())
    assert (whole.stop, whole.result.evaluations, whole.result.best_f) == (
        resumed.stop,
        resumed.result.evaluations,
        resumed.result.best_f,
    )
    assert torch.equal(whole.result.best_x, resumed.result.best_x)


def test_a_state_dict_is_a_copy_and_a_stopped_search_loads_as_stopped():
    strategy = run(SNES([1.0, 2.0], 0.5, seed=0, ftarget=1e3), 1)
    state = strategy.state_dict()
    kept = state["location"].clone()
    run(strategy, 3)
    assert torch.equal(state["location"], kept)
    resumed = SNES([0.0, 0.0], 1.0, ftarget=1e3)
    resumed.load_state_dict(state)
    assert resumed.stop == {"ftarget": 1e3}


def test_a_resumed_search_knows_how_wide_it_began():
    def slope(strategy):
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, x.sum(-1))
        return strategy

    state = run(SNES([1.0, 2.0], 1e-3, seed=0), 1).state_dict()
    resumed = SNES([0.0, 0.0], 1.0)
    resumed.load_state_dict(state)
    assert slope(resumed).stop == {"tolfacupx": 1e3}
    assert resumed.result.sigma.max() < 100


def test_a_foreign_state_is_refused_and_nothing_changes():
    strategy = SNES([1.0, 2.0], 0.5, seed=0)
    before = parameters(strategy)
    with pytest.raises(sf.ScorefnError, match=r"location has shape \(3,\), but this search has shape \(2,\)"):
        strategy.load_state_dict(SNES([0.0] * 3, 1.0).state_dict())
    with pytest.raises(sf.ScorefnError, match=r"no state of SNES.*'XNES'.*SNES\.state_dict\(\)"):
        strategy.load_state_dict({**strategy.state_dict(), "strategy": "XNES"})
    with pytest.raises(sf.ScorefnError, match="no state of SNES"):
        strategy.load_state_dict({"strategy": "SNES"})
    assert all(map(torch.equal, before, parameters(strategy)))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0, 1.0]], 1.0), sf.ShapeError, r"one point of shape \[D\], but it has shape \(1, 2\).*Flatten it"),
        ((torch.zeros(2, 2), 1.0), sf.ShapeError, r"\(2, 2\)"),
        ((3.0, 1.0), sf.ShapeError, r"shape \(\)"),
        (([], 1.0), sf.ShapeError, r"shape \(0,\)"),
        (([[1.0], [1.0, 2.0]], 1.0), sf.ShapeError, "ragged"),
        (([0.0, math.nan], 1.0), sf.NonFiniteError, r"not finite at coordinates \[1\]"),
        (([math.inf], 1.0), sf.NonFiniteError, r"\[0\]"),
        ((["a"], 1.0), sf.ScorefnError, "x0 must hold real numbers"),
        (([1j], 1.0), sf.ScorefnError, "x0 must hold real numbers"),
        ((torch.zeros(2, dtype=torch.cfloat), 1.0), sf.ScorefnError, "x0 is complex"),
        (([0.0], 0.0), sf.ScorefnError, "sigma0 must be positive and finite, but it is 0.0.*quarter"),
        (([0.0], -1.0), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0], math.nan), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0, 0.0], [1.0, 0.0]), sf.ScorefnError, "sigma0 must be positive"),
        (([0.0, 0.0], [1.0, 1.0, 1.0]), sf.ShapeError, r"sigma0 has shape \(3,\), but x0 has shape \(2,\)"),
    ],
)
def test_starts_and_step_sizes_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        SNES(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"popsize": 1}, "popsize must be an integer of at least 2, but it is 1: fewer points cannot be ranked"),
        ({"popsize": 4.0}, "popsize must be an integer"),
        ({"popsize": True}, "popsize must be an integer"),
        ({"seed": 1.5}, r"seed must be an integer, a torch\.Generator or None, but it is 1\.5"),
        ({"seed": np.random.default_rng(0)}, "seed must be an integer"),
        ({"eta_mean": 0.0}, "eta_mean must be a positive number"),
        ({"eta_sigma": math.nan}, "eta_sigma must be a positive number"),
        ({"ftarget": math.nan}, "ftarget must be a number, but it is nan.*None for no target"),
        ({"tolx": math.nan}, "tolx must be a number.*0 to switch"),
        ({"tolx": None}, "tolx must be a number"),
        ({"tolfun": -1.0}, "tolfun must be at least 0"),
        ({"maxiter": 0}, "maxiter must be at least 1"),
        ({"maxfevals": 5}, "maxfevals=5 does not pay for one generation of 6 points: raise it, or lower popsize"),
        (
            {"pop_size": 8},
            r"SNES has no option 'pop_size'.*It knows popsize, eta_mean, .*, ftarget, maxfevals, .*tolfailed\.",
        ),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        SNES([0.0, 0.0], 1.0, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, f: (x, f[:-1]),
            sf.ShapeError,
            r"must be \[N\] = \(6,\), but they have shape \(5,\)\. Give one value",
        ),
        (
            lambda x, f: (x, f[:, None]),
            sf.ShapeError,
            r"shape \(6, 1\)\. The trailing 1 would broadcast.*squeeze\(-1\)",
        ),
        (lambda x, f: (x, f.numpy()[:, None].tolist()), sf.ShapeError, r"\(6, 1\)"),
        (lambda x, f: (x, f.sum()), sf.ShapeError, r"shape \(\)"),
        (lambda x, f: (x, None), sf.ScorefnError, "f must hold real numbers, but it holds object.*Tell NaN"),
        (lambda x, f: (x, [None] * 6), sf.ScorefnError, "f must hold real numbers"),
        (lambda x, f: (x, f.to(torch.cfloat)), sf.ScorefnError, "f is complex"),
        (lambda x, f: (x[:-1], f[:-1]), sf.ShapeError, r"whole generation, \[N, D\] = \(6, 2\).*has shape \(5, 2\)"),
        (lambda x, f: (x[:, 0], f), sf.ShapeError, r"has shape \(6,\)"),
        (lambda x, f: (x.T, f), sf.ShapeError, r"has shape \(2, 6\)"),
        (lambda x, f: ([*list(x)[:-1], x[0, :1]], f), sf.ShapeError, "list of tensors of different shapes"),
        (lambda x, f: (x.where(x != x[3], torch.nan), f), sf.NonFiniteError, r"points are not finite in rows \[3\]"),
        (lambda x, f: (x * 1e200, f), sf.NonFiniteError, "mean or sigma infinite.*too many standard deviations away"),
    ],
)
def test_a_generation_that_does_not_fit_is_refused_and_nothing_changes(change, error, message):
    strategy = run(SNES([0.0, 0.0], 1.0, seed=0), 2)
    x, state = strategy.ask(), strategy.state_dict()
    with pytest.raises(error, match=message):
        strategy.tell(*change(x, sphere(x)))
    for name, value in strategy.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name
    assert strategy.result.evaluations == 12


def test_generations_without_a_finite_value_are_counted_and_at_last_refused():
    strategy = SNES([0.0, 0.0], 1.0, seed=0)
    for _ in range(9):
        strategy.tell(strategy.ask(), [math.nan] * 6)
    assert strategy.result.failed == strategy.result.evaluations == 54
    assert strategy.result.best_x is None
    with pytest.raises(sf.NonFiniteError, match=r"10 generations in a row had no finite value.*lower sigma0"):
        strategy.tell(strategy.ask(), [math.nan] * 6)
    assert strategy.result.failed == 54
    run(strategy, 1)  # one good generation, and the count starts afresh
    for _ in range(9):
        strategy.tell(strategy.ask(), [math.inf] * 6)
    assert strategy.result.failed == 108


def test_repr_says_where_the_search_stands():
    assert repr(run(SNES([1.0, 1.0], 1.0, seed=0), 3)).startswith(
        "SNES(dimension=2, popsize=6, evaluations=18, best_f="
    )


@pytest.mark.parametrize("name", ["log_scale", "sigma0", "generator"])
def test_a_state_that_does_not_fit_changes_nothing(name):
    strategy = SNES([1.0, -1.0], 0.5, seed=0)
    x = strategy.ask()
    strategy.tell(x, x.square().sum(-1))
    bad = strategy.state_dict()
    bad["location"] = bad["location"] + 1.0
    bad[name] = torch.zeros(3, dtype=torch.uint8 if name == "generator" else torch.float64)
    before, generator = parameters(strategy), strategy.state_dict()["generator"]
    with pytest.raises(sf.ScorefnError, match="generator" if name == "generator" else r"shape \(3,\)"):
        strategy.load_state_dict(bad)
    assert all(map(torch.equal, before, parameters(strategy)))
    assert torch.equal(strategy.state_dict()["generator"], generator)
