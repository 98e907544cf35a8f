"""A test of tests: the right estimator passes, 1 % never does, 5 % is called, and a weak run says so."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import check_unbiased, exact_gradient


class Synthetic:
    """An estimate of chosen gradients: `mean + deviation * noise`, one row a call, cheap enough to repeat."""

    def __init__(self, mean, deviation, repeats, seed=0):
        mean = torch.as_tensor(mean, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(repeats, *mean.shape, generator=generator, dtype=torch.float64)
        self.rows = iter(mean + deviation * noise)
        self.parameter = torch.zeros_like(mean).requires_grad_()

    def __call__(self):
        return (next(self.rows) * self.parameter).sum()


def report(mean, deviation, repeats, exact=(1.0, -0.5), seed=0, **options):
    estimate = Synthetic(mean, deviation, repeats, seed)
    exact = torch.tensor(exact, dtype=torch.float64)
    return check_unbiased(estimate, exact, estimate.parameter, repeats=repeats, **options)


def test_the_right_estimator_passes():
    found = report([1.0, -0.5], 0.05, 3000)
    assert found.verdict == "unbiased"
    assert found
    assert found.z.shape == (2,)
    assert found.z.abs().max() < found.critical_z
    assert found.largest_bias <= 0.01
    assert found.repeats == 3000
    assert found.false_alarm == 1e-6


@pytest.mark.parametrize("deviation", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.99, 1.01])
def test_one_percent_is_never_called_unbiased(deviation, scale):
    for seed in range(3):
        assert not report([scale, -0.5 * scale], deviation, 1500, seed=seed)


def test_one_percent_in_the_largest_coordinate_alone():
    for deviation in (0.001, 0.05):
        assert not report([1.01, -0.5], deviation, 1500)


@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.2])
def test_five_percent_is_called_biased(deviation):
    """At 0.2 the bias is 0.05 / (0.2 / sqrt(2000)) = 11 standard errors, the critical value 5: missed below 1e-8."""
    found = report([1.05, -0.5], deviation, 2000)
    assert found.verdict == "biased"
    assert not found
    assert "coordinate 0" in found.reason
    assert found.z[0] > found.critical_z


def test_a_weak_run_is_inconclusive_and_says_what_would_do():
    found = report([1.0, -0.5], 1.0, 1000)
    assert found.verdict == "inconclusive"
    assert not found
    needed = int(found.reason.split("about ")[1].split()[0])
    spread = torch.stack(list(Synthetic([1.0, -0.5], 1.0, 1000).rows)).std(0).max().item()
    assert needed == round((found.critical_z * spread / 0.01) ** 2)
    assert found.detectable_bias > 0.1


def test_the_detectable_bias_is_detected():
    """0.999 of the time by its definition; at one and a half times it, a miss has probability below 1e-6."""
    weak = report([1.0, -0.5], 0.5, 1500)
    found = report([1 + 1.5 * weak.detectable_bias, -0.5], 0.5, 1500, seed=1)
    assert found.verdict == "biased"


def test_a_rare_event_is_no_matter_for_a_z_test():
    """An event of probability 1e-3 in 2000 repeats: the skewness asks for a million."""
    rows = torch.ones(2000, 1, dtype=torch.float64)
    rows[::1000] += 500.0
    estimate = Synthetic([1.0], 0.0, 2000)
    estimate.rows = iter(rows)
    found = check_unbiased(estimate, torch.ones(1, dtype=torch.float64), estimate.parameter, repeats=2000)
    assert found.verdict == "inconclusive"
    assert "skewed" in found.reason
    assert int(found.reason.split("about ")[1].split()[0]) == pytest.approx(1e6, rel=0.05)


def test_a_rare_event_that_was_never_drawn_is_declared():
    assert report([1.0, -0.5], 0.05, 3000, rarest=0.5)
    found = report([1.0, -0.5], 0.05, 3000, rarest=1e-3)
    assert found.verdict == "inconclusive"
    assert "1000000" in found.reason


def test_an_estimate_that_is_not_a_number_is_never_unbiased():
    estimate = Synthetic([1.0, -0.5], 0.05, 1000)
    estimate.rows = iter(torch.full((1000, 2), torch.nan, dtype=torch.float64))
    with pytest.raises(sf.NonFiniteError, match="NaN or infinite"):
        check_unbiased(estimate, torch.tensor([1.0, -0.5]).double(), estimate.parameter, repeats=1000)


def test_false_alarms_come_at_the_stated_rate():
    """100 fair tests at 20 % over three coordinates: from 4 to 41 alarms, but for a chance of 1e-6 on each side."""
    fair = [report([1.0, -0.5, 0.2], 1.0, 150, (1.0, -0.5, 0.2), seed, false_alarm=0.2) for seed in range(100)]
    assert 4 <= sum(bool(found.z.abs().max() > found.critical_z) for found in fair) <= 41
    assert all(found.critical_z == pytest.approx(report_critical(3, 0.2), rel=1e-5) for found in fair)


def report_critical(coordinates, false_alarm):
    return torch.special.ndtri(torch.tensor(1 - false_alarm / (2 * coordinates))).item()


def test_the_critical_value_is_corrected_for_the_coordinates():
    for coordinates in (1, 3):
        exact = [1.0, -0.5, 0.2][:coordinates]
        found = report(exact, 0.05, 200, tuple(exact), false_alarm=0.01)
        assert found.critical_z == pytest.approx(report_critical(coordinates, 0.01), rel=1e-5)


def test_an_estimator_of_the_library():
    theta = torch.tensor([0.8, -0.4], dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=theta)

    def f(x):
        return x @ torch.tensor([1.0, 0.5], dtype=torch.float64)

    exact = exact_gradient(p, f, theta)
    found = check_unbiased(lambda: sf.expectation(p, f, 3000), exact, theta, repeats=300, bias=0.03)
    assert found.verdict == "unbiased"
    # twenty draws whose baseline contains the own draw: the gradient shrinks by 1/20
    draws = 20

    def shrunk():
        d = sf.draw(p, f, draws)
        return sf.surrogate(d, baseline=sf.Constant(d.fx.mean())).mean()

    assert check_unbiased(shrunk, exact, theta, repeats=1000, bias=0.03).verdict != "unbiased"


def test_refusals():
    estimate = Synthetic([1.0, -0.5], 0.05, 10)
    with pytest.raises(sf.ScorefnError, match="zero"):
        check_unbiased(estimate, torch.zeros(2), estimate.parameter, repeats=10)
    with pytest.raises(sf.ShapeError, match=r"\(3,\).*\(2,\)"):
        check_unbiased(estimate, torch.ones(3), estimate.parameter, repeats=10)
    with pytest.raises(sf.ShapeError, match="one exact gradient per parameter"):
        check_unbiased(estimate, [torch.ones(2), torch.ones(2)], estimate.parameter, repeats=10)
    with pytest.raises(sf.ScorefnError, match="at least 2"):
        check_unbiased(estimate, torch.ones(2), estimate.parameter, repeats=1)
    with pytest.raises(sf.ShapeError, match=r"scalar.*\(2,\)"):
        check_unbiased(lambda: estimate.parameter * 1, torch.ones(2), estimate.parameter, repeats=10)
    with pytest.raises(sf.ScorefnError, match="require grad"):
        check_unbiased(lambda: torch.zeros(()), torch.ones(2), estimate.parameter, repeats=10)


def test_several_parameters_of_any_shape():
    a, b = torch.zeros(2, 2, requires_grad=True), torch.zeros((), requires_grad=True)
    exact = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(-5.0))

    def estimate():
        return (exact[0] * a).sum() + exact[1] * b

    found = check_unbiased(estimate, iter(exact), iter([a, b]), repeats=10)
    assert found.verdict == "unbiased"
    assert found.z.tolist() == [0.0] * 5
