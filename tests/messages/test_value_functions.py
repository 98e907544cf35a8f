"""Value functions that do not fit."""

import re

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from tests.messages.world import World, refuses


def valued(module, features=None, **options):
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return sf.ValueFunction(module, features, optimizer=optimizer, **options)


def ones(draws):
    return torch.ones_like(draws.log_prob).unsqueeze(-1)


class Wrong(nn.Module):
    """A value function of a given shape."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shape = shape

    def forward(self, features):
        return self.weight * torch.ones(self.shape)


@pytest.mark.parametrize("shape", [(), (1, 8), (8,), (8, 2), (3, 8, 1), (8, 1, 1, 1)])
def test_a_value_function_of_the_wrong_shape(shape):
    world = World("MovingAverage")
    world.module = Wrong(*shape)
    world.baseline = valued(world.module, ones)
    wanted = [re.escape(str(shape)), r"\(8, 1\)"]
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.ShapeError, *wanted)


def test_a_value_function_without_features():
    world = World("MovingAverage")
    world.module = nn.Linear(1, 1)
    world.baseline = valued(world.module)
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.ScorefnError, "features", "context", "biased")


@pytest.mark.parametrize("shared", ["weight", "trunk", "embedding of logits"])
def test_a_value_function_that_shares_a_parameter(shared):
    world = World("MovingAverage")
    trunk, value, policy = nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    observation = torch.ones(2)
    world.module = nn.ModuleList([trunk, value, policy])
    if shared == "weight":
        p = Bernoulli(logits=value(torch.ones(4)))
        baseline = valued(value, lambda draws: torch.ones(*draws.log_prob.shape, 4))
    elif shared == "trunk":
        p = Bernoulli(logits=policy(torch.tanh(trunk(observation))))
        baseline = valued(nn.Sequential(trunk, value), lambda draws: torch.ones(*draws.log_prob.shape, 2))
    else:
        p = Independent(Normal(trunk(observation).exp().log(), 1.0), 1)
        baseline = valued(nn.Sequential(trunk, value), lambda draws: torch.ones(*draws.log_prob.shape, 2))
    world.baseline = baseline
    refuses(
        world,
        lambda w: w.expectation(p, lambda x: x.square().sum(-1)),
        sf.ScorefnError,
        "shares a parameter",
        "of its own",
    )


def test_a_value_function_whose_loss_is_not_a_number():
    world = World("MovingAverage")
    world.module = nn.Linear(1, 1)
    world.baseline = valued(world.module, ones)
    world.expectation(world.p, lambda x: x.sum(-1))
    with torch.no_grad():
        world.module.weight.fill_(torch.nan)
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1)), sf.NonFiniteError, "nan", "not stepped")


def test_a_value_function_whose_optimizer_holds_the_measure():
    """Its step would move p, and its zero_grad would drop gradients that are being accumulated."""

    def call(world):
        optimizer = torch.optim.SGD([*world.module.parameters(), world.theta], lr=0.1)
        world.expectation(
            world.p, lambda x: x.sum(-1), baseline=sf.ValueFunction(world.module, ones, optimizer=optimizer)
        )

    refuses(World("MovingAverage"), call, sf.ScorefnError, "optimizer", "own")
