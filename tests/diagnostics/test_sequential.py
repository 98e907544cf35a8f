"""The evidence is a martingale, exactly; the test stops where it is decided, and never before the burn-in."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.diagnostics import FixedSample, Sequential
from scorefn.diagnostics.sequential import critical_value, log_evidence, mixture

EXACT = torch.tensor([1.0, -0.5], dtype=torch.float64)


def rows(count, deviation=0.1, bias=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return EXACT + torch.tensor([bias, 0.0], dtype=torch.float64) + deviation * noise


@pytest.mark.parametrize(("count", "g"), [(6, 0.3), (30, 0.05), (200, 0.01)])
def test_the_evidence_has_mean_one_under_the_law_of_t(count, g):
    angle = (np.arange(400_000) + 0.5) / 400_000 * math.pi - math.pi / 2  # t = tan: all of the line
    t = np.tan(angle)
    log_density = -count / 2 * np.log1p(t**2 / (count - 1)) - 2 * np.log(np.cos(angle))
    density = np.exp(log_density - log_density.max())
    evidence = np.exp([log_evidence(value, count, g) for value in t[::20]])
    assert (evidence * density[::20]).sum() / density[::20].sum() == pytest.approx(1.0, abs=1e-3)


def test_the_evidence_is_a_martingale():
    """One more value leaves the evidence as it was in the mean, sigma integrated out by Haar's measure."""
    x = np.array([0.3, -1.1, 0.7, 0.2, 1.4, -0.2])
    n = len(x)
    new = np.tan((np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2)

    def t_of(sum1, sum2, count):
        mean = sum1 / count
        return mean / np.sqrt((sum2 / count - mean**2) / (count - 1))

    # under the null hypothesis and the right Haar prior, the next value has a t density about 0
    predictive = (1 + new**2 / (x**2).sum()) ** (-(n + 1) / 2) * (1 + new**2)
    after = np.exp([log_evidence(t, n + 1, 0.4) for t in t_of(x.sum() + new, (x**2).sum() + new**2, n + 1)[::10]])
    before = math.exp(log_evidence(t_of(x.sum(), (x**2).sum(), n), n, 0.4))
    assert (after * predictive[::10]).sum() / predictive[::10].sum() == pytest.approx(before, rel=1e-3)


def test_the_critical_value_is_where_the_evidence_reaches_its_level():
    for count, g, level in ((100, 0.05, 1e-6), (5000, 0.003, 1e-8), (1_000_000, 1e-3, 0.01)):
        critical = critical_value(count, g, level)
        assert log_evidence(critical, count, g) == pytest.approx(-math.log(level), rel=1e-9)
        growth = count * g + 1
        robbins = math.sqrt(2 * growth / (count * g) * math.log(math.sqrt(growth) / level))
        assert critical == pytest.approx(robbins, rel=20 * robbins**2 / count + 1e-5)
    assert critical_value(3, 0.5, 1e-6) == math.inf  # three values cannot reach it


def test_the_mixture_is_tightest_at_its_horizon():
    level, horizon = 1e-6, 20_000
    best = critical_value(horizon, mixture(level, horizon), level)
    for factor in (0.2, 5.0):
        assert best < critical_value(horizon, factor * mixture(level, horizon), level)


def test_it_stops_as_soon_as_it_is_decided():
    large = Sequential().judge(rows(100_000, bias=0.05), EXACT)
    assert (large.verdict, large.repeats, large.method) == ("biased", 1000, "sequential")
    small = Sequential().judge(rows(100_000, bias=0.014), EXACT)
    assert small.verdict == "biased"
    assert 1000 < small.repeats <= 50_000
    right = Sequential().judge(rows(100_000), EXACT)
    assert right.verdict == "unbiased"
    assert right.repeats < 20_000
    assert right.critical_z > FixedSample().judge(rows(right.repeats), EXACT).critical_z


def test_it_gives_up_and_says_how_many_would_do():
    found = Sequential(most_repeats=5000).judge(rows(9000, 1.0), EXACT)
    assert (found.verdict, found.repeats) == ("inconclusive", 5000)
    assert "repeats would do" in found.reason
    short = Sequential().judge(rows(300), EXACT)
    assert short.verdict == "inconclusive"
    assert "fewer than 1000" in short.reason


def test_nothing_is_decided_before_the_guard():
    data = torch.ones(3000, 1, dtype=torch.float64)
    data[::500] += 100.0
    found = Sequential(most_repeats=3000).judge(data, torch.ones(1))
    assert found.verdict == "inconclusive"
    assert "skewed" in found.reason


def test_one_percent_is_never_passed():
    for seed in range(5):
        assert not Sequential(20_000).judge(rows(20_000, 0.1, 0.0101, seed), EXACT)


def test_refusals():
    with pytest.raises(sf.ScorefnError, match="burn_in=1000 must lie between 2 and most_repeats=10"):
        Sequential(10)
    with pytest.raises(sf.ScorefnError, match="batch"):
        Sequential(batch=0)
    with pytest.raises(sf.ScorefnError, match="rarest"):
        Sequential(rarest=-1.0)
    with pytest.raises(sf.ScorefnError, match="at least 2"):
        Sequential().judge(rows(1), EXACT)
    with pytest.raises(sf.ShapeError):
        Sequential().judge(rows(10), torch.ones(3))
