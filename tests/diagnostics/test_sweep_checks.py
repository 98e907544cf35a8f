"""The sweeps that are used are checked, whatever their size: f that looks beyond its draws is looped, and says why."""

from functools import partial

import pytest
import torch

import scorefn as sf
from scorefn.diagnostics import Estimation, exact_gradient, gradient_statistics
from scorefn.diagnostics.replicas import Replicas, replicas

F64 = torch.float64


def bits():
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=F64, requires_grad=True)
    return logits, torch.distributions.Bernoulli(logits=logits)


def square(x):
    return (x.sum(-1) - 1.2).square()


def shared_maximum(x):
    return square(x) / square(x).max()


def larger_calls(x):
    return square(x) + (5.0 if len(x) > 100 else 0.0) * x[:, 0]


def this_size(x):
    return square(x) + (5.0 if len(x) == 2 * 23 else 0.0) * x[:, 0]


ESTIMATOR = partial(sf.expectation, num_samples=2)


@pytest.mark.parametrize("f", [shared_maximum, larger_calls])
def test_an_f_that_looks_beyond_its_draws_is_never_swept(f):
    logits, p = bits()
    for seed in range(60):
        torch.manual_seed(seed)
        found = replicas(Estimation(p, f, ESTIMATOR), (logits,))
        if isinstance(found, Replicas):
            found = found.checked_estimates(200)
        assert isinstance(found, str)
        assert "made alone from the same draws" in found


def test_what_was_swept_wrongly_is_discarded():
    """The loop's moments, and its reason: two draws a call are fewer than 100."""
    logits, p = bits()
    torch.manual_seed(0)
    found = gradient_statistics((p, larger_calls, ESTIMATOR), logits, 400)
    assert "made alone from the same draws" in found.looped
    (exact,) = exact_gradient(p, square, logits)
    assert ((found.mean[0] - exact).abs() < 5 * found.standard_error[0]).all()


def test_the_last_sweep_is_checked_too(monkeypatch):
    """100 estimates are made in sweeps of 77 and 23 here, and the last is the only one with this number of rows."""
    monkeypatch.setattr("scorefn.diagnostics.replicas._ELEMENTS", 77 * 6)
    logits, p = bits()
    found = replicas(Estimation(p, this_size, ESTIMATOR), (logits,))
    assert isinstance(found, Replicas)
    assert "made alone from the same draws" in found.checked_estimates(100)


def test_an_f_that_refuses_many_rows_is_looped():
    def few(x):
        if len(x) > 100:
            raise MemoryError("too many rows")
        return square(x)

    logits, p = bits()
    assert "too many rows" in gradient_statistics((p, few, ESTIMATOR), logits, 100).looped


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_f_that_treats_each_draw_by_itself_is_swept(dtype):
    """No false alarm from rounding, nor where most gradients are 0, nor where f returns integers."""
    logits = torch.tensor([0.3, -4.0, 1.0], dtype=dtype, requires_grad=True)
    p = torch.distributions.Bernoulli(logits=logits)
    weights = torch.randn(3, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for f in (square, lambda x: (x @ weights).tanh().sum(-1), lambda x: x[:, 1], lambda x: x.sum(-1).long()):
        for seed in range(10):
            torch.manual_seed(seed)
            assert gradient_statistics((p, f, ESTIMATOR), logits, 500).looped is None
