"""A test of tests: the right estimator passes, 1 % never does, 5 % is called, and a weak run says so."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Gamma, Independent

import scorefn as sf
from scorefn.diagnostics import FixedSample, Hotelling, Sequential, assert_unbiased, check_unbiased, exact_gradient


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
    squared = (1 - 2e-3) ** 2 / (1e-3 * (1 - 1e-3)) * (1999 / 2000) ** 3  # skewness, by the sample's own spread
    assert int(found.reason.split("about ")[1].split()[0]) == pytest.approx(1000 * squared, abs=1)


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
    assert all(found.critical_z == pytest.approx(report_critical(3, 0.2, 150), rel=1e-6) for found in fair)


def report_critical(coordinates, false_alarm, repeats):
    """Student's t, by the trapezoid rule on its density."""
    t = np.linspace(0, 60, 600_001)
    density = (1 + t**2 / (repeats - 1)) ** (-repeats / 2)
    mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return float(np.interp((1 - false_alarm / coordinates) * mass[-1], mass, t))


def test_the_critical_value_is_corrected_for_the_coordinates():
    for coordinates in (1, 3):
        exact = [1.0, -0.5, 0.2][:coordinates]
        found = report(exact, 0.05, 200, tuple(exact), false_alarm=0.01)
        assert found.critical_z == pytest.approx(report_critical(coordinates, 0.01, 200), rel=1e-6)


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


# ------------------------------------------------------------------------------------------------ (p, f, estimator)


@pytest.fixture
def logits():
    return torch.tensor([0.4, -0.8], dtype=torch.float64, requires_grad=True)


def f(x):
    return (x @ torch.tensor([1.0, 0.5], dtype=x.dtype) + 0.3).square()


def shrunk(p, f):
    """Leave-one-out whose baseline has a share in its own draw: (K - 1) / K of the gradient."""
    x = p.sample((2,))
    fx = f(x)
    return ((fx - fx.mean(0)) * p.log_prob(x).sum(-1)).mean(0)


def test_what_can_be_enumerated_is_exact(logits):
    found = check_unbiased((Bernoulli(logits=logits), f, partial(sf.expectation, num_samples=2)), params=logits)
    assert (found.verdict, found.method, found.repeats, found.false_alarm) == ("unbiased", "exact", 16, 0.0)
    assert found.bias.abs().max() < 1e-15
    wrong = check_unbiased((Bernoulli(logits=logits), f, shrunk), params=logits)
    assert wrong.verdict == "biased"
    assert wrong.largest_bias == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize("test", [FixedSample(2000), Hotelling(2000), Sequential(4000)])
def test_a_sampled_estimator_is_compared_on_its_own_draws(logits, test):
    """1 % in one coordinate would need 10^6 plain repeats."""
    p = Bernoulli(logits=logits)

    def slightly(p, f):
        stretched = Bernoulli(
            logits=p.logits * torch.tensor([1.01, 1.0]) - p.logits.detach() * torch.tensor([0.01, 0.0])
        )
        x = p.sample((3,))
        fx = f(x)
        return ((fx - (fx.sum() - fx) / 2) * stretched.log_prob(x).sum(-1)).mean(0)

    right = check_unbiased((p, f, partial(sf.expectation, num_samples=3)), params=logits, test=test)
    assert right.verdict == "unbiased"
    assert right.repeats <= 2000
    wrong = check_unbiased((p, f, slightly), params=logits, test=test)
    assert wrong.verdict == "biased"
    assert wrong.worst == 0
    exact = float(exact_gradient(p, f, logits)[0][0])
    assert float(wrong.bias[0]) == pytest.approx(0.01 * exact, rel=1e-3)


def test_what_cannot_be_integrated_is_compared_with_leave_one_out():
    rate = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    p = Gamma(torch.tensor(2.0, dtype=torch.float64), rate)
    right = check_unbiased((p, torch.sqrt, partial(sf.expectation, num_samples=2, baseline=None)), params=rate)
    assert right.verdict == "unbiased"
    assert "on the same draws" in right.remark

    halved = partial(sf.expectation, num_samples=2, shape=lambda fx: fx / 2)
    wrong = check_unbiased((p, torch.sqrt, halved), params=rate, repeats=50_000)
    assert wrong.verdict == "biased"
    # E x^(1/2) = Gamma(2.5) / Gamma(2) rate^(-1/2)
    slope = -0.5 * math.gamma(2.5) * 1.5**-1.5
    low, high = wrong.interval.flatten().tolist()  # at 1 - 1e-6
    assert low < -0.5 * slope < high
    assert high - low < 0.1 * abs(slope)


def test_a_given_reference_is_never_taken_for_the_gradient_of_f(logits):
    """The estimator of another function, with the right reference for it: no false alarm by the controls."""
    p = Bernoulli(logits=logits)

    def doubled(p, f):
        return 2 * sf.expectation(p, f, 2)

    exact = 2 * exact_gradient(p, f, logits)[0]
    assert check_unbiased((p, f, doubled), exact, logits).verdict == "unbiased"
    sampled = check_unbiased((p, f, doubled), exact, logits, test=FixedSample(1000), bias=0.5)
    assert sampled.verdict != "biased"
    assert "check which of the two" in sampled.remark


def test_a_wrong_reference_is_found_out(logits):
    p = Bernoulli(logits=logits)
    wrong = 1.1 * exact_gradient(p, f, logits)[0]
    found = check_unbiased((p, f, partial(sf.expectation, num_samples=2)), wrong, logits)
    assert found.verdict == "biased"
    assert "it is the reference that is wrong" in found.remark


def test_the_assertion_says_it_all(logits):
    p = Bernoulli(logits=logits)
    assert assert_unbiased((p, f, partial(sf.expectation, num_samples=2)), params=[logits])
    with pytest.raises(AssertionError, match=r"(?s)biased \(exact, 16 outcomes.*50.*parameter 0 at \(0,\).*To do"):
        assert_unbiased((p, f, shrunk), params=logits)
    estimate = Synthetic([1.0, -0.5], 1.0, 1000)
    with pytest.raises(AssertionError, match=r"(?s)inconclusive.*about \d+ repeats"):
        assert_unbiased(estimate, torch.tensor([1.0, -0.5]), estimate.parameter, repeats=1000)


def test_a_net_keeps_its_graph():
    net = torch.nn.Linear(2, 3).double()
    p = Independent(Bernoulli(logits=net(torch.ones(2, dtype=torch.float64))), 1)
    for test in (None, FixedSample(50)):
        found = check_unbiased(
            (p, lambda x: x.sum(-1).square(), partial(sf.expectation, num_samples=2)),
            params=net.parameters(),
            test=test,
        )
        assert found.verdict == "unbiased"
        assert found.z.shape == (9,)
    assert net.weight.grad is None


def test_nothing_to_compare_with(logits):
    with pytest.raises(sf.ScorefnError, match="exact is missing.*p, f, estimator"):
        check_unbiased(lambda: logits.sum(), params=logits)
    with pytest.raises(sf.ScorefnError, match="params is missing"):
        check_unbiased(lambda: logits.sum(), torch.ones(2))
    p = Gamma(logits.exp(), torch.ones(2, dtype=torch.float64))

    def mixing(x):
        return x.sum(-1) + x.mean()

    with pytest.raises(sf.ScorefnError, match="nothing to compare"):
        check_unbiased((p, mixing, lambda p, f: sf.expectation(p, f, 2)), params=logits)


def test_draws_that_are_not_seen_are_compared_with_others(logits):
    p = torch.distributions.LogNormal(logits, torch.ones(2, dtype=torch.float64) / 2)
    found = check_unbiased(
        (p, lambda x: x.sum(-1).log1p(), lambda p, f: f(p.rsample((4,))).mean()), params=logits, bias=0.2
    )
    assert "draws of its own" in found.remark
    assert found.verdict == "unbiased"


def test_arguments_out_of_range(logits):
    estimation = (Bernoulli(logits=logits), f, partial(sf.expectation, num_samples=2))
    for options, message in (
        ({"bias": 0.0}, "bias=0.0 must be positive"),
        ({"false_alarm": 1.0}, "false_alarm=1.0 must be a probability"),
        ({"rarest": 2.0}, "rarest=2.0 must be a probability"),
        ({"rarest": 0.1, "test": FixedSample()}, "give it to the test"),
        ({"repeats": 1}, "at least 2"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            check_unbiased(estimation, params=logits, **options)
    with pytest.raises(sf.NonFiniteError, match="exact gradient is NaN"):
        check_unbiased(estimation, torch.full((2,), torch.nan), logits)


def test_an_estimate_without_variance_is_compared_to_rounding():
    parameter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact = torch.tensor([0.3, -0.7], dtype=torch.float64)
    assert check_unbiased(lambda: (parameter * exact).sum(), exact, parameter, repeats=10).verdict == "unbiased"
    off = check_unbiased(lambda: (parameter * exact).sum() * (1 + 1e-9), exact, parameter, repeats=10)
    assert off.verdict == "biased"


def test_a_reference_in_float32_is_compared_to_its_own_rounding(logits):
    p = Bernoulli(logits=logits)
    exact = exact_gradient(p, f, logits)[0].float()
    for test in (None, FixedSample(1000)):
        assert check_unbiased((p, f, partial(sf.expectation, num_samples=2)), exact, logits, test=test)
