"""What is looped instead, and why."""

import re

import pytest
import torch
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.estimation import pinned
from scorefn.diagnostics.replicas import replicas
from scorefn.diagnostics.statistics import gradient_statistics
from tests.diagnostics.replica_cases import F64, a, b, expectation


def mine(p, f):
    x = p.sample((4,))
    return (f(x) * p.log_prob(x).sum(-1)).mean()


def noisy(x):
    return x.sum(-1) + torch.rand(len(x), dtype=F64)


class Coin(td.Bernoulli):
    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError


class Hiding(td.Distribution):
    arg_constraints = {}

    def __init__(self, logits):
        self.held = [logits]
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Hiding(self.held[0].expand(batch_shape))

    def sample(self, sample_shape=()):
        return td.Bernoulli(logits=self.held[0]).sample(sample_shape)

    def log_prob(self, x):
        return td.Bernoulli(logits=self.held[0]).log_prob(x)


class Closed(Hiding):
    """A tensor in a closure, where nobody looks for it."""

    def __init__(self, logits):
        super().__init__(logits.detach())
        self.read = lambda: logits

    def expand(self, batch_shape, _instance=None):
        return Closed(self.read().expand(batch_shape))

    def log_prob(self, x):
        return td.Bernoulli(logits=self.read()).log_prob(x)


def total(x):
    return x.sum(-1)


LOOPED = {
    "an own function": (td.Bernoulli(logits=a), total, mine, "mine is not among the estimators"),
    "a baseline that learns": (
        td.Bernoulli(logits=a),
        total,
        expectation(baseline=sf.MovingAverage()),
        "MovingAverage learns",
    ),
    "an f that mixes draws": (
        td.Bernoulli(logits=a),
        lambda x: x.sum(-1) - 0.5 * x.sum(-1).mean(0) * x[:, 0],
        expectation(),
        "made alone from the same draws.*looks beyond its own draws",
    ),
    "a random f": (td.Bernoulli(logits=a), noisy, expectation(), "made alone from the same draws"),
    "an f that knows N": (
        td.Bernoulli(logits=a),
        lambda x: x.sum(-1) * torch.arange(4),
        expectation(),
        "the sweep raised RuntimeError",
    ),
    "a random baseline": (
        td.Bernoulli(logits=a),
        lambda x: (x * torch.arange(1, 4)).sum(-1).square(),
        expectation(8, baseline=sf.OptimalConstant()),
        "made alone from the same draws",
    ),
    "no expand": (Coin(logits=a), total, expectation(), "Coin has no expand"),
    "hidden tensors": (Hiding(a), total, expectation(), "Hiding keeps parameters that require grad in its held"),
    "a closure": (Closed(a), total, expectation(), "made alone|does not require grad|log_prob"),
    "transforms with parameters": (td.Gumbel(a, b.exp()), total, expectation(), "Gumbel.* in its transforms"),
    "a sampler of its own": (
        pinned(td.Bernoulli(logits=a), td.Bernoulli(logits=a).sample),
        total,
        expectation(),
        "sample of its own",
    ),
    "a control that draws": (
        td.Bernoulli(logits=a),
        total,
        sf.RELAX(nn.Linear(3, 1)),
        "RELAX is not among the estimators",
    ),
}


@pytest.mark.parametrize("name", LOOPED)
def test_what_is_looped_and_why(name):
    p, f, estimator, reason = LOOPED[name]
    torch.manual_seed(0)
    found = replicas(Estimation(p, f, estimator), (a, b))
    assert isinstance(found, str)

    assert re.search(reason, found), found


def test_what_is_wrong_with_the_estimation_is_said_by_the_loop():
    p = td.Bernoulli(logits=a)
    with pytest.raises(sf.ShapeError, match=r"f returned shape \(4, 1\)"):
        gradient_statistics((p, lambda x: x.sum(-1, keepdim=True), expectation()), a, 50)
    with pytest.raises(sf.NonFiniteError, match="f is nan"):
        gradient_statistics((p, lambda x: x.sum(-1) * torch.nan, expectation()), a, 50)
