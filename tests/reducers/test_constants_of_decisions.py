"""BlockConstants: which constant belongs to which decision, also where later draws have another number of them."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf

pytestmark = pytest.mark.usefixtures("float64")


def draws(theta, decisions, values):
    x = (torch.rand(6, decisions) < 0.5).double()
    slope = torch.tensor([1.0, -2.0, 0.5])[:decisions]
    log_prob = Bernoulli(logits=theta * slope).log_prob(x)
    credit = sf.RewardToGo() if values == decisions else sf.Total()
    return sf.Draws(x, log_prob, torch.randn(6, values) + 2, credit=credit)


def gradient(draws, theta):
    return torch.autograd.grad(sf.surrogate(draws, baseline=None).mean(), theta, retain_graph=True)[0]


def wanted(draws, c, theta):
    """``mean_n sum_k (signal - c_k) grad log p``."""
    signal = draws.credit.influence(draws.fx) - c
    return torch.autograd.grad((signal * draws.log_prob).sum(-1).mean(), theta, retain_graph=True)[0]


def test_one_constant_serves_all_decisions_where_all_have_the_whole_value():
    theta = torch.tensor(0.4, requires_grad=True)
    cv = sf.BlockConstants([theta])
    cv.update(draws(theta, 2, 1))
    c = cv.coefficient
    assert c.shape == (1, 1)
    assert c.item() != 0
    later = draws(theta, 2, 1)
    torch.testing.assert_close(gradient(cv(later), theta), wanted(later, c[0], theta), rtol=0, atol=1e-14)


@pytest.mark.parametrize("decisions", [1, 2, 3])
def test_each_decision_has_its_own_and_new_ones_have_none(decisions):
    theta = torch.tensor(0.4, requires_grad=True)
    cv = sf.BlockConstants([theta])
    cv.update(draws(theta, 2, 2))
    c = cv.coefficient
    assert c.shape == (1, 2)
    assert c.all()
    later = draws(theta, decisions, decisions)
    known = torch.cat([c[0], torch.zeros(1)])[:decisions]
    torch.testing.assert_close(gradient(cv(later), theta), wanted(later, known, theta), rtol=0, atol=1e-14)
