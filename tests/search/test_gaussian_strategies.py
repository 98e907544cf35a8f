"""XNES and CSANES: the closed forms are the natural gradient, and the step is the one that the docstring writes."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import scorefn as sf
from scorefn.search import CSANES, XNES, SeparableCSANES, minimize
from scorefn.search.normal_draws import orthogonal_directions
from scorefn.search.path_rates import PathRates
from scorefn.shaping import nes_utilities


def valley(x):
    """A rotated, curved valley with its minimum at 1."""
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def advanced(kind, dimension, generations=7, **options):
    """A strategy that has learnt a shape, with a covariance that is not diagonal."""
    strategy = kind(torch.linspace(-1, 2, dimension, dtype=torch.float64), 0.7, seed=4, **options)
    for _ in range(generations):
        x = strategy.ask()
        strategy.tell(x, valley(x))
    return strategy


def factor_of(strategy):
    if isinstance(strategy, XNES):
        return strategy.factor.clone()
    return strategy.state_dict()["factor"] * math.exp(strategy.state_dict()["log_sigma"])


def natural(strategy, x, weights):
    """The natural gradient of ``mean of weights log p`` in the mean and in the covariance."""
    root = torch.linalg.cholesky(factor_of(strategy) @ factor_of(strategy).T)
    p = MultivariateNormal(strategy.mean.clone().requires_grad_(), scale_tril=root.clone().requires_grad_())
    draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), len(x) * weights.unsqueeze(-1))
    found = sf.natural_gradient(p, draws)
    return found["loc"], found["scale_tril"] @ root.T + root @ found["scale_tril"].T


@pytest.mark.parametrize("values", ["distinct", "tied", "failed"])
@pytest.mark.parametrize("dimension", [2, 3, 6])
def test_xnes_follows_the_natural_gradient(dimension, values):
    strategy = advanced(XNES, dimension, eta_sigma=0.2, eta_shape=0.2)
    x = strategy.ask()
    f = valley(x)
    if values == "tied":
        f = torch.arange(len(x), dtype=torch.float64).div(3).floor()
    if values == "failed":
        f[1], f[2] = torch.nan, -torch.inf
    expected, before, mean = natural(strategy, x, nes_utilities(-f)), factor_of(strategy), strategy.mean.clone()
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.mean - mean, expected[0], rtol=1e-9, atol=1e-11)
    lengths, axes = torch.linalg.eigh(torch.linalg.solve(before, strategy.factor))  # exp(eta G / 2)
    gradient = axes @ torch.diag(lengths.log()) @ axes.T * 2 / 0.2
    torch.testing.assert_close(before @ gradient @ before.T, expected[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dimension", [2, 3, 6])
def test_the_mean_of_csanes_follows_the_natural_gradient(dimension):
    strategy = advanced(CSANES, dimension)
    x = strategy.ask()
    f = valley(x)
    weights = torch.empty(len(x), dtype=torch.float64)
    weights[f.argsort()] = PathRates(len(x), dimension, f.device).weights[:, 0]
    expected, mean = natural(strategy, x, weights), strategy.mean.clone()
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.mean - mean, 1.15 * expected[0], rtol=1e-9, atol=1e-11)


class Written:
    """CSANES as its docstring writes it, point by point, in numpy."""

    def __init__(self, mean, sigma, num):
        d = self.d = len(mean)
        self.m, self.sigma, self.b = np.array(mean), sigma, np.eye(d)
        self.p, self.q, self.t, self.s = np.zeros(d), np.zeros(d), 0, np.zeros((d, d))
        r = [math.log((num + 1) / 2) - math.log(k) for k in range(1, num + 1)]
        plus, minus = sum(max(v, 0) for v in r), sum(max(-v, 0) for v in r)
        self.w, self.n = [max(v, 0) / plus for v in r], [max(-v, 0) / minus for v in r]
        mu = 1 / sum(v * v for v in self.w)
        self.kappa = (num / (num - 1) * sum((v - 1 / num) ** 2 for v in self.w)) ** -0.5
        self.c_s = (mu + 2) / (d + mu + 5)
        self.d_s = 1 + self.c_s + 2 * max(0, math.sqrt((mu - 1) / (d + 1)) - 1)
        self.c_c, self.c_1 = (4 + mu / d) / (d + 4 + 2 * mu / d), 4 / ((d + 1.3) ** 2 + mu)
        self.c_mu = mu / (mu + 1.5 * d**1.5)
        self.period = max(1, math.floor(0.1 / (self.c_1 + self.c_mu)))
        lengths = np.linspace(0, 12 + 2 * math.sqrt(d), 400_001)  # of a standard normal vector, by quadrature
        density = lengths ** (d - 1) * np.exp(-(lengths**2) / 2)
        density[0] /= 2  # trapezoids
        density /= density.sum()
        self.chi = (density * lengths).sum()
        u = lengths / self.chi - 1
        self.bend = (density * u * np.abs(u)).sum()

    def shared(self, f, table):
        order = sorted(range(len(f)), key=lambda i: f[i])
        ranks = {i: k for k, i in enumerate(order)}
        return [np.mean([table[ranks[j]] for j in range(len(f)) if f[j] == f[i]]) for i in range(len(f))]

    def tell(self, x, f):
        d, z = self.d, [np.linalg.solve(self.sigma * self.b, xi - self.m) for xi in x]
        w, n = self.shared(f, self.w), self.shared(f, self.n)
        s = sum(wi * zi for wi, zi in zip(w, z, strict=True))
        self.m = self.m + 1.15 * self.sigma * self.b @ s
        self.t += 1
        self.p = (1 - self.c_s) * self.p + self.kappa * math.sqrt(self.c_s * (2 - self.c_s)) * s
        length = math.sqrt(self.p @ self.p / (1 - (1 - self.c_s) ** (2 * self.t)))
        u = length / self.chi - 1
        bent = (u * abs(u) - self.bend) / min(0.44, 1.92 / math.sqrt(d))
        self.sigma *= math.exp(min(1, self.c_s / self.d_s * bent))
        h = length**2 < (2 + 4 / (d + 1)) * d
        self.q = (1 - self.c_c) * self.q + h * self.kappa * math.sqrt(self.c_c * (2 - self.c_c)) * s
        for wi, ni, zi in zip(w, n, z, strict=True):
            self.s += self.c_mu * (wi - ni * min(10, d / (zi @ zi))) * np.outer(zi, zi)
        self.s += self.c_1 * np.outer(self.q, self.q)
        if self.t % self.period == 0:
            change = (self.s - np.trace(self.s) / d * np.eye(d)) / 2
            halvings = 0
            while np.linalg.norm(change) / 2**halvings > 0.5:
                halvings += 1
            small = change / 2**halvings
            self.b = self.b @ np.linalg.matrix_power(np.eye(d) + small + small @ small / 2, 2**halvings)
            self.q = self.q - change @ self.q + change @ change @ self.q / 2
            self.s = np.zeros((d, d))


@pytest.mark.parametrize("dimension", [1, 2, 5, 20, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_csanes_is_what_its_docstring_writes(dimension, ties):
    start = torch.linspace(-1, 2, dimension, dtype=torch.float64)
    strategy = CSANES(start, 0.6, seed=1)
    written = Written(start.numpy(), 0.6, strategy.popsize)
    for _ in range(12):
        x = strategy.ask()
        f = (x - 1).square().sum(-1) + 3 * torch.sin(4 * x).sum(-1)
        f = f.mul(0.5).floor() if ties else f
        strategy.tell(x, f)
        if f.min() < f.max():  # nothing is learnt otherwise
            written.tell(x.numpy(), f.tolist())
        state = strategy.state_dict()
        torch.testing.assert_close(state["mean"], torch.as_tensor(written.m), rtol=1e-7, atol=1e-7)
        assert state["log_sigma"] == pytest.approx(math.log(written.sigma), abs=1e-7)
        torch.testing.assert_close(state["factor"], torch.as_tensor(written.b), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_the_order_in_which_points_are_told_does_not_matter(seed):
    one, other = (CSANES(torch.arange(4.0), 0.7, seed=seed) for _ in range(2))
    x = one.ask()
    other.ask()
    f, turned = valley(x), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    one.tell(x, f)
    other.tell(x[turned], f[turned])
    for name, value in one.state_dict().items():
        if isinstance(value, torch.Tensor) and name != "generator":
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [CSANES, XNES])
def test_points_of_an_earlier_generation_are_taken_as_they_are(kind):
    strategy, fresh = advanced(kind, 3), advanced(kind, 3)
    old = strategy.ask()
    strategy.tell(old, valley(old))
    fresh.tell(fresh.ask(), valley(old))
    strategy.tell(old, valley(old))
    fresh._asked = None
    fresh.tell(old, valley(old))
    assert torch.equal(strategy.mean, fresh.mean)


def test_points_that_were_changed_in_place_are_seen():
    one, other = advanced(CSANES, 3), advanced(CSANES, 3)
    x, y = one.ask(), other.ask().clone()
    x[0] += 0.3
    y[0] += 0.3
    one.tell(x, valley(x))
    other.tell(y, valley(y))
    assert torch.equal(one.mean, other.mean)


def test_a_point_from_far_away_is_pulled_back():
    strategy = advanced(CSANES, 3)
    mean, sigma = strategy.mean.clone(), strategy.sigma.max()
    x = strategy.ask()
    x[0] = 1e8
    f = valley(x)
    f[0] = -1.0
    strategy.tell(x, f)
    assert torch.linalg.vector_norm(strategy.mean - mean) < 10 * sigma
    assert strategy.result.best_x.tolist() == [1e8] * 3


def test_the_mean_itself_may_be_told():
    strategy = advanced(CSANES, 3)
    x = strategy.ask()
    x[:3] = strategy.mean
    strategy.tell(x, valley(x))
    assert strategy.factor.isfinite().all()


@pytest.mark.parametrize(("count", "dimension"), [(3, 7), (7, 7), (9, 4), (1, 5), (5, 1)])
def test_directions_are_orthogonal_and_keep_their_lengths(count, dimension):
    z = orthogonal_directions(count, dimension, torch.Generator().manual_seed(0))
    g = torch.randn((count, dimension), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.norm(dim=1), g.norm(dim=1), rtol=1e-12, atol=0)
    for block in z.split(dimension):
        product = block @ block.T
        torch.testing.assert_close(product, torch.diag(product.diagonal()), rtol=0, atol=1e-12)


def test_directions_are_uniform_on_the_sphere():
    """Fourth moments of unit vectors in 3 dimensions: 1/5 and 1/15; false alarm below 1e-6 for each of the means."""
    generator = torch.Generator().manual_seed(2)
    z = torch.cat([orthogonal_directions(3, 3, generator)[2:] for _ in range(20_000)])  # the last depends on the others
    unit = z / z.norm(dim=1, keepdim=True)
    for value, expected in [
        (unit[:, 0] ** 4, 1 / 5),
        (unit[:, 1] ** 4, 1 / 5),
        (unit[:, 0] ** 2 * unit[:, 2] ** 2, 1 / 15),
        (unit[:, 0] ** 3 * unit[:, 1], 0.0),
        (unit[:, 2], 0.0),
    ]:
        assert abs(value.mean() - expected) < 4.9 * value.std() / math.sqrt(len(value))


def test_paths_have_unit_variance_under_random_ranks_and_sigma_does_not_drift():
    """kappa: the covariance of kappa s is the identity, averaged over all orders; by enumeration of w over ranks."""
    for num in (4, 6, 14):
        rates = PathRates(num, 5, torch.device("cpu"))
        w = rates.weights[:, 0]
        # s = sum over pairs of (w_a - w_b) z: E (w_a - w_b)^2 over ranks drawn without replacement, times N/2 pairs
        square = sum((w[a] - w[b]) ** 2 for a in range(num) for b in range(num) if a != b) / (num * (num - 1))
        assert float(rates.kappa**2 * square * num / 2) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 2, 5, 30])
def test_the_mean_length_and_the_centre_of_the_step_size_are_those_of_a_normal_vector(dimension):
    lengths = torch.linspace(0, 12 + 2 * math.sqrt(dimension), 1_000_001, dtype=torch.float64)
    density = ((dimension - 1) * lengths.clamp(min=1e-300).log() - lengths.square() / 2).exp()
    density[0] = density[0] / 2 if dimension == 1 else 0  # trapezoids
    density /= density.sum()
    rates = PathRates(8, dimension, torch.device("cpu"))
    assert rates.chi == pytest.approx(float((density * lengths).sum()), rel=1e-8)
    u = lengths / rates.chi - 1
    assert rates.bend == pytest.approx(float((density * u * u.abs()).sum()), abs=1e-8)


@pytest.mark.parametrize("popsize", [None, 30])
@pytest.mark.parametrize("kind", [CSANES, XNES])
def test_a_resumed_run_is_the_same_to_the_bit(kind, popsize):
    whole, first = advanced(kind, 12, popsize=popsize), advanced(kind, 12, popsize=popsize)
    other = kind(torch.zeros(12), 1.0)
    other.load_state_dict(first.state_dict())
    for _ in range(30):
        x, y = whole.ask(), other.ask()
        assert torch.equal(x, y)
        whole.tell(x, valley(x))
        other.tell(y, valley(y))
    assert torch.equal(whole.mean, other.mean)


@pytest.mark.parametrize("kind", [CSANES, XNES])
def test_flat_generations_change_nothing(kind):
    strategy = advanced(kind, 4)
    before = strategy.state_dict()
    for _ in range(2):
        strategy.tell(strategy.ask(), torch.full((strategy.popsize,), 3.0))
    after = strategy.state_dict()
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and name != "generator":
            assert torch.equal(value, after[name])
    assert strategy.stop == {"tolflatfitness": 1}


@pytest.mark.parametrize(
    ("kind", "popsize", "message"),
    [
        (CSANES, 7, "popsize must be even, but it is 7: points come in mirrored pairs. Use 6 or 8"),
        (CSANES, 2, "at least 4, but it is 2"),
        (XNES, 1, "at least 2, but it is 1"),
        (CSANES, 4.0, r"at least 4, but it is 4\.0"),
    ],
)
def test_population_sizes_that_cannot_be(kind, popsize, message):
    with pytest.raises(sf.ScorefnError, match=message):
        kind([0.0, 0.0], 1.0, popsize=popsize)


@pytest.mark.parametrize("kind", [CSANES, XNES])
def test_one_coordinate(kind):
    strategy = kind([3.0], 1.0, seed=0, ftarget=1e-10)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, (x - 1).square().sum(-1))
    assert strategy.stop == {"ftarget": 1e-10}


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_csanes_learns_a_rotated_ellipsoid(angle):
    """SNES cannot; the number of evaluations is what it was when this was written, to a quarter."""
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    spent = []
    for seed in range(5):
        strategy = CSANES([2.0, -1.0], 1.0, seed=seed, ftarget=1e-9)
        while not strategy.stop:
            x = strategy.ask()
            y = x @ rotation.T
            strategy.tell(x, y[:, 0].square() + 1e6 * y[:, 1].square())
        assert strategy.stop == {"ftarget": 1e-9}
        spent.append(strategy.result.evaluations)
    assert sum(spent) / len(spent) < 900


@pytest.mark.parametrize("kind", [XNES, SeparableCSANES])
def test_points_from_far_away_do_not_blow_the_distribution_up(kind):
    strategy = kind([0.0, 1.0, 2.0], 0.5, seed=0)
    for shift in (0.0, 50.0, -1e6):
        x = strategy.ask() + shift
        strategy.tell(x, valley(x))
    assert 1e-6 < strategy.sigma.min() <= strategy.sigma.max() < 1e6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("optimum", [3.0, 0.3])
def test_a_run_in_a_box_ends_with_a_result(seed, optimum):
    result = minimize(lambda x: ((x - optimum) ** 2).sum(), [0.0] * 3, 0.5, method="xnes", bounds=(-1, 1), seed=seed)
    assert result.stop
    assert abs(result.x - min(optimum, 1.0)).max() < 1e-4
