"""Where only one of two arguments requires a gradient; and moments of draws in groups."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.reducers import linear_recurrence
from scorefn.reducers.adaptive import batch_moments

pytestmark = pytest.mark.usefixtures("float64")


def by_steps(x, decay, reverse):
    """The definition, one step after the other."""
    steps = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y, found = torch.zeros(x.shape[1:]), {}
    for t in steps:
        y = found[t] = x[t] + decay[t] * y
    return torch.stack([found[t] for t in range(len(x))])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("which", ["x", "decay"])
def test_either_argument_alone_has_its_gradient(which, reverse):
    x, decay, weight = torch.randn(5, 3), torch.rand(5, 3), torch.randn(5, 3)
    theta = {"x": x, "decay": decay}[which].requires_grad_()
    (found,) = torch.autograd.grad((weight * linear_recurrence(x, decay, reverse=reverse, dim=0)).sum(), theta)
    (wanted,) = torch.autograd.grad((weight * by_steps(x, decay, reverse)).sum(), theta)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_moments_of_groups_are_centred_within_each():
    """Of two groups far apart: the covariance with the mean of the others of the same group taken away."""
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    group = torch.tensor([0, 0, 0, 1, 1])
    fx = x.cumsum(1) ** 2 + 100.0 * group.unsqueeze(1)
    theta = torch.zeros(2, requires_grad=True)
    draws = sf.Draws(x, Bernoulli(logits=theta).log_prob(x), fx, credit=sf.RewardToGo(), group=group)
    signal = draws.credit.influence(fx)
    rest = fx.sum(1, keepdim=True) - signal  # what a decision does not influence
    others = sf.LeaveOneOut()
    centred = [v - others(v, draws) for v in (signal, rest)]
    found, present = batch_moments(signal, draws)
    assert present.all()
    wanted = torch.stack([(v * centred[1]).mean(0) for v in centred])
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    pooled = batch_moments(signal, sf.Draws(x, draws.log_prob, fx, credit=sf.RewardToGo()))[0]
    assert (pooled[1, 1] - found[1, 1]).abs() > 100  # the gap of the groups, which is no variance within one
