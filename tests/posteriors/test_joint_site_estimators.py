"""The estimators of the library at sites of ScoreFunctionELBO."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import scorefn as sf
from scorefn.estimators import antithetic
from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors.enumeration import (
    Problem,
    distance,
    exact_bound,
    exact_gradient,
)
from tests.posteriors.joint_site_problems import (
    EXACT,
    all_orders,
    chosen,
    error,
    global_then_plate,
    masked,
    named,
    plate_then_global,
    two,
)
from tests.posteriors.problems import coin, number, observe, parameters


@pytest.mark.parametrize("make", [plate_then_global, global_then_plate, two, masked])
def test_disarm_cell_by_cell(make, monkeypatch):
    """Coins of 1/4, 1/2 and 3/4: the uniforms count by the quarter they lie in."""

    def quarters(shape, device):
        even = torch.full((4,), 0.25, dtype=torch.float64)
        return number([(chosen(even) + 0.5) / 4 for _ in range(math.prod(shape))]).reshape(shape)

    monkeypatch.setattr(antithetic, "uniform", quarters)
    problem = make(sf.DisARM())
    with torch.no_grad():
        for parameter in problem.params[:2]:
            probability = (number([1, 2, 3])[torch.arange(parameter.numel()) % 3] / 4).reshape(parameter.shape)
            parameter.copy_(probability.logit())
        if make is two:
            problem.params[1].zero_()  # the second coin has the logit right - left
    assert error(problem, ScoreFunctionELBO(2, max_plate_nesting=problem.nesting)) < EXACT


def test_arms_order_by_order(monkeypatch):
    """A coin of 1/4: one of four draws is 1, any of them; then a coin that depends on it, with leave-one-out."""
    monkeypatch.setattr(antithetic, "_ranks", lambda shape, device: all_orders((shape[-1], 1), device).reshape(shape))
    logits, top, weight = number(0.25).logit().requires_grad_(), *parameters((), (), seed=12)

    def model():
        z = coin("z", number(0.4))
        observe("x", weight * z + coin("s", z - weight) * z, 0.7)

    def guide():
        coin("s", top + coin("z", logits, infer={"estimator": sf.ARMS(4)}))

    assert (
        error(Problem("ARMS", [logits, top, weight], model, guide), ScoreFunctionELBO(4, max_plate_nesting=0)) < EXACT
    )


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    "estimator", [sf.Enumerate(), sf.LocalExpectation(), sf.SumAndSample(1, 1), sf.UnorderedSet(2)], ids=named
)
def test_estimators_that_see_the_whole_support_have_no_variance(estimator, validation):
    """One step, by either way of asking for it."""
    slopes, weight = parameters(3, (), seed=13)

    def model():
        with pyro.plate("data", 3):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z * weight, 1.0), obs=number([0.3, -1.0, 0.2]))

    def guide(**infer):
        with pyro.plate("data", 3):
            coin("z", slopes, **infer)

    problem = Problem("coins", [slopes, weight], model, guide, nesting=1)
    by_name, plain = ScoreFunctionELBO(2, estimators={"z": estimator}), ScoreFunctionELBO(2)
    with pyro.validation_enabled(validation):
        one = by_name.differentiable_loss(model, guide)
        other = plain.differentiable_loss(model, lambda: guide(infer={"estimator": estimator}))
    for loss in (one, other):
        assert distance(list(torch.autograd.grad(-loss, problem.params)), exact_gradient(problem)) < EXACT
        assert abs(loss + exact_bound(problem)) < EXACT


@pytest.mark.parametrize(
    ("estimator", "num_particles"),
    [(sf.DisARM(2), 4), (sf.ARMS(3), 3), (sf.LocalExpectation(2), 8), (sf.UnorderedSet(3), 3)],
    ids=repr,
)
def test_every_estimator_is_served_where_three_coins_are_one_draw(estimator, num_particles):
    table, weight = parameters((2, 3), (), seed=12)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=weight).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=table).to_event(1), infer={"estimator": estimator})

    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1).differentiable_loss(model, guide)
    gradient, _ = torch.autograd.grad(loss, [table, weight])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
