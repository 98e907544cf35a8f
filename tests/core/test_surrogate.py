"""The surrogate where an axis has size one, and what it takes from a baseline."""

import pytest
import torch
from torch.distributions import Normal

import scorefn as sf


@pytest.mark.parametrize("lead", [(1,), (3,), (1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(("K", "J"), [(3, 1), (1, 3), (1, 1), (3, 3)])
def test_the_definition_where_an_axis_has_size_one(lead, K, J):
    """An axis of one draw, problem, decision or value is not mistaken for another."""
    log_prob, fx = torch.randn(*lead, K, requires_grad=True), torch.randn(*lead, J, requires_grad=True)
    value = sf.surrogate(sf.Draws(torch.zeros(lead[0]), log_prob, fx))
    torch.testing.assert_close(value, fx.sum(-1))
    score_part, path_part = torch.autograd.grad(value.sum(), (log_prob, fx))
    torch.testing.assert_close(score_part, fx.detach().sum(-1, keepdim=True).expand(*lead, K))
    torch.testing.assert_close(path_part, torch.ones_like(fx))


class Reader:
    """A baseline that answers as it is told, and keeps what it was shown."""

    unbiased = True

    def __init__(self, answer):
        self.answer, self.shown = answer, []

    def __call__(self, signal, draws):
        self.shown.append(signal)
        return self.answer(signal)


def draws(**given):
    return sf.Draws(torch.zeros(4), torch.zeros(4, 1, requires_grad=True), torch.ones(4, 1), **given)


@pytest.mark.parametrize(
    ("answer", "named"),
    [(lambda signal: signal.double(), "float64"), (lambda signal: signal.to("meta"), "on meta")],
    ids=["dtype", "device"],
)
def test_a_baseline_of_another_dtype_or_device_is_refused(answer, named):
    with pytest.raises(sf.ScorefnError, match=f"Reader is .*{named}"):
        sf.surrogate(draws(), baseline=Reader(answer))


def test_a_number_is_no_baseline():
    with pytest.raises(sf.ScorefnError, match=r"Constant\(b\)"):
        sf.surrogate(draws(), baseline=0.5)


def test_a_baseline_is_shown_constants():
    """Also where f is differentiable: what a baseline keeps must not hold the graph."""
    loc = torch.zeros((), requires_grad=True)
    reader, average = Reader(torch.zeros_like), sf.MovingAverage()
    for baseline in (reader, average):
        sf.expectation(Normal(loc, 1.0), lambda x: (x - loc) ** 2, 8, baseline=baseline).backward()
    assert not any(signal.requires_grad for signal in reader.shown)
    assert not average.mean.requires_grad


def test_a_baseline_of_the_batched_signal_is_not_read_inside_vmap():
    def gradient(loc):
        mean = Reader(lambda signal: signal.mean(0, keepdim=True).expand(signal.shape))
        return torch.func.grad(lambda t: sf.expectation(Normal(t, 1.0), torch.cos, 8, baseline=mean))(loc)

    gradients = torch.vmap(gradient, randomness="different")(torch.zeros(3))
    assert gradients.shape == (3,)
    assert gradients.isfinite().all()


def test_auto_is_leave_one_out_from_two_draws_on():
    def gradient(baseline):
        torch.manual_seed(1)
        loc = torch.zeros((), requires_grad=True)
        sf.expectation(Normal(loc, 1.0), lambda x: x + 10, 2, baseline=baseline).backward()
        return loc.grad

    assert torch.equal(gradient("auto"), gradient(sf.LeaveOneOut()))
    assert not torch.equal(gradient("auto"), gradient(None))
