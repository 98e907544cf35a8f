"""DisARM, ARMS and CARMS: exact certificates over their own uniforms, exact variances, extremes."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

import scorefn as sf
from scorefn.estimators import antithetic
from tests.estimators.discrete_problems import Axis, Script, cells, check_exact, orders, problem, product
from tests.oracles.tolerances import near
from tests.oracles.toys import coordinates


def script_of_coins(p, pairs):
    """All cells of the uniforms of pairs, p `[B, D]`: the script, and the weight of each tuple."""
    sites = p.shape[-1]
    axes = [cells(torch.stack((p[:, d], 1 - p[:, d]))) for _ in range(pairs) for d in range(sites)]
    values, weight = product(axes)
    return Script(torch.stack(values, -1).unflatten(-1, (pairs, sites)).movedim(-2, 0)), weight


def roundings(p, n):
    """All cells of the uniform that rounds r p, for every r up to n, `[B]`."""
    return cells(torch.stack([r * p - (r * p).floor() for r in range(1, n + 1)]))


def script_of_blocks(p, n):
    """All cells of one block of n draws at p `[B, D]`."""
    sites = p.shape[-1]
    values, weight = product([roundings(p[:, d], n) for d in range(sites)] + [orders(n)] * sites)
    rounding, order = torch.stack(values[:sites], -1), torch.stack(values[sites:], 2)
    return Script(rounding.unsqueeze(0), order.unsqueeze(0)), weight


def nodes(masses):
    """The coins of a balanced tree, level by level from the top: p of the left child, `[B]` each."""
    levels = []
    while masses.shape[-1] > 1:
        even = masses.shape[-1] // 2 * 2
        left, right = masses[..., 0:even:2], masses[..., 1:even:2]
        levels.append(left / (left + right))
        masses = torch.cat((left + right, masses[..., even:]), -1)
    return levels[::-1]


def script_of_trees(pi, n):
    """All cells of one block of n draws at pi `[B, D, C]`."""
    sites = pi.shape[1]
    levels = nodes(pi)
    axes = [roundings(level[:, d, k], n) for level in levels for d in range(sites) for k in range(level.shape[-1])]
    ranks = [orders(n)] * sites
    if n == 2:  # the other problem's order is the same one
        ranks = [Axis(rank.values, rank.weight) for rank in ranks]
    values, weight = product(axes + ranks)
    prepared = []
    for level in levels:
        size = sites * level.shape[-1]
        prepared.append(torch.stack(values[:size], -1).unflatten(-1, (sites, -1)).unsqueeze(0))
        values = values[size:]
    return Script(*prepared, torch.stack(values, 2).unsqueeze(0)), weight


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("pairs", "sites"), [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_disarm_of_coins_is_exact(monkeypatch, pairs, sites, joined):
    given = problem(Bernoulli, sites, joined=joined)
    script, weight = script_of_coins(given.logits.sigmoid(), pairs)
    monkeypatch.setattr(antithetic, "uniform", script)
    check_exact(given, weight, sf.DisARM(pairs))


@pytest.mark.parametrize(("n", "sites"), [(3, 1), (3, 2), (4, 1), (5, 1)])
def test_arms_of_coins_is_exact(monkeypatch, n, sites):
    given = problem(Bernoulli, sites, seed=n)
    script, weight = script_of_blocks(given.logits.sigmoid(), n)
    monkeypatch.setattr(antithetic, "uniform", script)
    check_exact(given, weight, sf.ARMS(n))


@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
@pytest.mark.parametrize(("n", "sites", "values"), [(2, 1, 3), (2, 2, 3), (2, 1, 5), (3, 1, 4), (3, 1, 2), (4, 1, 3)])
def test_trees_are_exact(monkeypatch, family, n, sites, values):
    given = problem(family, sites, values, seed=values, joined=sites == 2)
    script, weight = script_of_trees(given.logits.softmax(-1), n)
    monkeypatch.setattr(antithetic, "uniform", script)
    check_exact(given, weight, sf.DisARM() if n == 2 else sf.ARMS(n))


def pair_law(p):
    """The tuples of an antithetic pair `[4, 2]` and their probabilities."""
    both, none = max(0.0, 2 * p - 1), max(0.0, 1 - 2 * p)
    return coordinates(2, 2).double(), torch.tensor([none, min(p, 1 - p), min(p, 1 - p), both], dtype=torch.float64)


def moments(weight, gradient):
    mean = (weight * gradient).sum()
    return mean, (weight * (gradient - mean).square()).sum()


@pytest.mark.parametrize(
    ("p", "leave_one_out", "arm", "disarm"),
    [
        (0.5, ".06250", ".02083", "0"),
        (0.3, ".06090", ".03390", ".02940"),
        (0.1, ".03690", ".03257", ".03240"),
        (0.05, ".02149", ".02033", ".02031"),
    ],
)
def test_anchor_a(p, leave_one_out, arm, disarm):
    m, pq = min(p, 1 - p), p * (1 - p)
    tuples, weight = pair_law(p)
    logit = torch.full((4,), math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    for estimator in (sf.DisARM(), sf.ARMS(2)):
        value = estimator.surrogate(Bernoulli(logits=logit), tuples.T, tuples.T)
        mean, variance = moments(weight, torch.autograd.grad(value.sum(), logit)[0])
        assert abs(mean - pq) < 1e-14
        assert abs(variance - (m * (1 - m) ** 2 / 2 - pq**2)) < 1e-14
        assert abs(variance - float(disarm)) < 0.51e-5
    # the reference ARM: (f(b) - f(b')) (u - 1/2), quadratic in u on each cell
    edges = [0.0, min(p, 1 - p), max(p, 1 - p), 1.0]
    variance = -(pq**2)
    for a, b in itertools.pairwise(edges):
        u = (a + b) / 2
        difference = (u < p) - (1 - u < p)
        variance += difference**2 * ((b - 0.5) ** 3 - (a - 0.5) ** 3) / 3
    assert abs(variance - float(arm)) < 0.51e-5
    assert abs(variance - (2 / 3 * (1 / 8 - (1 / 2 - m) ** 3) - pq**2)) < 1e-12
    assert abs(pq / 2 - pq**2 - float(leave_one_out)) < 0.51e-5


@pytest.mark.parametrize(
    ("p", "printed", "unit"), [(0.5, 1.2438e-9, 1e-13), (0.3, 8.805e-10, 1e-13), (0.1, 1.644e-10, 1e-13)]
)
def test_anchor_c(p, printed, unit):
    """200 coins and an additive f: of the estimate for one coin, the others are summed up by their number.

    The tuple of the first coin and the difference of the pair in the others are enumerated: the number of ones minus
    that of zeros among the d others where the pair differs is a sum of independent signs.
    """
    D, t = 200, 0.499
    c = (1 - 2 * t) / D
    m = min(p, 1 - p)
    others = torch.zeros(2 * D - 1, dtype=torch.float64)  # law of sum of b - b' over D - 1 coins, from -(D - 1)
    others[D - 1] = 1.0
    for _ in range(D - 1):
        others = (1 - 2 * m) * others + m * (others.roll(1) + others.roll(-1))
    shift = torch.arange(-(D - 1), D, dtype=torch.float64)
    tuples, law = pair_law(p)
    weight = (law.unsqueeze(-1) * others).flatten()
    x = tuples.repeat_interleave(len(shift), 0).T
    rest = torch.stack((c * shift, torch.zeros_like(shift))).repeat(1, 4)
    logit = torch.full((len(weight),), math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    value = sf.DisARM().surrogate(Bernoulli(logits=logit), x, c * x + rest)
    mean, variance = moments(weight, torch.autograd.grad(value.sum(), logit)[0])
    truth = c * p * (1 - p)
    closed = c**2 * (1 - m) ** 2 / 4 * (2 * m + (D - 1) * 4 * m**2) - truth**2
    assert abs(mean / truth - 1) < 1e-8
    assert abs(variance / closed - 1) < 1e-8
    assert abs(closed - printed) < 0.51 * unit


def test_arms_at_two_is_disarm():
    """In law: the same pairs, and the same surrogate of them."""
    given = problem(Bernoulli, 3)
    logits = given.logits.requires_grad_()
    torch.manual_seed(0)
    x = sf.ARMS(2).sample(given.distribution(logits))
    torch.manual_seed(0)
    assert torch.equal(sf.DisARM().sample(given.distribution(logits)), x)
    fx = torch.randn(2, 2, dtype=torch.float64)
    one, two = (e.surrogate(given.distribution(logits), x, fx).sum() for e in (sf.ARMS(2), sf.DisARM()))
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (one, two)))


def test_a_categorical_of_two_values_is_a_coin():
    """The first value is the coin's 1."""
    logits = torch.randn(40, dtype=torch.float64, requires_grad=True)
    for n in (2, 3, 6):
        x = torch.randint(2, (n, 40)).double()
        fx = torch.randn(n, 40, dtype=torch.float64)
        estimator = sf.ARMS(n)
        coin = estimator.surrogate(Bernoulli(logits=logits), x, fx).sum()
        pair = Categorical(logits=torch.stack((logits, torch.zeros_like(logits)), -1))
        two = estimator.surrogate(pair, 1 - x.long(), fx).sum()
        assert near(*(torch.autograd.grad(value, logits)[0] for value in (coin, two)))


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_arms_beats_the_dirichlet_copula_in_one_site(n):
    """Its number of ones varies least; the reference law is that of n exchangeable Dirichlet coordinates."""
    for p in torch.linspace(0.02, 0.5, 25, dtype=torch.float64).tolist():
        joint = [max(0.0, 1 - k * (1 - p ** (1 / (n - 1)))) ** (n - 1) for k in range(n + 1)]  # P(k given ones)
        law = [
            math.comb(n, k) * sum((-1) ** j * math.comb(n - k, j) * joint[k + j] for j in range(n - k + 1))
            for k in range(n + 1)
        ]
        least = [0.0] * (n + 1)
        least[math.floor(n * p)] += 1 - n * p % 1
        least[min(n, math.floor(n * p) + 1)] += n * p % 1
        k = torch.arange(n + 1, dtype=torch.float64)

        def variance(weights, k=k):
            weights, spread = torch.tensor(weights, dtype=torch.float64), k * (n - k)
            mean = (weights * spread).sum()
            return (weights * (spread / mean - 1).square()).sum()

        x = (torch.arange(n).unsqueeze(-1) < torch.arange(n + 1)).double()  # the tuples up to order
        logit = torch.full((n + 1,), math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(sf.ARMS(n).surrogate(Bernoulli(logits=logit), x, x).sum(), logit)
        mean, ours = moments(torch.tensor(least, dtype=torch.float64), gradient)
        assert abs(mean - p * (1 - p)) < 1e-12
        assert abs(ours - (p * (1 - p)) ** 2 * variance(least)) < 1e-12
        assert variance(least) <= variance(law) + 1e-9


@pytest.mark.parametrize("estimator", [sf.DisARM(), sf.DisARM(3), sf.ARMS(2), sf.ARMS(3), sf.ARMS(8)])
@pytest.mark.parametrize("family", [Bernoulli, Categorical, OneHotCategorical])
def test_extremes_in_float32(estimator, family):
    logits = torch.tensor([-100.0, 100.0, -40.0, 40.0, 17.0, 0.0], requires_grad=True)
    three = torch.stack((logits, -logits, 0 * logits), -1)
    unit = Bernoulli(logits=logits) if family is Bernoulli else family(logits=three)
    p = Independent(unit, 1)
    x = estimator.sample(p)
    assert x.dtype == unit.sample().dtype
    value = estimator.surrogate(p, x, torch.randn(len(x)))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    assert (gradient[:4].abs() < 1e-15).all()
    # however unlikely, opposite draws: the right limit is leave-one-out of the rarer value
    if family is Bernoulli:
        x = torch.zeros_like(x)
        x[0] = 1.0
        fx = torch.zeros(len(x))
        fx[0] = 1.0
        (gradient,) = torch.autograd.grad(estimator.surrogate(p, x, fx), logits)
        size = 2 if isinstance(estimator, sf.DisARM) else len(x)
        assert near(gradient[:5], torch.full((5,), 1 / len(x)), 1e-6), size


def test_impossible_values_are_left_alone():
    logits = torch.tensor([[0.3, -torch.inf, 0.2, -torch.inf, -torch.inf], [0.0, 0.1, 0.2, 0.3, -torch.inf]])
    logits = logits.expand(50, 2, 5).clone().requires_grad_()
    for estimator in (sf.DisARM(), sf.ARMS(3)):
        p = Independent(Categorical(logits=logits), 1)
        x = estimator.sample(p)
        (gradient,) = torch.autograd.grad(estimator(p, lambda x: x.float().sum(-1)).sum(), logits)
        assert gradient.isfinite().all()
        assert not gradient[logits == -torch.inf].any()
        assert not torch.isin(x[..., 0], torch.tensor([1, 3, 4])).any()
        assert near(gradient.sum(-1), torch.zeros(50, 2), 1e-5)


def test_each_draw_follows_p():
    """Exactly: counts of a block have the mean n p, given by the roundings, in every node of the tree."""
    given = problem(Categorical, 1, 5)
    pi = given.logits.softmax(-1)
    logits, n = given.logits.expand(200_000, 2, 1, 5), 3
    torch.manual_seed(0)
    x = sf.ARMS(n).sample(Categorical(logits=logits))
    share = torch.nn.functional.one_hot(x, 5).double().mean((0, 1))
    # the standard error is below that of 600 000 independent draws; 6 of them: false alarms below 1e-6
    assert ((share - pi).abs() < 6 * (pi * (1 - pi) / 600_000).sqrt()).all()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_counts_are_refused(number):
    with pytest.raises(sf.ScorefnError, match="num_pairs must be an integer of at least 1"):
        sf.DisARM(number)
    with pytest.raises(sf.ScorefnError, match="num_samples must be an integer of at least 1"):
        sf.ARMS(number)


def test_one_draw_is_refused():
    with pytest.raises(sf.ScorefnError, match="num_samples=1 leaves nothing to compare"):
        sf.ARMS(1)


def test_other_families_are_refused():
    with pytest.raises(sf.ScorefnError, match="DisARM does not serve Independent of Normal: it serves Bernoulli"):
        sf.DisARM()(Independent(Normal(torch.zeros(3), 1.0), 1), lambda x: x.sum(-1))
    with pytest.raises(sf.ScorefnError, match="ARMS does not serve Normal"):
        sf.ARMS(3).surrogate(Normal(torch.zeros(3), 1.0), torch.zeros(3, 3), torch.zeros(3))


def test_shapes_are_refused():
    p = Bernoulli(logits=torch.zeros(4, 3, requires_grad=True))
    with pytest.raises(sf.ShapeError, match=r"f returned shape \(2, 1\)"):
        sf.DisARM()(p, lambda x: x.sum((-1, -2), keepdim=True)[..., 0])
    with pytest.raises(sf.ShapeError, match=r"f returned shape \(3, 4\) for 2 draws"):
        sf.DisARM().surrogate(p, torch.zeros(2, 4, 3), torch.zeros(3, 4))


def test_value_and_cost():
    p = Bernoulli(logits=torch.zeros(5, requires_grad=True))
    for estimator, cost in ((sf.DisARM(2), 4), (sf.ARMS(3), 3)):
        assert estimator.evaluations == cost == len(estimator.sample(p))
        assert estimator.unbiased
        fx = torch.randn(cost)
        assert torch.equal(estimator.surrogate(p, estimator.sample(p), fx), fx.mean(0))
        with torch.no_grad():
            assert not estimator(p, lambda x: x.sum(-1)).requires_grad
    assert repr(sf.DisARM(2)) == "DisARM(num_pairs=2)"
    assert repr(sf.ARMS(3)) == "ARMS(3)"
