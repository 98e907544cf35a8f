"""What cannot be measured is refused in the user's words: fact, reason and repair."""

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.diagnostics import compare, gradient_statistics
from scorefn.diagnostics.allocation import cost_split, variance_split
from scorefn.diagnostics.nested import nested_variances


@pytest.fixture
def parameter():
    return torch.zeros(3, dtype=torch.float64, requires_grad=True)


def noisy(parameter):
    return lambda: (parameter * torch.randn(3, dtype=torch.float64)).sum()


def test_estimates_without_names(parameter):
    with pytest.raises(sf.ScorefnError, match=r"by name, but they are a list: pass \{name: estimate\}"):
        compare([noisy(parameter)], parameter)


@pytest.mark.parametrize("confidence", ["x", None, True, 1.0, float("nan")])
def test_a_confidence_that_is_none(parameter, confidence):
    with pytest.raises(sf.ScorefnError, match="confidence must lie between 0 and 1, such as .95"):
        compare({"a": noisy(parameter)}, parameter, repeats=9, confidence=confidence)


@pytest.mark.parametrize("price", [None, "3", 0, 0.0, -1.0, float("nan"), float("inf"), torch.ones(2), np.ones(2), {}])
def test_a_cost_that_is_no_positive_number(parameter, price):
    with pytest.raises(sf.ScorefnError, match=r'The cost of "a" is .*finite number above 0.*function given as cost'):
        compare({"a": noisy(parameter)}, parameter, repeats=9, cost=lambda statistics: price)


@pytest.mark.parametrize("price", [1, 2.5, np.float32(3.0), torch.tensor(2.0)])
def test_a_cost_may_be_any_positive_number(parameter, price):
    found = compare({"a": noisy(parameter)}, parameter, repeats=9, cost=lambda statistics: price)
    assert found.prices["a"] == pytest.approx(found.statistics["a"].total_variance * float(price), rel=1e-6)


@pytest.mark.parametrize("batches", [3, (batch for batch in range(3)), "ab", {"a": 1}])
def test_batches_that_are_no_sequence(parameter, batches):
    with pytest.raises(sf.ScorefnError, match=r"batches must be a sequence.*pass list\(batches\)"):
        gradient_statistics(lambda batch: noisy(parameter)(), parameter, 9, batches=batches)


def test_an_estimate_that_is_complex(parameter):
    def estimate():
        return (parameter * 1j).sum()

    with pytest.raises(sf.ScorefnError, match=r"must be a real number, but it is complex \(torch.complex128\)"):
        gradient_statistics(estimate, parameter, 9)
    with pytest.raises(sf.ScorefnError, match='"rotating" must be a real number'):
        compare({"fine": noisy(parameter), "rotating": estimate}, parameter, repeats=9)


@pytest.mark.parametrize("exact", [np.zeros(3), [np.zeros(3)], [0.0, 0.0, 0.0], 3.0])
def test_an_exact_gradient_that_is_no_tensor(parameter, exact):
    with pytest.raises(sf.ScorefnError, match=r"exact\[0\] is a .*tensor of real numbers.*torch.as_tensor"):
        compare({"a": noisy(parameter)}, parameter, exact=exact, repeats=9)


@pytest.mark.parametrize("seconds", [3, [1.0, 2.0], "x"])
def test_seconds_without_numbers_of_particles(seconds):
    with pytest.raises(sf.ScorefnError, match="seconds must map numbers of particles to seconds per step"):
        cost_split(seconds)
    with pytest.raises(sf.ScorefnError, match="Seconds per step must be positive"):
        cost_split({1: 1.0, 2: np.ones(2)})


@pytest.mark.parametrize("gradients", ["x", 3, np.ones((3, 2, 2)), torch.ones(3, 2, 2, dtype=torch.complex64), [1.0]])
def test_gradients_that_are_no_tensor(gradients):
    with pytest.raises(sf.ScorefnError, match=r"tensor of real numbers, \[R, M, P\], but it is a .*torch.as_tensor"):
        variance_split(gradients, 2)
    with pytest.raises(sf.ScorefnError, match=r"tensor of real numbers, \[n_1, ..., n_L, P\], but it is a "):
        nested_variances(gradients)


def test_one_site_has_the_plain_variance():
    gradients = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
    assert nested_variances(gradients) == pytest.approx((4.0 + 3.0,))
    for shape in [(3,), (1, 2), (3, 1, 2)]:
        with pytest.raises(sf.ShapeError, match="every n at least 2"):
            nested_variances(torch.zeros(shape))
