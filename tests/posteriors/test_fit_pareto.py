"""Pareto-smoothed importance sampling against known tails, an independent fit, and another program's digits."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import scorefn as sf
from scorefn.posteriors import draws_needed, khat_threshold, pareto_k, psis
from scorefn.posteriors.pareto import _generalized_pareto

INF = math.inf


def plotting_positions(size):
    """The middle of each of equally likely intervals: a sample without chance."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def pareto(size, k):
    """Log weights u^-k, whose tail has shape k at every cutoff."""
    return -k * plotting_positions(size).log()


def waves(size):
    n = torch.arange(1, size + 1, dtype=torch.float64)
    return 3 * n.sin() ** 3 + 0.5 * n.log()


def narrow_normal(size, scale=0.6):
    """A normal of this scale as a guide of the standard normal: the tail has shape 1 - scale^2."""
    x = scale * Normal(0.0, 1.0).icdf(plotting_positions(size))
    return 0.5 * (x / scale) ** 2 - 0.5 * x**2


# arviz 0.21.0, arviz.psislw(log_weights) with numpy 2.4.6: k, then the normalised log weights of the largest, of the
# second and of the 20th largest and of the smallest raw weight, then their mean position.
ARVIZ = {
    (pareto, 0.5, 100): (
        0.49196002019884816, -2.6249742892516497, -3.1699144696914967, -4.459290708016576, -5.262100442809209,
        33.95452346277832,
    ),
    (pareto, 0.9, 1000): (
        0.8442664334030595, -1.9956908517459835, -2.924721520684935, -5.109697292549962, -8.624262339384277,
        162.58240763645898,
    ),
    (pareto, 0.9, 4000): (
        0.8703208341622458, -2.167348237015549, -3.1238961983220097, -5.361685726501969, -10.122018376041352,
        583.7599404835263,
    ),
    (waves, None, 100): (
        -0.0792018161686783, -2.590316802711593, -2.590316802711593, -4.403907278226331, -9.598479554656507,
        58.31790341590377,
    ),
    (waves, None, 1000): (
        -0.47396235169981094, -4.740457724847368, -4.740457724847368, -4.943383671620845, -13.02458426437492,
        600.3037148196645,
    ),
    (waves, None, 4000): (
        -0.5818831465717019, -6.116609870406198, -6.116609870406198, -6.181940430512211, -15.09691666979639,
        2400.8787464498937,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARVIZ, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}")
def test_the_digits_are_those_of_arviz(case):
    made, k, size = case
    log_weights = made(size) if k is None else made(size, k)
    found = psis(log_weights)
    normalised = found.log_weights.log_softmax(0)
    order = log_weights.argsort()
    ours = [found.k, *normalised[order[[-1, -2, -20, 0]]], normalised.exp() @ torch.arange(size).double()]
    torch.testing.assert_close(
        torch.stack(ours), torch.tensor(ARVIZ[case], dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 0.95, 1.5])
def test_exact_pareto_weights_have_their_own_shape(k):
    """Two exponentials: a target of rate a and a guide of rate b > a have weights of exactly this tail, k = 1 - a/b."""
    size = 10**6
    b = 2.0
    a = (1 - k) * b
    z = -plotting_positions(size).log() / b
    log_weights = (a - b) * -z if a <= 0 else (math.log(a / b) + (b - a) * z)
    tail = math.ceil(3 * math.sqrt(size))
    shrunk = (tail * k + 5) / (tail + 10)
    assert pareto_k(log_weights).item() == pytest.approx(shrunk, abs=0.005)


@pytest.mark.parametrize("scale", [0.9, 0.7, 0.5])
def test_a_normal_that_is_too_narrow(scale):
    """P(w > t) falls like t^(-1/(1 - scale^2)) but for a logarithm, by which k-hat stays below."""
    expected = 1 - scale**2
    found = [pareto_k(narrow_normal(size, scale)).item() for size in (10**3, 10**5, 10**6)]
    assert expected - 0.12 < found[-1] < expected
    assert found == sorted(found) or scale == 0.9  # where the tail is light, the prior's pull towards 1/2 is seen first


def test_a_guide_that_is_too_wide_has_bounded_weights():
    assert pareto_k(narrow_normal(10**5, 2.0)).item() < 0


def test_a_student_target_of_a_normal_guide_has_no_mean_weight():
    """log w grows like z^2/2: every power of the weights has an infinite mean."""
    z = Normal(0.0, 1.0).icdf(plotting_positions(10**6))
    log_weights = torch.distributions.StudentT(3.0).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    assert pareto_k(log_weights).item() > 0.7


@pytest.mark.parametrize("k", [-0.8, -0.2, 0.0, 0.3, 0.8, 1.2])
def test_the_fit_is_the_posterior_mean_under_the_profile_likelihood(k):
    """By quadrature over b instead of Zhang and Stephens' grid, whose points are the quantiles of their prior."""
    n = 400
    u = plotting_positions(n).numpy()
    x = np.sort(-np.log(u) if k == 0 else (u**-k - 1) / k)
    quartile, largest = x[int(n / 4 + 0.5) - 1], x[-1]
    p = (np.arange(200_000) + 0.5) / 200_000  # the prior of b has the quantile function 1/max + (1 - p^-1/2)/(3 x_q)
    b = 1 / largest + (1 - p**-0.5) / (3 * quartile)
    shape = np.array([np.log1p(-value * x).mean() for value in b[::20]])
    profile = n * (np.log(-b[::20] / shape) - shape - 1)
    weight = np.exp(profile - profile.max())
    mean = (weight * b[::20]).sum() / weight.sum()
    expected = np.log1p(-mean * x).mean()
    found, sigma = _generalized_pareto(torch.from_numpy(x))
    assert found == pytest.approx((n * expected + 5) / (n + 10), abs=0.006)  # of a grid of 50 points
    assert sigma == pytest.approx(-expected / mean, rel=0.01)


def test_the_thresholds_are_the_published_ones():
    """Release notes of the R package loo, 2.7.0: 100, 320, 1000, 2200 draws; and .7 beyond."""
    found = [khat_threshold(size) for size in (100, 320, 1000, 2200, 10_000)]
    assert found == pytest.approx([0.5, 0.6, 2 / 3, 0.7, 0.7], abs=0.002)
    assert draws_needed(0.5) == pytest.approx(100)
    assert draws_needed(0.7) == pytest.approx(10 ** (1 / 0.3))
    assert draws_needed(-3.0) == pytest.approx(10)
    assert draws_needed(1.0) == draws_needed(INF) == INF
    assert draws_needed(0.9999) == draws_needed(math.nextafter(1.0, 0.0)) == INF  # 10^10000 is no float
    assert draws_needed(1 - 1 / 300) == pytest.approx(1e300, rel=1e-9)


def test_each_problem_has_a_tail_of_its_own():
    log_weights = torch.stack([pareto(1000, 0.3), waves(1000), pareto(1000, 0.9)], 1).reshape(1000, 3, 1)
    found = psis(log_weights)
    assert found.k.shape == (3, 1)
    for index in range(3):
        alone = psis(log_weights[:, index, 0])
        assert torch.equal(found.k[index, 0], alone.k)
        assert torch.equal(found.log_weights[:, index, 0], alone.log_weights)
    assert found.reliable.flatten().tolist() == [True, True, False]
    assert "draws=1000" in repr(found)


def test_the_scale_of_the_weights_is_kept_and_the_input_left_alone():
    log_weights = pareto(500, 0.6).requires_grad_()
    before = log_weights.detach().clone()
    found, moved = psis(log_weights), psis(log_weights + 300.0)
    assert torch.equal(log_weights, before)
    assert not found.log_weights.requires_grad
    torch.testing.assert_close(moved.log_weights - 300.0, found.log_weights, rtol=0, atol=1e-11)
    torch.testing.assert_close(moved.k, found.k, rtol=0, atol=1e-11)
    body = before.argsort()[: 500 - 68]
    assert torch.equal(found.log_weights[body], before[body])
    assert found.log_weights.max() <= before.max()


def test_the_order_of_the_draws_does_not_matter():
    log_weights = waves(700)
    shuffled = torch.randperm(700)
    assert torch.equal(psis(log_weights[shuffled]).log_weights, psis(log_weights).log_weights[shuffled])


def test_a_single_precision_guide_is_judged_in_double():
    assert psis(pareto(100, 0.5).float()).log_weights.dtype == torch.float64


def repeated(*pairs):
    return torch.cat([torch.full((count,), float(value)) for value, count in pairs])


def test_weights_that_are_all_equal_have_no_tail():
    for log_weights in (repeated((-3.0, 100)), repeated((0.0, 40), (-1.0, 60))):
        found = psis(log_weights)
        assert found.k.item() == -INF
        assert torch.equal(found.log_weights, log_weights.double())


@pytest.mark.parametrize(
    "log_weights",
    [
        repeated((0.2, 50), (0.0, 300), (-0.4, 650)),  # the largest are equal, and fewer than the tail
        repeated((0.2, 2), (0.0, 300), (-0.4, 698)),  # two exceed the cutoff
    ],
    ids=["one value", "two draws"],
)
def test_a_few_tied_values_are_judged_by_a_lower_cutoff_and_not_smoothed(log_weights):
    found = psis(log_weights)
    assert -INF < found.k.item() < 0
    assert torch.equal(found.log_weights, log_weights.double())


@pytest.mark.parametrize(
    "log_weights",
    [
        repeated((0.0, 5), (-INF, 995)),
        repeated((0.0, 1), (-800.0, 99)),
        repeated((0.0, 1), (-1.0, 1), (-2000.0, 98)),
    ],
    ids=["zeros", "one", "two"],
)
def test_a_handful_of_draws_with_all_the_weight_cannot_be_judged(log_weights):
    assert psis(log_weights).k.item() == INF


def test_weights_that_underflow_count_as_zero():
    """Thirty draws carry all the weight; how far below the others are says nothing about the tail."""
    above = pareto(30, 2.0)
    found = [psis(torch.cat([above, torch.full((970,), far)])) for far in (-900.0, -9000.0, -INF)]
    assert 0.5 < found[0].k.item() < INF
    assert found[0].k == found[1].k == found[2].k
    assert torch.equal(found[0].log_weights[:30], found[2].log_weights[:30])


def test_nearly_equal_tails_do_not_underflow():
    found = psis(1e-13 * plotting_positions(200))
    assert math.isfinite(found.k.item())
    assert found.k.item() < 0.3


def test_a_list_is_not_rounded():
    values = pareto(100, 0.4)
    assert torch.equal(psis(values.tolist()).log_weights, psis(values).log_weights)


def test_refusals():
    with pytest.raises(sf.ScorefnError, match="There are 24 log weights, but at least 25"):
        pareto_k(torch.zeros(24))
    with pytest.raises(sf.ShapeError, match=r"shape \(\), but it must be \[S, \*B\]"):
        psis(torch.tensor(1.0))
    with pytest.raises(sf.ShapeError, match=r"shape \(30, 0\)"):
        psis(torch.zeros(30, 0))
    bad = torch.zeros(30, 2)
    bad[4, 1], bad[7, 0] = math.nan, math.nan
    with pytest.raises(sf.NonFiniteError, match=r"nan at 2 of 30 draws, namely \[4, 7\]"):
        psis(bad)
    with pytest.raises(sf.NonFiniteError, match=r"inf at 1 of 30 draws, namely \[3\]"):
        psis([0.0] * 3 + [INF] + [0.0] * 26)
    with pytest.raises(sf.NonFiniteError, match="All 30 weights are zero"):
        psis(torch.full((30,), -INF))
    with pytest.raises(sf.ScorefnError, match=r"log_weights is torch.complex64, .* pass log_weights.real"):
        psis(torch.zeros(30, dtype=torch.complex64))
    with pytest.raises(sf.ScorefnError, match="k is nan"):
        draws_needed(math.nan)
    for number in (math.nan, INF, "100"):
        with pytest.raises(sf.ScorefnError, match=f"num_draws must be an integer of at least 1, but it is {number!r}"):
            khat_threshold(number)
