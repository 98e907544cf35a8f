"""Exact variances and gradients of published toys: reproduced through the library, to the printed digit (law 7).

Each anchor is compared with the digits that are printed for it and, where there is a closed form, with that to 1e-10.
Nothing is sampled: every tuple of draws is enumerated, and has a parameter of its own, so that one backward pass gives
the gradient estimate of each.
"""

from decimal import Decimal

import pytest
import torch
from torch.distributions import Bernoulli, Binomial, Categorical, Independent, Normal

import scorefn as sf
from tests.oracles.higher_orders import derivative_tensors
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import near
from tests.oracles.toys import coordinates

CLOSED = 1e-10


def same_digits(value, printed):
    """Whether a number rounds to the printed one."""
    number = Decimal(printed)
    unit = Decimal(1).scaleb(number.as_tuple().exponent)
    return abs(float(value) - float(number)) <= 0.5001 * float(unit)


def close(value, truth):
    """Equal to 1e-10, relatively where the number is large and absolutely where it is not."""
    return abs(float(value) - float(truth)) <= CLOSED * max(1.0, abs(float(truth)))


def doubles(value):
    return torch.as_tensor(value, dtype=torch.float64)


def moments(weight, gradient):
    """Mean and variance of the estimate over all tuples, `[T]` or `[T, D]`."""
    weight = weight.reshape(-1, *[1] * (gradient.ndim - 1))
    mean = (weight * gradient).sum(0)
    return mean, (weight * (gradient - mean).square()).sum(0)


def estimate_moments(build, theta, points, f, N, *, weight=None, **options):
    """Mean and variance of `expectation`'s gradient in theta, over every N-tuple of points.

    Args:
        build: parameters with a leading axis of tuples to a measure with that batch shape.
        theta: the parameters.
        points: `[P, *event]`, the support; or the nodes of a quadrature, which then needs weight.
        f: the integrand.
        N: draws of a tuple.
        weight: `[P]`; None: the probability of each point.
        options: of `expectation`.
    """
    theta = doubles(theta)
    if weight is None:
        weight = build(theta.expand(len(points), *theta.shape)).log_prob(points).exp()
    choice = coordinates(*[len(points)] * N).T
    own = theta.expand(choice.shape[1], *theta.shape).clone().requires_grad_()
    p = build(own)
    p.sample = lambda shape: points[choice]
    value = sf.expectation(p, f, N, **options)
    return moments(weight[choice].prod(0), torch.autograd.grad(value.sum(), own)[0])


# ------------------------------------------------------------------------------------------------- A: one Bernoulli

BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def coin(logits):
    return Bernoulli(logits=logits)


@pytest.mark.parametrize(
    ("p", "leave_one_out", "none"), [(0.5, ".06250", ".03125"), (0.3, ".06090", ".05145"), (0.1, ".03690", ".03645")]
)
def test_a_one_bernoulli(p, leave_one_out, none):
    logit, pq = torch.logit(doubles(p)), p * (1 - p)
    mean, variance = estimate_moments(coin, logit, BITS, lambda x: x, 2, baseline=sf.LeaveOneOut())
    assert close(mean, pq)
    assert close(variance, pq / 2 - pq**2)
    assert same_digits(variance, leave_one_out)
    mean, variance = estimate_moments(coin, logit, BITS, lambda x: x, 2, baseline=None)
    assert close(mean, pq)
    assert close(variance, (p * (1 - p) ** 2 - pq**2) / 2)
    assert same_digits(variance, none)


def test_a_scales_with_the_square_of_delta():
    f = (BITS - 0.45).square()
    _, variance = estimate_moments(coin, 0.3, BITS, lambda x: (x - 0.45).square(), 2, baseline=sf.LeaveOneOut())
    _, unit = estimate_moments(coin, 0.3, BITS, lambda x: x, 2, baseline=sf.LeaveOneOut())
    assert close(variance / float(f[1] - f[0]) ** 2, unit)


# ------------------------------------------------------------------------------- B: three Bernoullis, one logit

TARGET = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)
CUBE = coordinates(2, 2, 2).double()


def three_coins(eta):
    return Independent(Bernoulli(logits=eta.unsqueeze(-1).expand(*eta.shape, 3)), 1)


def squared_error(x):
    return (x - TARGET).square().sum(-1)


@pytest.mark.parametrize(
    ("eta", "expected_f", "gradient", "none", "constant", "leave_one_out"),
    [
        (0.0, ".7605", "-.0450000", ".438420", ".004650", {2: ".0072750", 3: ".0032000", 4: ".0019875"}),
        (-4.0, ".847262", "-.00317929", ".0335568", ".00071263", {2: "3.81025e-4", 3: "2.45780e-4", 4: "1.82276e-4"}),
    ],
)
def test_b_three_bernoullis_with_one_logit(eta, expected_f, gradient, none, constant, leave_one_out):
    value = float((three_coins(doubles(eta)).log_prob(CUBE).exp() * squared_error(CUBE)).sum())
    assert same_digits(value, expected_f)
    truth = torch.sigmoid(doubles(eta)) * torch.sigmoid(doubles(-eta)) * (1 - 2 * TARGET).sum()
    for baseline, printed, N in [
        (None, none, 1),
        (sf.Constant(value), constant, 1),
        *[(sf.LeaveOneOut(), digits, k) for k, digits in leave_one_out.items()],
    ]:
        mean, variance = estimate_moments(three_coins, eta, CUBE, squared_error, N, baseline=baseline)
        assert close(mean, truth), (baseline, N)
        assert same_digits(mean, gradient), (baseline, N)
        assert same_digits(variance, printed), (baseline, N, float(variance))


def test_b_leave_one_out_is_the_covariance_of_score_and_value():
    """Variance of the sample covariance: m22 / N - m11^2 (N - 2) / (N (N - 1)) + v_score v_f / (N (N - 1))."""
    eta = doubles(-4.0)
    weight = three_coins(eta).log_prob(CUBE).exp()
    score = CUBE.sum(-1) - 3 * torch.sigmoid(eta)
    f = squared_error(CUBE) - (weight * squared_error(CUBE)).sum()
    m22, m11 = (weight * (score * f).square()).sum(), (weight * score * f).sum()
    v_score, v_f = (weight * score.square()).sum(), (weight * f.square()).sum()
    for N in (2, 3, 4):
        _, variance = estimate_moments(three_coins, eta, CUBE, squared_error, N, baseline=sf.LeaveOneOut())
        closed = m22 / N - m11**2 * (N - 2) / (N * (N - 1)) + v_score * v_f / (N * (N - 1))
        assert close(variance, closed), N


# ---------------------------------------------------------------------------------------- C: two hundred Bernoullis

T_TARGET = 0.499


class Lumped:
    """One of D coins apart from the number of heads among the others: all that f and the score of that coin see.

    The others are a Binomial with a logit of its own, so the gradient is that of the single coordinate.
    """

    def __init__(self, D, logit, rest):
        self.D, self.coin, self.rest = D, Bernoulli(logits=logit), Binomial(D - 1, logits=rest)

    def sample(self, sample_shape):
        raise NotImplementedError

    def log_prob(self, x):
        return self.coin.log_prob(x[..., 0]) + self.rest.log_prob(x[..., 1])

    def f(self, x):
        heads = x.sum(-1)
        return (heads * (1 - T_TARGET) ** 2 + (self.D - heads) * T_TARGET**2) / self.D


def quadratic_moments(D, p, baseline):
    logit = torch.logit(doubles(p))
    points = coordinates(2, D).double()
    return estimate_moments(
        lambda eta: Lumped(D, eta, logit), logit, points, Lumped(D, logit, logit).f, 2, baseline=baseline
    )


def leave_one_out_formula(D, p):
    """f is linear on the cube with slope c: (c^2/4) (v + (D - 1) v^2) - (c p q)^2, v = 2 p q."""
    c, pq = (1 - 2 * T_TARGET) / D, p * (1 - p)
    return c**2 / 4 * (2 * pq + (D - 1) * (2 * pq) ** 2) - (c * pq) ** 2


@pytest.mark.parametrize(
    ("p", "gradient", "none", "leave_one_out"),
    [
        (0.5, "2.5e-6", "7.813e-3", "1.2500e-9"),
        (0.3, "2.1e-6", "6.542e-3", "8.837e-10"),
        (0.1, "9.0e-7", "2.795e-3", "1.649e-10"),
    ],
)
def test_c_two_hundred_bernoullis(p, gradient, none, leave_one_out):
    c = (1 - 2 * T_TARGET) / 200
    mean, variance = quadratic_moments(200, p, sf.LeaveOneOut())
    assert same_digits(mean, gradient)
    assert float(mean) == pytest.approx(c * p * (1 - p), rel=1e-9)
    assert same_digits(variance, leave_one_out)
    assert float(variance) == pytest.approx(leave_one_out_formula(200, p), rel=1e-8)
    mean, variance = quadratic_moments(200, p, None)
    assert float(mean) == pytest.approx(c * p * (1 - p), rel=1e-6)  # a difference of numbers 1e5 times larger
    assert same_digits(variance, none)


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()])
def test_c_the_lump_is_the_cube(p, baseline):
    """At D = 4 every vector of coins is enumerated, with a logit for each; the same moments, and the same formula."""
    logits = torch.logit(doubles([p] * 4))
    cube = coordinates(2, 2, 2, 2).double()
    mean, variance = estimate_moments(
        lambda eta: Independent(Bernoulli(logits=eta), 1), logits, cube, lambda x: (x - T_TARGET).square().mean(-1), 2,
        baseline=baseline,
    )  # fmt: skip
    lumped_mean, lumped_variance = quadratic_moments(4, p, baseline)
    for i in range(4):
        assert float(mean[i]) == pytest.approx(float(lumped_mean), rel=1e-9)
        assert float(variance[i]) == pytest.approx(float(lumped_variance), rel=1e-9)
        if baseline is not None:
            assert float(variance[i]) == pytest.approx(leave_one_out_formula(4, p), rel=1e-9)


# -------------------------------------------------------------------------------------------------- D: the Gaussian


@pytest.mark.parametrize(("m", "s"), [(1.0, 1.0), (0.5, 2.0), (-3.0, 0.7)])
def test_d_gaussian(m, s):
    nodes, weight = gauss_hermite(10)
    second = m**2 + s**2
    fourth = m**4 + 6 * m**2 * s**2 + 3 * s**4
    plain = (m**4 + 18 * m**2 * s**2 + 15 * s**4) / s**2 - 4 * m**2
    optimal = m**2 + 3 * s**2

    def with_constant(b):  # E[(f - b)^2 score^2] - (2 m)^2, with E[score^2] = 1 / s^2 and E[f score^2] = optimal / s^2
        return plain - 2 * b * optimal / s**2 + b**2 / s**2

    assert with_constant(0.0) == plain
    for baseline, closed, digits in [
        (None, plain, "30"),
        (sf.Constant(second), with_constant(second), "18"),
        (sf.Constant(optimal), with_constant(optimal), "14"),
    ]:
        mean, variance = estimate_moments(
            lambda loc: Normal(loc, s), m, m + s * nodes, lambda x: x.square(), 1, weight=weight, baseline=baseline
        )
        assert close(mean, 2 * m)
        assert close(variance, closed), baseline
        if m == s == 1.0:
            assert same_digits(variance, digits)
    mean, variance = estimate_moments(
        lambda loc: Normal(loc, s), m, m + s * nodes, lambda x: x.square(), 2, weight=weight, baseline=sf.LeaveOneOut()
    )
    v_f, v_score = fourth - second**2, 1 / s**2
    assert close(mean, 2 * m)
    assert close(variance, (with_constant(second) + 4 * m**2 + v_f * v_score) / 2)  # the formula of B at N = 2


# ------------------------------------------------------------------------------------------------- F: second order


@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut(), sf.Constant(0.3)])
def test_f_second_order(baseline):
    eta = doubles(0.4).requires_grad_()
    choice = coordinates(2, 2).T
    weight = Bernoulli(logits=eta.detach()).log_prob(BITS).exp()[choice].prod(0)
    p = Bernoulli(logits=eta.expand(choice.shape[1]))
    p.sample = lambda shape: BITS[choice]
    estimate = sf.dice(sf.draw(p, lambda x: x, 2), baseline=baseline).mean(0)
    first, second = derivative_tensors((weight * estimate).sum(), (eta,), 2)
    q = float(torch.sigmoid(eta.detach()))
    assert close(first, q * (1 - q))
    assert close(second, q * (1 - q) * (1 - 2 * q))
    assert same_digits(second, "-.0474215")


# ------------------------------------------------------------------------------------------------ trajectories: chain


def chain_moments(theta, *, credit, baseline, longest=220):
    """Mean and variance of the single-trajectory gradient, summed over lengths until nothing is left of the tail."""
    length = torch.arange(longest)  # of rewards; then the decision to stop
    step = torch.arange(longest)
    stays, present = step < length[:, None], step <= length[:, None]
    own = doubles(theta).expand(longest).clone().requires_grad_()
    log_prob = torch.where(stays, own[:, None].log(), torch.log1p(-own[:, None]))
    weight = theta ** length.double() * (1 - theta)
    assert theta**longest * longest**4 < 1e-14
    draws = sf.Draws(
        x=length[None],
        log_prob=torch.where(present, log_prob, torch.nan)[None],
        fx=stays.double()[None],
        mask=present[None],
    )
    value = sf.surrogate(draws, credit=credit, baseline=baseline)
    return moments(weight, torch.autograd.grad(value.sum(), own)[0])


CHAIN = [  # credit, baseline at theta, variance times theta (1 - theta)^4, printed at theta = .5
    (sf.Total(), lambda t: None, lambda t: 4 * t**2 + 8 * t + 1, "192"),
    (sf.RewardToGo(), lambda t: None, lambda t: t**2 + 3 * t + 1, "88"),
    (sf.RewardToGo(), lambda t: sf.Constant(t / (1 - t)), lambda t: 1 + t, "48"),
    (sf.Total(), lambda t: sf.Constant((1 + 2 * t) / (1 - t)), lambda t: 4 * t, "64"),
    (sf.RewardToGo(), lambda t: sf.Constant((1 + t) / (1 - t)), lambda t: t, "16"),
]


@pytest.mark.parametrize("theta", [0.5, 0.7])
@pytest.mark.parametrize(("credit", "baseline", "variance", "printed"), CHAIN)
def test_chain(theta, credit, baseline, variance, printed):
    mean, spread = chain_moments(theta, credit=credit, baseline=baseline(theta))
    assert close(mean, 1 / (1 - theta) ** 2)
    assert close(spread, variance(theta) / (theta * (1 - theta) ** 4))
    if theta == 0.5:
        assert same_digits(spread, printed)


def test_chain_baselines_are_the_best_constants():
    """A little more or less is worse: the last two rows are optima, not just numbers."""
    for credit, best in [(sf.Total(), 4.0), (sf.RewardToGo(), 3.0)]:
        _, least = chain_moments(0.5, credit=credit, baseline=sf.Constant(best))
        for b in (best - 0.1, best + 0.1):
            assert chain_moments(0.5, credit=credit, baseline=sf.Constant(b))[1] > least


# --------------------------------------------------------------------------------------------------------- discount


@pytest.mark.parametrize(("discount", "c", "printed"), [(0.5, 1.2, (".4", "-.2")), (0.9, 0.7, (".37", ".3"))])
def test_the_usual_discounted_update_can_point_the_other_way(discount, c, printed):
    p = doubles(0.35).requires_grad_()
    paths = coordinates(2, 2).double()
    log_prob = Bernoulli(probs=p).log_prob(paths)
    fx = torch.stack([paths[:, 0], c * (1 - paths[:, 1])], -1)
    draws = sf.Draws(x=paths[None], log_prob=log_prob[None], fx=fx[None])
    weight = log_prob.detach().sum(-1).exp()

    def gradient(credit):
        value = (weight * sf.surrogate(draws, credit=credit)).sum()
        return float(torch.autograd.grad(value, p, retain_graph=True)[0])

    exact, usual = gradient(sf.RewardToGo(discount)), gradient(sf.RewardToGo(discount, visitation_discount=False))
    assert close(exact, 1 - discount * c)
    assert close(usual, 1 - c)
    assert same_digits(exact, printed[0])
    assert same_digits(usual, printed[1])


# -------------------------------------------------------------------------------------------------------- whitening

ARMS, REWARDS = doubles([0.6, 0.3, 0.1]), doubles([0.0, 1.0, 10.0])


def bandit(N, **options):
    return estimate_moments(
        lambda logits: Categorical(logits=logits), ARMS.log(), torch.arange(3), lambda x: REWARDS[x], N, **options
    )[0]


def bandit_gradient():
    return ARMS * (REWARDS - (ARMS * REWARDS).sum())


def whiten(fx):
    """By the batch's own mean and standard deviation; a batch of equal values has nothing to say."""
    spread = fx.std(0, correction=0, keepdim=True)
    return torch.where(spread > 1e-12, (fx - fx.mean(0, keepdim=True)) / spread.clamp(min=1e-12), 0.0)


@pytest.mark.parametrize(("N", "printed"), [(2, ".724"), (4, ".771"), (8, ".874")])
def test_whitening_bends_the_gradient(N, printed):
    gradient, truth = bandit(N, baseline=None, shape=whiten), bandit_gradient()
    assert same_digits(torch.cosine_similarity(gradient, truth, dim=0), printed)
    assert gradient[1] > 1e-2 > -1e-2 > truth[1]  # the wrong sign on the middle arm


@pytest.mark.parametrize("N", [2, 3, 5])
def test_the_own_mean_shrinks_the_gradient(N):
    gradient = bandit(N, baseline=None, shape=lambda fx: fx - fx.mean(0, keepdim=True))
    assert near(gradient, bandit_gradient() * (N - 1) / N)
    assert near(bandit(N, baseline=sf.LeaveOneOut()), bandit_gradient())
