"""Quantiles against closed forms, Student's and Hotelling's tests, degenerate coordinates."""

import math

import pytest
import torch

import scorefn as sf
from scorefn.diagnostics import FixedSample, Hotelling
from scorefn.diagnostics.moments import Moments
from scorefn.diagnostics.tails import beta_probability, fisher_quantile, student_quantile

EXACT = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)


def rows(count, deviation=0.05, seed=0, bias=(0.0, 0.0, 0.0)):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return EXACT + torch.tensor(bias, dtype=torch.float64) + deviation * noise


@pytest.mark.parametrize("tail", [0.4, 0.01, 1e-6, 1e-10])
def test_quantiles_with_closed_forms(tail):
    assert student_quantile(tail, 1) == pytest.approx(1 / math.tan(math.pi * tail), rel=1e-12)  # Cauchy
    u = 1 - 2 * tail
    assert student_quantile(tail, 2) == pytest.approx(2 * u / math.sqrt(8 * tail * (1 - tail)), rel=1e-9)
    for second in (3, 40, 9000):
        # two degrees of freedom: P(F > f) = (1 + 2 f / b)^(-b / 2)
        assert fisher_quantile(tail, 2, second) == pytest.approx(
            second / 2 * math.expm1(-2 / second * math.log(tail)), rel=1e-9
        )
        assert fisher_quantile(2 * tail, 1, second) == pytest.approx(student_quantile(tail, second) ** 2, rel=1e-9)
    normal = -torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)).item()
    assert student_quantile(tail, 1e7) == pytest.approx(normal, rel=1e-5)


def test_the_incomplete_beta_function():
    for x in (0.0, 0.1, 0.7, 1.0):
        assert beta_probability(x, 1, 3) == pytest.approx(1 - (1 - x) ** 3, abs=1e-15)
    binomial = sum(math.comb(30, k) * 0.3**k * 0.7 ** (30 - k) for k in range(12, 31))
    assert beta_probability(0.3, 12, 19) == pytest.approx(binomial, rel=1e-12)


def test_moments_in_pieces_are_those_of_the_whole():
    data = rows(1000, 2.0).exp()
    moments = Moments()
    for part in data.split(170):
        moments.add(part)
    assert torch.allclose(moments.mean, data.mean(0), rtol=1e-13)
    assert torch.allclose(moments.variance, data.var(0), rtol=1e-12)
    skewness = (((data - data.mean(0)) / data.std(0)) ** 3).mean(0)
    assert torch.allclose(moments.squared_skewness(torch.tensor(1e-300)), skewness.square(), rtol=1e-10)


def test_z_and_interval_are_students():
    data = rows(400)
    found = FixedSample().judge(data, EXACT)
    z = (data.mean(0) - EXACT) / (data.std(0) / 20)
    assert torch.allclose(found.z, z, rtol=1e-9)
    assert found.critical_z == pytest.approx(student_quantile(1e-6 / 6, 399))
    half = found.critical_z * data.std(0) / 20
    assert torch.allclose(found.interval, torch.stack((found.bias - half, found.bias + half)), rtol=1e-9)
    assert found.worst == int(z.abs().argmax())
    assert found.repeats == 400
    assert torch.allclose(found.variance, data.var(0), rtol=1e-9)


def test_t_squared_is_hotellings():
    data = rows(600, 0.2, bias=(0.05, 0.0, 0.0))
    found = Hotelling(batches=60).judge(data, EXACT)
    means = data.reshape(60, 10, 3).mean(1)
    d = means.mean(0) - EXACT
    statistic = 60 * d @ torch.linalg.solve(torch.cov(means.T), d)
    limit = 3 * 59 / 57 * fisher_quantile(1e-6, 3, 57)
    assert found.verdict == ("biased" if statistic > limit else "inconclusive")
    assert f"T^2 = {float(statistic):.1f} exceeds {limit:.1f}" in found.reason
    assert found.method == "Hotelling"


def test_hotelling_sees_what_is_spread_over_correlated_coordinates():
    """Noise along (1, 1, 1) and a bias across it: every coordinate alone is drowned."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    own = 0.01 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    data = EXACT + shared + own + torch.tensor([0.01, -0.01, 0.0])
    assert FixedSample().judge(data, EXACT).verdict == "inconclusive"
    assert Hotelling().judge(data, EXACT).verdict == "biased"
    assert Hotelling().judge(data - torch.tensor([0.01, -0.01, 0.0]), EXACT).verdict == "inconclusive"


@pytest.mark.parametrize("test", [FixedSample(), Hotelling()])
def test_coordinates_without_variance_must_match(test):
    data = rows(3000)
    wide = torch.cat((data, torch.full((3000, 1), 0.7).double()), 1)
    exact = torch.cat((EXACT, torch.tensor([0.7]).double()))
    same = torch.full((3000, 4), 0.7, dtype=torch.float64)
    exact[3] = wide[0, 3]
    assert test.judge(wide, exact).verdict == "unbiased"
    assert test.judge(same, same[0]).verdict == "unbiased"
    off = exact.clone()
    off[3] += 1e-6
    assert test.judge(wide, off).verdict == "biased"


def test_a_covariance_without_full_rank():
    data = rows(3000)
    wide = torch.cat((data, data[:, :1] - data[:, 1:2]), 1)
    exact = torch.cat((EXACT, EXACT[:1] - EXACT[1:2]))
    assert Hotelling().judge(wide, exact).verdict == "unbiased"
    wide[:, 3] += 3e-4  # within the noise of the coordinate, and exactly wrong beside the others
    assert FixedSample().judge(wide, exact).verdict != "biased"
    assert Hotelling().judge(wide, exact).verdict == "biased"


def test_a_bias_is_never_passed():
    for test in (FixedSample(), Hotelling()):
        for seed in range(3):
            assert not test.judge(rows(2000, 0.05, seed, (0.0101, 0.0, 0.0)), EXACT)


def test_the_guard_against_rare_events():
    data = torch.ones(2000, 1, dtype=torch.float64)
    data[::1000] += 500.0
    for test in (FixedSample(), Hotelling()):
        found = test.judge(data, torch.ones(1))
        assert found.verdict == "inconclusive"
        assert "skewed" in found.reason
    assert FixedSample(rarest=1e-4).judge(rows(3000), EXACT).verdict == "inconclusive"


def test_float32_gradients_are_judged_by_their_rounding():
    data = torch.full((500, 1), 0.1)
    assert FixedSample().judge(data, torch.tensor([0.1], dtype=torch.float64)).verdict == "unbiased"
    assert FixedSample().judge(data, torch.tensor([0.1001], dtype=torch.float64)).verdict == "biased"


def test_refusals():
    for test in (FixedSample(), Hotelling()):
        with pytest.raises(sf.ShapeError, match=r"\(5, 3\).*\(2,\)"):
            test.judge(rows(5), torch.ones(2))
        with pytest.raises(sf.ScorefnError, match="at least 2"):
            test.judge(rows(1), EXACT)
        with pytest.raises(sf.ScorefnError, match="gradient is zero"):
            test.judge(rows(9), torch.zeros(3))
        with pytest.raises(sf.NonFiniteError, match="repeat 3"):
            test.judge(torch.tensor([[1.0], [1.0], [math.nan]]), torch.ones(1))
        with pytest.raises(sf.NonFiniteError, match="exact gradient is NaN"):
            test.judge(rows(9), torch.full((3,), math.nan))
        with pytest.raises(sf.ScorefnError, match="bias=-1"):
            test.judge(rows(9), EXACT, bias=-1)
    with pytest.raises(sf.ScorefnError, match="needs 5 batches or more.*raise repeats"):
        Hotelling().judge(rows(4), EXACT)
    with pytest.raises(sf.ScorefnError, match="batches=9 of 5 repeats"):
        Hotelling(5, batches=9)
    with pytest.raises(sf.ScorefnError, match="repeats must be"):
        FixedSample(0)
