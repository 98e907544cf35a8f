"""Exact certificates: the variances of the anchors, known biases, and what is refused."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, LogNormal, Normal

import scorefn as sf
from scorefn.diagnostics import check_unbiased
from scorefn.diagnostics.certificate import Outcomes, outcomes
from scorefn.diagnostics.estimation import Estimation

LOO = partial(partial, sf.expectation)


def exact(p, f, estimator, params):
    found = check_unbiased((p, f, estimator), params=params)
    assert found.method == "exact"
    return found


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1])
def test_anchor_a(p):
    logit, m, pq = leaf(math.log(p / (1 - p))), min(p, 1 - p), p * (1 - p)
    q = Bernoulli(logits=logit)
    for estimator, variance in (
        (LOO(num_samples=2), pq / 2 - pq**2),
        (sf.DisARM(), m * (1 - m) ** 2 / 2 - pq**2),
        (sf.ARMS(2), m * (1 - m) ** 2 / 2 - pq**2),
        (LOO(num_samples=2, baseline=None), p * (1 - p) ** 2 / 2 - pq**2 / 2),
        (sf.LocalExpectation(), 0.0),
    ):
        found = exact(q, lambda x: x, estimator, logit)
        assert found
        assert abs(float(found.variance) - variance) < 1e-14
        assert found.signal_to_noise == pytest.approx(pq**2 / variance if variance > 1e-9 else math.inf)


B_FIGURES = {
    (0.0, "loo"): (0.0072750, 0.0032000, 0.0019875),
    (0.0, "set"): (0.0061125, 0.0022625, 0.00113083333333),
    (-4.0, "loo"): (3.81025e-4, 2.45780e-4, 1.82276e-4),
    (-4.0, "set"): (2.97824e-5, 8.07115e-6, 1.05549e-6),
}


def anchor_b(eta):
    logit = leaf(eta)
    targets = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)
    return Independent(Bernoulli(logits=logit.expand(3)), 1), lambda x: (x - targets).square().sum(-1), logit


@pytest.mark.parametrize("eta", [0.0, -4.0])
def test_anchor_b(eta):
    p, f, logit = anchor_b(eta)
    for name, make in (("loo", lambda k: LOO(num_samples=k)), ("set", sf.UnorderedSet)):
        for k, printed in zip((2, 3, 4), B_FIGURES[eta, name], strict=True):
            found = exact(p, f, make(k), logit)
            assert found
            assert float(found.variance) == pytest.approx(printed, rel=1e-10 if eta == 0.0 else 2e-6)
    if eta == 0.0:
        assert float(exact(p, f, LOO(num_samples=1, baseline=None), logit).variance) == pytest.approx(
            0.438420, abs=5e-7
        )
        assert float(exact(p, f, LOO(num_samples=1, baseline=sf.Constant(0.7605)), logit).variance) == pytest.approx(
            0.004650, abs=1e-12
        )


def test_anchor_c_in_four_dimensions():
    """Additive f = c sum b at p = 1/2: leave-one-out(2) has variance c^2 (D / 32 + 1/32 - 1/16) by hand enumeration."""
    D, c = 4, (1 - 2 * 0.499) / 4
    logits = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    found = exact(Bernoulli(logits=logits), lambda x: (x - 0.499).square().mean(-1), LOO(num_samples=2), logits)
    # 1/2 (f - f') (b - b'): the other D - 1 coordinates have E (sum of b - b')^2 = (D - 1) / 2, and E (b - b')^2 = 1/2
    by_hand = c**2 / 4 * (0.5 + 0.5 * (D - 1) * 0.5) - (c / 4) ** 2
    assert found
    assert torch.allclose(found.variance, torch.full((D,), by_hand, dtype=torch.float64), rtol=1e-10)


def test_anchor_d():
    m = leaf(1.0)
    p = Normal(m, torch.ones((), dtype=torch.float64))
    for options, variance in (
        ({"baseline": None}, 30.0),
        ({"baseline": sf.Constant(2.0)}, 18.0),
        ({"baseline": sf.Constant(4.0)}, 14.0),
    ):
        found = exact(p, torch.square, LOO(num_samples=1, **options), m)
        assert found
        assert float(found.variance) == pytest.approx(variance, rel=1e-10)
    pair = exact(p, torch.square, LOO(num_samples=2), m)
    assert float(pair.variance) == pytest.approx(14.0, rel=1e-10)  # f - f' = (x - x') (x + x'), by hand


def self_including(p, f, K):
    x = p.sample((K,))
    fx = f(x)
    return ((fx - fx.mean(0)).detach() * p.log_prob(x).reshape(K, -1).sum(1)).mean(0)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_a_mean_with_its_own_draw_is_off_by_1_in_K(K):
    p, f, logit = anchor_b(0.3)
    found = exact(p, f, partial(self_including, K=K), logit)
    assert found.verdict == "biased"
    assert found.largest_bias == pytest.approx(1 / K, abs=1e-12)
    assert "worst: parameter 0" in str(found)


@pytest.mark.parametrize("N", [2, 4])
def test_whitening_turns_the_middle_arm(N):
    """The bandit of the anchors: p = (.6, .3, .1), r = (0, 1, 10); own-batch mean and deviation."""
    logits = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    rewards = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)

    def whitened(p, f):
        x = p.sample((N,))
        r = f(x)
        spread = r.std(correction=0)
        return ((r - r.mean()) / spread.clamp(min=1e-12) * p.log_prob(x)).mean()

    p = Categorical(logits=logits)
    found = outcomes(Estimation(p, lambda x: rewards[x], whitened), (logits,))
    truth = sf.diagnostics.exact_gradient(p, lambda x: rewards[x], logits)[0]
    cosine = torch.nn.functional.cosine_similarity(found.mean, truth, 0)
    assert float(cosine) == pytest.approx({2: 0.724, 4: 0.771}[N], abs=5e-4)
    assert found.mean[1] * truth[1] < 0
    assert exact(p, lambda x: rewards[x], whitened, logits).verdict == "biased"


def test_a_loop_and_a_sweep_find_the_same():
    p, f, logit = anchor_b(-0.4)
    swept = outcomes(Estimation(p, f, LOO(num_samples=2)), (logit,))
    looped = outcomes(Estimation(p, f, lambda p, f: sf.expectation(p, f, 2)), (logit,))
    assert torch.allclose(swept.gradients, looped.gradients, rtol=1e-12, atol=1e-15)
    assert torch.equal(swept.probability, looped.probability)


def test_draws_may_be_made_in_several_calls():
    p, f, logit = anchor_b(0.7)

    def two_calls(p, f):
        x, y = p.sample(), p.sample((1, 2)).reshape(2, 3)
        return (f(x) - f(y).mean()).detach() * p.log_prob(x)

    found = exact(p, f, two_calls, logit)
    assert found
    assert found.repeats == 8**3


@pytest.mark.parametrize(
    "estimator", [sf.SumAndSample(2, 2), sf.UnorderedSet(3), sf.SumAndSample(3), sf.DisARM(2), sf.ARMS(3)]
)
def test_joint_estimators_list_their_outcomes(estimator):
    logits = torch.tensor([0.5, -1.2, 0.1], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    p = Independent(Bernoulli(logits=logits), 1)
    x, probability = estimator.outcomes(p)
    assert x.shape == (estimator.evaluations, len(probability), 3)
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    found = exact(p, lambda x: (x @ weight + 0.4).square(), estimator, logits)
    assert found
    assert found.bias.abs().max() < 1e-13
    torch.manual_seed(0)  # and their law is that of sample: the mean of the first draw's value in 4000 samples
    drawn = torch.stack([estimator.sample(p) for _ in range(4000)], 1)
    law = (probability * (x @ weight).square().sum(0)).sum()
    values = (drawn @ weight).square().sum(0)
    assert abs(values.mean() - law) < 5 * values.std() / 4000**0.5


@pytest.mark.parametrize("estimator", [sf.LocalExpectation(2), sf.Enumerate(), sf.DoubleControlVariate(3)])
def test_joint_estimators_that_draw_by_sample(estimator):
    logits = torch.tensor([0.5, -1.2], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for p in (Independent(Bernoulli(logits=logits), 1), Bernoulli(logits=logits)):
        assert exact(p, lambda x: (x @ weight + 0.4).square().sin(), estimator, logits)


def refused(estimator, p=None, f=None, params=None):
    given, g, logit = anchor_b(0.2)
    reason = outcomes(Estimation(p or given, f or g, estimator), (logit if params is None else params,))
    assert isinstance(reason, str)
    return reason


def test_what_cannot_be_enumerated_says_why():
    mean = leaf(0.5)
    p = Normal(mean, torch.ones((), dtype=torch.float64))
    assert "another way than p.sample" in refused(LOO(num_samples=2, coupling=sf.Antithetic()))
    assert "another way than p.sample" in refused(lambda p, f: f(p.rsample((2,))).mean(), p, torch.square, mean)
    assert "learns from one call to the next" in refused(LOO(num_samples=2, baseline=sf.MovingAverage()))
    assert "depends on their values" in refused(lambda p, f: sf.expectation(p, f, 2 + int(p.sample().sum())))
    assert "8^6 tuples" in refused(LOO(num_samples=6))
    assert "not converged" in refused(LOO(num_samples=1, baseline=None), p, lambda x: (x > 0.3).double(), mean)
    assert "quadrature takes 8 nodes" in refused(LOO(num_samples=6), p, torch.square, mean)
    assert "cannot be integrated" in refused(
        LOO(num_samples=2), Normal(mean.expand(9), torch.ones(9, dtype=torch.float64)), lambda x: x.sum(-1), mean
    )
    assert "support is not finite" in refused(LOO(num_samples=2), LogNormal(mean, mean.exp()), torch.log, mean)
    before = torch.get_rng_state()
    np_before = np.random.get_state()[1].copy()
    refused(lambda p, f: sf.expectation(p, f, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all()


def test_impossible_values_are_left_out():
    logits = torch.tensor([0.2, 0.5, -torch.inf], dtype=torch.float64)
    theta = leaf([0.0, 0.0, 0.0])
    p = Categorical(logits=logits + theta)

    def f(x):
        assert not (x == 2).any()
        return x.double()

    found = outcomes(Estimation(p, f, lambda p, f: sf.expectation(p, f, 2)), (theta,))
    assert isinstance(found, Outcomes)
    assert len(found.probability) == 4


def test_a_gradient_of_zero_can_be_certified():
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=logits)
    found = exact(p, lambda x: (x[..., 0] - 0.5).square() + 0 * x[..., 1], LOO(num_samples=1, baseline=None), logits)
    assert found.verdict == "unbiased"
    with pytest.raises(sf.ScorefnError, match="exact gradient is zero"):
        check_unbiased(
            (p, lambda x: torch.ones(len(x)).double(), LOO(num_samples=2)),
            params=logits,
            test=sf.diagnostics.FixedSample(),
        )


def test_float32_says_what_rounding_is():
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    p = Bernoulli(logits=logits)
    assert exact(p, lambda x: x.sum(-1), LOO(num_samples=2), logits)
    noisy = exact(p, lambda x: x.sum(-1) + 1e4, LOO(num_samples=1, baseline=None), logits)
    assert noisy.verdict == "inconclusive"
    assert "use float64" in noisy.reason
    assert exact(p, lambda x: x.sum(-1), partial(self_including, K=2), logits).verdict == "biased"


def test_an_infinite_gradient_at_a_possible_value():
    logits = leaf([0.3])
    with pytest.raises(sf.NonFiniteError):
        check_unbiased((Bernoulli(logits=logits), lambda x: x.sum(-1).log(), LOO(num_samples=1)), params=logits)
