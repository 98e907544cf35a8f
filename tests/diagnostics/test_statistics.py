"""Gradient statistics against numpy; the comparison's ranking and table."""

import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.diagnostics import compare, gradient_statistics


class Recorded:
    """An estimate whose gradients are the rows of a table, in turn."""

    def __init__(self, rows, parameter):
        self.rows, self.parameter, self.calls = rows, parameter, 0

    def __call__(self):
        self.calls += 1
        return (self.rows[self.calls - 1] * self.parameter).sum()


@pytest.fixture
def parameter():
    return torch.zeros(3, dtype=torch.float64, requires_grad=True)


def rows(repeats, deviation=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(repeats, 3, generator=generator, dtype=torch.float64)
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + deviation * noise


def test_moments_are_numpys(parameter):
    table = rows(50)
    estimate = Recorded(table, parameter)
    found = gradient_statistics(estimate, parameter, 50)
    data = table.numpy()
    assert estimate.calls == found.repeats == 50
    np.testing.assert_allclose(found.mean[0], data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance[0], data.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error[0], data.std(0, ddof=1) / 50**0.5, rtol=1e-12)
    total = data.var(0, ddof=1).sum()
    assert found.total_variance == pytest.approx(total, rel=1e-12)
    signal = (data.mean(0) ** 2).sum() - total / 50
    assert found.signal_to_noise == pytest.approx(signal / total, rel=1e-10)
    assert found.seconds > 0
    assert parameter.grad is None


def test_signal_to_noise_is_without_bias_and_never_negative(parameter):
    noise = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    assert gradient_statistics(Recorded(noise, parameter), parameter, 2).signal_to_noise == 0.0
    still = torch.ones(3, 3, dtype=torch.float64)
    assert gradient_statistics(Recorded(still, parameter), parameter, 3).signal_to_noise == float("inf")


def test_the_parameters_of_a_module():
    """`module.parameters()` can be walked once only."""
    module = nn.Linear(2, 1)
    inputs = iter(torch.randn(5, 2))
    found = gradient_statistics(lambda: module(next(inputs)).sum(), module.parameters(), 5)
    assert [m.shape for m in found.mean] == [(1, 2), (1,)]
    assert found.variance[1].item() == 0.0


def test_a_parameter_without_influence_has_no_gradient(parameter):
    other = torch.zeros(2, requires_grad=True)
    found = gradient_statistics(Recorded(rows(5), parameter), [parameter, other], 5)
    assert found.mean[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("repeats", [1, 0, -3])
def test_too_few_repeats(parameter, repeats):
    with pytest.raises(sf.ScorefnError, match=f"at least 2.*{repeats}"):
        gradient_statistics(Recorded(rows(5), parameter), parameter, repeats)


def test_an_estimate_that_is_no_scalar(parameter):
    with pytest.raises(sf.ShapeError, match=r"scalar.*\(3,\).*mean"):
        gradient_statistics(lambda: parameter * 1, parameter, 5)
    with pytest.raises(sf.ShapeError, match="scalar"):
        compare({"a": lambda: parameter[:1] * 1}, parameter, repeats=5)
    with pytest.raises(sf.ScorefnError, match="require grad"):
        gradient_statistics(lambda: torch.zeros(()), parameter, 5)


def test_comparison_ranks_by_variance_times_cost(parameter):
    estimates = {
        "noisy": Recorded(rows(40, 10.0), parameter),
        "quiet": Recorded(rows(40, 0.1), parameter),
        "middling": Recorded(rows(40, 1.0), parameter),
    }
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = compare(estimates, parameter, exact=(exact,), repeats=40)
    assert found.names == ("quiet", "middling", "noisy")  # a hundredfold each: no clock can turn that round
    for name, estimate in estimates.items():
        data = estimate.rows.numpy()
        z = np.abs(data.mean(0) - exact.numpy()) / (data.std(0, ddof=1) / 40**0.5)
        assert found.bias_z[name] == pytest.approx(z.max(), rel=1e-9)
        assert found.statistics[name].total_variance == pytest.approx(data.var(0, ddof=1).sum(), rel=1e-12)
        assert found.cost(name) == found.statistics[name].total_variance * found.statistics[name].seconds


def test_a_bias_shows_in_the_comparison(parameter):
    table = rows(1000, 0.1)
    wrong = torch.tensor([1.1, -2.0, 0.5], dtype=torch.float64)
    found = compare({"a": Recorded(table, parameter)}, parameter, exact=[wrong], repeats=1000)
    assert found.bias_z["a"] > 20


def test_exact_may_be_a_tensor_or_walked_once(parameter):
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for given in (exact, iter([exact])):
        estimates = {name: Recorded(rows(9), parameter) for name in "ab"}
        assert set(compare(estimates, parameter, exact=given, repeats=9).bias_z) == {"a", "b"}


@pytest.mark.parametrize("exact", [(), (torch.ones(3), torch.ones(3)), (torch.ones(1),), (torch.ones(3, 1),)])
def test_an_exact_gradient_that_does_not_fit(parameter, exact):
    with pytest.raises(sf.ShapeError):
        compare({"a": Recorded(rows(9), parameter)}, parameter, exact=exact, repeats=9)


def test_the_table(parameter):
    estimates = {"leave-one-out": Recorded(rows(9), parameter), "none": Recorded(rows(9, 5.0), parameter)}
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    lines = str(compare(estimates, parameter, exact=[exact], repeats=9)).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["estimator", "variance", "SNR"]
    assert lines[1].startswith("leave-one-out")
    assert lines[2].startswith("none")
    assert len({len(line) for line in lines}) == 1
    bare = str(compare({"a": Recorded(rows(9), parameter)}, parameter, repeats=9)).splitlines()
    assert bare[1].split()[-1] == "-"


def test_a_comparison_of_nothing(parameter):
    with pytest.raises(sf.ScorefnError, match="at least one estimate"):
        compare({}, parameter)


def test_estimates_are_taken_in_turn(parameter):
    order = []

    def named(name):
        def estimate():
            order.append(name)
            return parameter.sum()

        return estimate

    compare({"a": named("a"), "b": named("b")}, parameter, repeats=3)
    assert order[-4:] == ["a", "b", "a", "b"]


def test_an_estimate_that_is_not_a_number_is_named_not_ranked():
    parameter = torch.ones(2, requires_grad=True)
    estimates = {"broken": lambda: (parameter * torch.nan).sum(), "fine": lambda: parameter.sum()}
    with pytest.raises(sf.NonFiniteError, match="broken"):
        sf.diagnostics.compare(estimates, parameter, repeats=3)
