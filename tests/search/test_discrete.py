"""Bernoulli, categorical and integer search: the step is the natural gradient, margins hold, drift does not win."""

import io
import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent

import scorefn as sf
from scorefn.search import BernoulliSearch, CategoricalSearch, IntegerSearch
from scorefn.search.factors import chosen
from scorefn.search.ranking import Ranking
from scorefn.search.trust_region import TrustRegion

MAKERS = {
    "bernoulli": lambda **options: BernoulliSearch(6, popsize=9, **options),
    "categorical": lambda **options: CategoricalSearch([3, 2, 5], popsize=9, **options),
    "integer": lambda **options: IntegerSearch([-3, 0], [4, 2], popsize=9, **options),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def table(strategy):
    """P of every value, a row for each coordinate."""
    rows = strategy.probabilities
    return [torch.stack([1 - p, p]) for p in rows] if isinstance(rows, torch.Tensor) else rows


def moved(strategy, x, f):
    """The change of q by one generation."""
    before = torch.cat(table(strategy))
    strategy.tell(x, f)
    return torch.cat(table(strategy)) - before


# --- the step is the natural gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["distinct", "tied", "failed"])
def test_bernoulli_steps_along_the_natural_gradient_of_the_same_draws(values):
    p0 = torch.tensor([0.3, 0.5, 0.62, 0.4], dtype=torch.float64)
    strategy = BernoulliSearch(4, p0=p0, margin=0.01, popsize=9, seed=1)
    x = strategy.ask()
    f = torch.arange(9.0)
    if values == "tied":
        f = torch.tensor([1.0, 1, 0, 0, 3, 3, 3, 2, 9])
    if values == "failed":
        f[2] = torch.nan
    p = Independent(Bernoulli(probs=p0.clone().requires_grad_()), 1)
    u = len(f) * sf.shaping.nes_utilities(-f.double())
    draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), u.unsqueeze(-1))
    g = sf.natural_gradient(p, draws)["probs"]
    length = (g.square() / (p0 * (1 - p0))).sum().sqrt()
    strategy.tell(x, f)
    radius = 0.05  # the first step has Fisher length 1, which ends at a margin: compare one that does not
    inside = BernoulliSearch(4, p0=p0, margin=0.01, popsize=9, seed=1)
    inside._state = {**inside._state, "radius": radius}
    inside.tell(x, f)
    torch.testing.assert_close(inside.probabilities - p0, radius * g / length, rtol=0, atol=1e-10)


def test_categorical_steps_along_the_natural_gradient_of_the_same_draws():
    q0 = [[0.2, 0.5, 0.3], [0.25, 0.25, 0.5]]
    strategy = CategoricalSearch([3, 3], q0=q0, margin=0.01, popsize=12, seed=0)
    strategy._state = {**strategy._state, "radius": 0.03}
    x = strategy.ask()
    f = (x[:, 0] - 2 * x[:, 1]).double() + torch.arange(12) / 100
    q = torch.tensor(q0, dtype=torch.float64)
    p = Independent(Categorical(probs=q.clone().requires_grad_()), 1)
    u = len(f) * sf.shaping.nes_utilities(-f)
    g = sf.natural_gradient(p, sf.Draws(x, p.log_prob(x).unsqueeze(-1), u.unsqueeze(-1)))["probs"]
    length = (g.square() / q).sum().sqrt()
    change = moved(strategy, x, f).view(2, 3)
    torch.testing.assert_close(change, 0.03 * g / length, rtol=0, atol=1e-10)


def test_the_whitened_gradient_has_the_fisher_length():
    """|s|^2 = g^T F g with F of (q_1, ..., q_{K-1}), by enumeration of the score's covariance."""
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    free = q[:2].clone().requires_grad_()
    log_q = torch.cat([free, 1 - free.sum(0, keepdim=True)]).log()
    scores = torch.stack([torch.autograd.grad(entry, free, retain_graph=True)[0] for entry in log_q])
    fisher = torch.einsum("k,ka,kb->ab", q, scores, scores)
    g = torch.tensor([0.4, -0.1, -0.3], dtype=torch.float64)
    torch.testing.assert_close((g / q.sqrt()).square().sum(), g[:2] @ fisher @ g[:2], rtol=1e-12, atol=0)


def test_the_expected_gradient_is_that_of_expected_utility():
    """u(x) fixed on all points of a small space: sum_x p(x) u(x) (e(x) - q) is F^-1 grad E u, by enumeration."""
    q0 = [[0.2, 0.5, 0.3], [0.6, 0.4]]
    points = torch.tensor(list(itertools.product(range(3), range(2))))
    u = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0, 0.7], dtype=torch.float64)
    logits = [torch.tensor(row, dtype=torch.float64).log().requires_grad_() for row in q0]

    def chance():
        return math.prod(row.softmax(0)[points[:, i]] for i, row in enumerate(logits))

    gradient = torch.autograd.grad((chance() * u).sum(), logits)  # in logits: F^-1 g has e - q as its image in q
    weights = (chance() * u).detach()
    q = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]], dtype=torch.float64)
    got = chosen(points.double(), weights, 3) - weights.sum() * q
    for row, (expected, count) in enumerate(zip(gradient, (3, 2), strict=True)):
        torch.testing.assert_close(got[row, :count], expected, rtol=0, atol=1e-12)


def test_integer_cells_and_scores_are_those_of_the_rounded_normal():
    strategy = IntegerSearch([-2, 0], [3, 2], x0=[0.3, 1.2], sigma0=[1.1, 0.6])
    m = strategy.location.clone().requires_grad_()
    log_s = strategy._state["log_scale"].clone().requires_grad_()
    found = strategy._cells()
    for row, (low, high) in enumerate([(-2, 3), (0, 2)]):
        edges = torch.tensor([-1e3, *[k + 0.5 for k in range(low, high)], 1e3], dtype=torch.float64)
        chance = torch.special.ndtr((edges - m[row]) / log_s[row].exp()).diff()
        for k, entry in enumerate(chance):
            by_m, by_log_s = torch.autograd.grad(entry, (m, log_s), retain_graph=True)
            got = torch.stack([part[row, k] for part in found])
            torch.testing.assert_close(got, torch.stack([entry.detach(), by_m[row], by_log_s[row]]), rtol=0, atol=1e-13)
    assert all((part[1, 3:] == 0).all() for part in found)


def test_integer_steps_along_the_score_whitened_by_the_normals_fisher():
    strategy = IntegerSearch([-20], [20], x0=[0.3], sigma0=2.5, popsize=8, seed=0)
    strategy._state = {**strategy._state, "radius": 0.1}
    x = strategy.ask()
    f = (x[:, 0] - 4).abs() + torch.arange(8) / 100
    m, log_s = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, math.log(2.5)))
    log_p = sum(
        u * (torch.special.ndtr((k + 0.5 - m) / log_s.exp()) - torch.special.ndtr((k - 0.5 - m) / log_s.exp())).log()
        for u, k in zip(sf.shaping.nes_utilities(-f), x[:, 0], strict=True)
    )
    by_m, by_log_s = torch.autograd.grad(log_p.sum(), (m, log_s))
    length = ((2.5 * by_m).square() + by_log_s.square() / 2).sqrt()
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.location, (m + 0.1 * 2.5**2 * by_m / length).detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(strategy.sigma, (log_s + 0.1 * by_log_s / 2 / length).exp().detach(), rtol=0, atol=1e-10)


# --- the trust region ------------------------------------------------------------------------------------------------


def test_the_radius_grows_on_one_direction_and_shrinks_on_alternating_ones():
    same = turning = TrustRegion(torch.zeros(10, dtype=torch.float64), radius=0.5)
    direction = torch.linspace(1, 2, 10, dtype=torch.float64)
    for sign in (1, -1) * 60:
        step, same = same.step(direction, 10)
        _, turning = turning.step(sign * direction, 10)
        assert 0 < step.norm() <= math.sqrt(10) + 1e-12
    assert same.radius == pytest.approx(2 / 2.3 * math.sqrt(10), rel=1e-6)  # where |p|^2 = (2 - b)/b = 1.3
    assert turning.radius < 0.1


def test_the_path_of_independent_directions_has_the_expected_square_weight():
    """E|p|^2 = w when unit vectors are uncorrelated: by all signs of orthonormal pairs, at a fixed rate."""
    region = TrustRegion(torch.zeros(1, dtype=torch.float64), radius=0.5)
    total = 0.0
    for signs in itertools.product((1.0, -1.0), repeat=3):
        path, weight = torch.zeros(1, dtype=torch.float64), 0.0
        for sign in signs:
            _, after = TrustRegion(path, weight, region.radius).step(torch.tensor([sign], dtype=torch.float64), 4)
            path, weight = after.path, after.weight
        total += float(path.square()) / 8
    assert total == pytest.approx(weight, abs=1e-12)


# --- margins, ties, failures -----------------------------------------------------------------------------------------


@each
def test_margins_hold_while_one_point_is_always_best(make):
    strategy = make(seed=0)
    margin = strategy._settings["margin"]
    target = strategy.ask()[0]
    for _ in range(300):
        x = strategy.ask()
        strategy.tell(x, (x != target).sum(1) + torch.arange(len(x)) / 100)
    assert torch.equal(strategy.mean, target)
    for row in table(strategy):
        assert float(row.sum()) == pytest.approx(1, abs=1e-12)
        assert float(row.min()) > 0
        least = margin / 2 if isinstance(strategy, IntegerSearch) else margin
        assert 1 - float(row.max()) >= least - 1e-12
        if isinstance(strategy, CategoricalSearch):
            assert float(row.min()) >= margin / (len(row) - 1) - 1e-12


@each
def test_a_flat_generation_leaves_the_distribution_to_the_bit(make):
    strategy = make(seed=0)
    strategy.tell(strategy.ask(), torch.arange(9.0))
    before = {
        name: value for name, value in strategy.state_dict().items() if name not in ("progress", "generator", "asked")
    }
    for f in (torch.ones(9), torch.full((9,), torch.nan)):
        strategy.tell(strategy.ask(), f)
    after = strategy.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value


@each
def test_identical_points_with_noisy_values_teach_nothing(make):
    strategy = make(seed=0)
    x = strategy.ask()[:1].expand(9, -1)
    before = torch.cat(table(strategy))
    strategy.tell(x, torch.arange(9.0))
    assert torch.equal(torch.cat(table(strategy)), before)


@each
def test_failures_rank_last_and_persisting_ones_are_an_error(make):
    one, other = make(seed=0, tolfailed=3), make(seed=0)
    x = one.ask()
    f = torch.tensor([4.0, torch.nan, 1, 0, torch.inf, 2, 3, 6, -torch.inf])
    one.tell(x, f)
    other.tell(x, torch.where(f.isfinite(), f, 9.0))
    assert torch.equal(torch.cat(table(one)), torch.cat(table(other)))
    assert one.result.failed == 3
    for _ in range(2):
        one.tell(x, torch.full((9,), torch.nan))
    with pytest.raises(sf.NonFiniteError, match="3 generations in a row"):
        one.tell(x, torch.full((9,), torch.nan))


def test_drift_of_bits_that_do_not_matter_loses_nothing():
    """OneMax on half of the bits carries some of the others to a margin, where both values are still drawn."""
    strategy = BernoulliSearch(40, seed=3, tolstagnation=0)
    for _ in range(150):
        x = strategy.ask()
        strategy.tell(x, -x[:, :20].sum(1))
    p = strategy.probabilities
    assert (p[:20] == 1 - 1 / 40).all()
    assert (p[20:] == 1 / 40).any()
    assert (p >= 1 / 40).all()
    best = 0.0
    for _ in range(200):  # now they matter
        x = strategy.ask()
        strategy.tell(x, -x.sum(1))
        best = max(best, float(x.sum(1).max()))
    assert best == 40


def test_pure_noise_shrinks_the_trust_region_and_leaves_the_bits_undecided():
    strategy = BernoulliSearch(50, seed=0)
    noise = torch.Generator().manual_seed(0)
    walked = 0.0  # square Fisher length
    for _ in range(400):
        walked += strategy._state["radius"] ** 2
        strategy.tell(strategy.ask(), torch.randn(strategy.popsize, generator=noise))
    # E|p|^2 = w under noise, so dr/dt = -(1 - 1/1.3) r^2/sqrt(n): the integral of r^2 is sqrt(n)/(1 - 1/1.3), for ever
    assert walked < 1.5 * math.sqrt(50) / (1 - 1 / 1.3)
    assert strategy._state["radius"] < 0.2


def test_neutral_selection_moves_nothing_on_average():
    """Over all orders of the values the gradient is zero: utilities sum to zero."""
    strategy = CategoricalSearch([3, 2], popsize=4, seed=2)
    x = strategy.ask().double()
    total = sum(
        chosen(x, Ranking(torch.tensor(order, dtype=torch.float64)).hand_out(sf.shaping.utilities_by_rank(4)), 3)
        for order in itertools.permutations(range(4))
    )
    torch.testing.assert_close(total, torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-14)


# --- resume ----------------------------------------------------------------------------------------------------------


@each
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(make):
    strategy = make(seed=5)
    for _ in range(3):
        strategy.tell(strategy.ask(), torch.arange(9.0))
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    resumed = make(seed=0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        x, y = strategy.ask(), resumed.ask()
        assert torch.equal(x, y)
        assert x.dtype == y.dtype
        strategy.tell(x, x.double().square().sum(1))
        resumed.tell(y, y.double().square().sum(1))
    assert torch.equal(torch.cat(table(strategy)), torch.cat(table(resumed)))
    assert resumed.result.evaluations == 54


# --- convergence -----------------------------------------------------------------------------------------------------


def evaluations(f, target, seeds):
    counts = []
    for seed in seeds:
        strategy = BernoulliSearch(100, seed=seed, ftarget=target)
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, f(x))
        assert "ftarget" in strategy.stop
        counts.append(strategy.result.evaluations)
    return sum(counts) / len(counts)


def test_onemax():
    """Measured: 507 +- 11 (40 seeds)."""
    assert evaluations(lambda x: -x.sum(1), -100, range(15)) <= 550


@pytest.mark.slow
def test_leading_ones():
    """Measured: 6800 +- 220."""
    assert evaluations(lambda x: -x.cumprod(1).sum(1), -100, range(15)) <= 14_000


def test_integer_sphere_wide_narrow_and_at_the_bounds():
    for bound, dimension in ((1, 20), (10, 8), (1000, 4)):
        target = torch.tensor([-bound, bound] * (dimension // 2))
        target[0] = 0
        strategy = IntegerSearch(
            [-bound] * dimension, [bound] * dimension, seed=0, ftarget=0, maxfevals=5000, tolstagnation=0
        )
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, (x - target).square().sum(1))
        assert "ftarget" in strategy.stop
        assert torch.equal(strategy.result.best_x, target.double())


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    (lambda: BernoulliSearch(0), "at least 1"),
    (lambda: BernoulliSearch(2.5), "at least 1"),
    (lambda: BernoulliSearch(3, p0=[0.5, 0.5]), "3 bits"),
    (lambda: BernoulliSearch(3, p0=1.0), "between 0 and 1"),
    (lambda: BernoulliSearch(10, p0=0.01), "none may be below 0.1"),
    (lambda: BernoulliSearch(3, margin=0.5), "between 0 and 0.5"),
    (lambda: BernoulliSearch(3, popsize=1), "popsize must be an integer of at least 2"),
    (lambda: BernoulliSearch(3, sigma=1.0), "no option 'sigma'"),
    (lambda: CategoricalSearch([3, 1]), "at least 2"),
    (lambda: CategoricalSearch([]), "at least 2"),
    (lambda: CategoricalSearch([2.5]), "at least 2"),
    (lambda: CategoricalSearch([3], q0=[[0.5, 0.5]]), "3 values"),
    (lambda: CategoricalSearch([2], q0=[[0.7, 0.7]]), "sum to 1"),
    (lambda: CategoricalSearch([2, 2], q0=[[0.5, 0.5]]), "1 rows"),
    (lambda: IntegerSearch([3], [1]), "crossed"),
    (lambda: IntegerSearch([1], [1]), "crossed or leave a single value"),
    (lambda: IntegerSearch([0.5], [3]), "integers"),
    (lambda: IntegerSearch([0], [math.inf]), "integers"),
    (lambda: IntegerSearch([0, 0], [3]), "lower has 2 numbers and upper 1"),
    (lambda: IntegerSearch(0, [3]), r"\[D\]"),
    (lambda: IntegerSearch([0], [3], x0=[4.0]), "start inside"),
    (lambda: IntegerSearch([0], [3], sigma0=0.0), "sigma0 must be positive"),
    (lambda: IntegerSearch([0], [3], margin=1.0), "between 0 and 1"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(sf.ScorefnError, match=message):
        make()


@each
def test_points_outside_the_space_are_refused_and_nothing_changes(make):
    strategy = make(seed=0)
    x = strategy.ask().double()
    before = strategy.state_dict()
    for value, message in ((0.5, "value 0.5"), (7.0, "value 7"), (-9.0, "value -9"), (math.nan, "not finite")):
        bad = x.clone()
        bad[3, 1] = value
        with pytest.raises(sf.ScorefnError, match=message):
            strategy.tell(bad, torch.arange(9.0))
        with pytest.raises(sf.ScorefnError, match=message):  # also where there is nothing to learn
            strategy.tell(bad, torch.ones(9))
    with pytest.raises(sf.ShapeError, match="whole generation"):
        strategy.tell(x[:5], torch.arange(9.0))
    with pytest.raises(sf.ShapeError, match="one value per point|must be"):
        strategy.tell(x, torch.arange(5.0))
    after = strategy.state_dict()
    assert torch.equal(before["path"], after["path"])
    assert after["progress"]["evaluations"] == 0


@each
def test_a_state_of_another_search_is_refused(make):
    with pytest.raises(sf.ScorefnError, match="no state of"):
        make().load_state_dict({"strategy": "SNES"})
