"""A second derivative is right, or refused: it is never silently another number."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf

FIRST_ONLY = {
    "disarm": lambda: sf.DisARM(),
    "arms": lambda: sf.ARMS(3),
    "double control variate": lambda: sf.DoubleControlVariate(3),
    "rebar": lambda: sf.REBAR(),
    "relax": lambda: sf.RELAX(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))),
    "local expectation": lambda: sf.LocalExpectation(),
    "sum and sample": lambda: sf.SumAndSample(2),
    "unordered set": lambda: sf.UnorderedSet(2),
}


def value(estimator, angle):
    return estimator(Bernoulli(logits=angle.sin() * 2), lambda x: (x - 0.45).square().sum(-1).square())


@pytest.mark.parametrize("make", FIRST_ONLY.values(), ids=FIRST_ONLY)
def test_a_second_derivative_is_refused(make):
    angle = torch.tensor([0.3, -0.2], requires_grad=True)
    estimate = value(make(), angle)
    with pytest.raises(sf.ScorefnError, match="a first derivative only"):
        torch.autograd.grad(estimate, angle, create_graph=True)
    assert torch.autograd.grad(value(make(), angle), angle)[0].isfinite().all()


@pytest.mark.parametrize("make", FIRST_ONLY.values(), ids=FIRST_ONLY)
def test_inside_a_transform_the_first_derivative_is_served(make):
    if make in (FIRST_ONLY["double control variate"], FIRST_ONLY["rebar"], FIRST_ONLY["relax"]):
        return  # they differentiate themselves
    p = Bernoulli(logits=torch.tensor([0.6, -0.4], dtype=torch.float64))
    estimator = make()
    x = estimator.sample(p)
    fx = (x - 0.45).square().sum(-1)

    def at(logits):
        return estimator.surrogate(Bernoulli(logits=logits, validate_args=False), x, fx)

    logits = p.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(at(logits), logits)
    assert torch.equal(torch.func.grad(at)(p.logits), expected)


def test_enumeration_has_every_derivative():
    angle = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda angle: value(sf.Enumerate(), angle), angle)
