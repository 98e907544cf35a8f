"""OpenAI-ES, PGPE, the separable and the rank-one strategy: their steps are gradients; ranks, memory, refusals."""

import copy
import math

import pytest
import torch
from torch.distributions import Independent, Normal

import scorefn as sf
from scorefn.search import PGPE, OpenAIES, SeparableCSANES
from scorefn.search.mirrored import Directions
from scorefn.search.path_rates import PathRates
from tests.search.large_scale import KINDS, PATHS, POINTS, SIGMA0, START, VALUES, bowl, by_rank, descent, gradients


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("values", VALUES)
def test_openai_es_follows_the_score_function_gradient(values, points):
    strategy = OpenAIES(START, SIGMA0, popsize=12, optimizer=descent, seed=0)
    x = POINTS[points](strategy.ask())
    f = VALUES[values](x)
    weights = by_rank(f, torch.linspace(0.5, -0.5, 12, dtype=torch.float64)) / 12
    _, _, (expected, _) = gradients(strategy, x, weights)
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.mean - START, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(strategy.sigma, SIGMA0)


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("values", VALUES)
def test_pgpe_follows_the_natural_gradient(values, points):
    strategy = PGPE(START, SIGMA0, popsize=12, optimizer=descent, eta_sigma=0.01, seed=0)
    x = POINTS[points](strategy.ask())
    f = VALUES[values](x)
    weights = by_rank(f, torch.linspace(0.5, -0.5, 12, dtype=torch.float64)) / 12
    mean, scale = strategy.mean.clone().requires_grad_(), strategy.sigma.clone().requires_grad_()
    p = Independent(Normal(mean, scale), 1)
    draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), 12 * weights.unsqueeze(-1))
    natural = sf.natural_gradient(p, draws, baseline=None)
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.mean - START, natural["loc"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(strategy.sigma - SIGMA0, 0.01 * 2 * natural["scale"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("values", VALUES)
def test_separable_mean_and_shape_follow_the_natural_gradient(values, points):
    """Fisher of (m, log scale) is diag(1/sigma^2, 2); S is twice that of log scale for the weights v, and one path."""
    strategy = SeparableCSANES(START, SIGMA0, popsize=12, seed=0)
    x = POINTS[points](strategy.ask())
    f = VALUES[values](x)
    k = torch.arange(1, 13, dtype=torch.float64)
    r = math.log(6.5) - k.log()
    w = r.clamp(min=0) / r.clamp(min=0).sum()
    a = w - (-r).clamp(min=0) / (-r).clamp(min=0).sum()
    mu = 1 / float(w.square().sum())
    w, a = by_rank(f, w), by_rank(f, a)
    z = (x - START) / SIGMA0
    v = torch.where(a < 0, a * 7 / z.square().sum(1), a)
    _, _, (mean, _) = gradients(strategy, x, w)
    _, _, (_, scale) = gradients(strategy, x, v)
    step = mean * SIGMA0.square()  # natural gradient of the mean
    shape = 2 * SIGMA0 * scale / 2  # twice the natural gradient of log scale: sum v (z^2 - 1)
    c_mu = mu / (mu + 3 * math.sqrt(7))
    c_1 = 4 * (7 + 2) / (3 * ((7 + 1.3) ** 2 + mu))
    c_c = (4 + mu / 7) / (7 + 4 + 2 * mu / 7)
    c_s = (mu + 2) / (7 + mu + 5)
    published = torch.zeros(12, dtype=torch.float64)
    published[:6] = torch.tensor([math.log(6.5) - math.log(i) for i in range(1, 7)], dtype=torch.float64)
    published /= published.sum()
    kappa = (12 / 11 * (published - 1 / 12).square().sum()) ** -0.5
    s = step / SIGMA0
    p = kappa * math.sqrt(c_s * (2 - c_s)) * s
    h = float(p @ p) / (7 * (1 - (1 - c_s) ** 2)) < 2 + 4 / 8
    q = h * kappa * math.sqrt(c_c * (2 - c_c)) * s
    S = c_mu * shape + c_1 * (q.square() - 1)
    S -= S.mean()
    strategy.tell(x, f)
    torch.testing.assert_close(strategy.mean - START, step, rtol=1e-10, atol=1e-10)
    change = (strategy.sigma / SIGMA0).log()
    torch.testing.assert_close(change - change.mean(), S / 2, rtol=1e-10, atol=1e-10)
    zero = torch.zeros(7, dtype=torch.float64)
    path = PathRates(12, 7, zero.device).walked({"sigma_path": zero, "shape_path": zero, "updates": 0}, s)
    assert change.mean().item() == pytest.approx(path[2], rel=1e-10, abs=1e-12)


# --- ranks, ties, failures -------------------------------------------------------------------------------------------


def states(strategy):
    return [v for v in strategy._state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1.0, math.nan, -math.inf])
def test_a_flat_generation_leaves_the_distribution_as_it_is(kind, value):
    strategy = kind(START, SIGMA0, seed=0)
    for _ in range(3):
        x = strategy.ask()
        strategy.tell(x, bowl(x))
    before, memory = [t.clone() for t in states(strategy)], copy.deepcopy(strategy.state_dict())
    strategy.tell(strategy.ask(), torch.full((strategy.popsize,), value))
    assert all(map(torch.equal, before, states(strategy)))
    assert str(strategy.state_dict().get("optimizer")) == str(memory.get("optimizer"))


@pytest.mark.parametrize("kind", KINDS)
def test_random_values_move_neither_mean_nor_sigma_on_average(kind):
    """Over all cyclic shifts of the order every point has every rank once: weights that sum to 0 cancel exactly."""
    strategy = kind(START, SIGMA0, popsize=8, seed=0, **({} if kind in PATHS else {"optimizer": descent}))
    x, state = strategy.ask(), strategy.state_dict()
    total = torch.zeros(7, dtype=torch.float64)
    for shift in range(8):
        strategy.load_state_dict(state)
        strategy.tell(x, (torch.arange(8) + shift) % 8)
        total += strategy.mean - START
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_is_the_same_to_the_bit(kind, dtype, tmp_path):
    def go(strategy, generations):
        for _ in range(generations):
            x = strategy.ask()
            strategy.tell(x, bowl(x))

    whole = kind(START, SIGMA0, popsize=12, seed=5, dtype=dtype)
    go(whole, 20)
    first = kind(START, SIGMA0, popsize=12, seed=5, dtype=dtype)
    go(first, 8)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    go(first, 3)  # the saved state does not move with the strategy
    second = kind(torch.zeros(7), 1.0, seed=9, dtype=dtype)
    second.ask()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(second, 12)
    assert all(map(torch.equal, states(whole), states(second)))
    assert whole.result.best_f == second.result.best_f
    assert torch.equal(whole.ask(), second.ask())


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_an_older_distribution_are_not_taken_for_present_ones(kind):
    """Told twice, the same points have other local coordinates the second time."""
    strategy, told = kind(START, SIGMA0, seed=0), kind(START, SIGMA0, seed=0)
    x = strategy.ask()
    for _ in range(2):
        strategy.tell(x, bowl(x))
        told.tell(x.numpy().copy(), bowl(x))  # never asked: always taken as injected
    for one, other in zip(states(strategy), states(told), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_points_changed_in_place_are_taken_as_they_are(kind):
    strategy, told = kind(START, SIGMA0, seed=0), kind(START, SIGMA0, seed=0)
    x = strategy.ask()
    x[3] = x[3].flip(0)
    x[5, 2] += 1e-3
    strategy.tell(x, bowl(x))
    told.tell(x.clone(), bowl(x))
    for one, other in zip(states(strategy), states(told), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_monotone_transforms_the_origin_and_the_units_do_not_matter(kind):
    def path(f, x0, sigma0):
        options = {} if kind in PATHS else {"optimizer": descent}
        strategy = kind(x0, sigma0, seed=3, **options)
        for _ in range(25):
            x = strategy.ask()
            strategy.tell(x, f(x))
        return strategy.mean, strategy.sigma

    units = torch.tensor([2.0**-20, 1.0, 3.0, 1000.0, 0.1, 1.0, 7.0], dtype=torch.float64)
    plain = path(bowl, START, SIGMA0)
    cubed = path(lambda x: bowl(x) ** 3, START, SIGMA0)
    assert all(map(torch.equal, plain, cubed))
    moved = path(lambda x: bowl(x - 4), START + 4, SIGMA0)
    torch.testing.assert_close(moved[0] - 4, plain[0], rtol=0, atol=1e-9)
    if kind is not OpenAIES:  # a plain gradient has the units of the inverse of x
        scaled = path(lambda x: bowl(x / units), START * units, SIGMA0 * units)
        torch.testing.assert_close(scaled[0] / units, plain[0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(scaled[1] / units, plain[1], rtol=1e-8, atol=0)


# --- points and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimension", [1, 7, 1500])
def test_points_are_mirrored_and_of_the_dtype_asked_for(kind, dimension):
    strategy = kind(torch.linspace(-1, 1, dimension), 0.5, popsize=6, dtype=torch.float32, seed=0)
    x = strategy.ask()
    assert x.dtype == torch.float32
    assert x.shape == (6, dimension)
    torch.testing.assert_close(x[:3] + x[3:], 2 * strategy.mean.float().expand(3, -1), rtol=1e-5, atol=1e-5)
    strategy.tell(x, x.square().sum(1))
    assert strategy.mean.dtype == strategy.sigma.dtype == torch.float64
    assert len({tuple(row.tolist()) for row in strategy.ask()}) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_points_of_ask_are_neither_copied_nor_kept(kind):
    strategy = kind(torch.zeros(2000), 1.0, popsize=10, dtype=torch.float32, seed=0)
    x = strategy.ask()
    assert strategy.told(x).data_ptr() == x.data_ptr()
    held = [t for t in vars(strategy).values() if isinstance(t, torch.Tensor)] + list(strategy._asked[1:])
    assert max(t.numel() for t in held) == 5 * 2000


def test_moments_of_pairs_are_those_of_all_points():
    z = torch.randn(4, 9, dtype=torch.float64)
    pairs, every = Directions(z, paired=True), Directions(torch.cat([z, -z]), paired=False)
    w = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(pairs.first(w), every.first(w), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(pairs.second(w), every.second(w), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(pairs.square_lengths(), every.square_lengths(), rtol=1e-14, atol=0)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"popsize": 7}, "popsize must be even, but it is 7.*Use 6 or 8"),
        ({"popsize": 2}, "popsize must be an integer of at least 4, but it is 2"),
        ({"dtype": torch.int64}, "dtype must be torch.float64 or torch.float32, but it is torch.int64"),
        ({"colour": 1.0}, "has no option 'colour'"),
        ({"tolx": -1.0}, "tolx must be at least 0"),
    ],
)
def test_refused_options(kind, options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        kind(START, 1.0, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGPE(START, 1.0, max_speed=-1.0), "max_speed must be a positive number, but it is -1.0"),
        (lambda: PGPE(START, 1.0, max_speed=1.0, optimizer=descent), "max_speed belongs to ClipUp"),
        (lambda: PGPE(START, 1.0, max_change=1.0), "max_change must lie between 0 and 1, but it is 1.0"),
        (lambda: PGPE(START, 1.0, eta_sigma=0.0), "eta_sigma must be a positive number"),
        (lambda: OpenAIES(START, 1.0, learning_rate=0.0), "learning_rate must be a positive number"),
        (lambda: OpenAIES(START, 1.0, weight_decay=-1.0), "weight_decay must be 0 or positive, but it is -1.0"),
        (lambda: OpenAIES(START, 1.0, weight_decay=0.0, optimizer=descent), "belong to Adam"),
    ],
)
def test_refused_rates(make, message):
    with pytest.raises(sf.ScorefnError, match=message):
        make()


@pytest.mark.parametrize("kind", [PGPE, OpenAIES])
def test_an_optimizer_that_is_none_is_refused_and_the_state_is_kept(kind):
    made = []

    def once(mean):
        made.append(descent(mean) if not made else None)
        return made[-1]

    strategy = kind(START, 1.0, optimizer=once, seed=0)
    x = strategy.ask()
    with pytest.raises(sf.ScorefnError, match=r"must return a torch.optim.Optimizer .* returned NoneType"):
        strategy.tell(x, bowl(x))
    assert torch.equal(strategy.mean, START)
    assert strategy.result.evaluations == 0


@pytest.mark.parametrize("kind", KINDS)
def test_points_that_would_overflow_are_refused_and_the_state_is_kept(kind):
    strategy = kind(START, 1e-100, popsize=4, seed=0)
    x = strategy.ask()
    x[0] = 1e300  # 1e400 standard deviations away
    before = [t.clone() for t in states(strategy)]
    with pytest.raises(sf.NonFiniteError, match="would make the"):
        strategy.tell(x, [0.0, 1.0, 2.0, 3.0])
    assert all(map(torch.equal, before, states(strategy)))
    with pytest.raises(sf.NonFiniteError, match=r"not finite in rows \[0\]"):
        strategy.tell(torch.full_like(x, math.inf)[:1].expand(4, -1).where(torch.arange(4)[:, None] == 0, x), range(4))
    single = kind(START, 1.0, popsize=4, seed=0, dtype=torch.float32)
    with pytest.raises(sf.NonFiniteError, match=r"not finite in torch.float32"):
        single.tell(x, range(4))


# --- how fast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimension", "bound"), [(5, 260), (20, 200), (100, 220)])
def test_separable_ellipsoid(dimension, bound):
    """20, 20 and 8 seeds lie at 168 to 232, 150 to 177 and 188 to 198 evaluations per coordinate."""
    curvature = torch.logspace(0, 6, dimension, dtype=torch.float64)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x0 = 8 * torch.rand(dimension, dtype=torch.float64, generator=generator) - 4
        strategy = SeparableCSANES(x0, 2.0, seed=generator, ftarget=1e-8)
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, (curvature * x.square()).sum(1))
        assert "ftarget" in strategy.stop
        assert strategy.result.evaluations <= bound * dimension
