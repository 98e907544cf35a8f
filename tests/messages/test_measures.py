"""What is no measure, and options that do not fit."""

import re

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, Uniform

import scorefn as sf
from tests.messages.world import Given, N, World, at, refuses

MEASURES = [
    ("object", lambda w: object(), sf.ScorefnError, ["object", "sample", "log_prob"]),
    ("module", lambda w: nn.Linear(1, 1), sf.ScorefnError, ["Linear", "sample", "log_prob"]),
    ("string", lambda w: "Bernoulli", sf.ScorefnError, ["str", "sample", "log_prob"]),
    ("none", lambda w: None, sf.ScorefnError, ["NoneType", "sample", "log_prob"]),
    ("detached", lambda w: Bernoulli(logits=w.theta.detach()), sf.ScorefnError, ["does not require grad", "no_grad"]),
    (
        "rsample",
        lambda w: Given(q := Normal(w.theta, 1.0), sample=q.rsample),
        sf.ScorefnError,
        ["require grad", "pathwise", r"detach|sample\(\)"],
    ),
    (
        "wrong N",
        lambda w: Given(w.p, sample=lambda shape: w.p.sample((3,))),
        sf.ShapeError,
        [r"N = 8", r"\(3, 3\)"],
    ),
    (
        "no N",
        lambda w: Given(w.p, sample=lambda shape: torch.tensor(0.0)),
        sf.ShapeError,
        [r"N = 8", r"\(\)"],
    ),
    (
        "one leaf without N",
        lambda w: Given(w.p, sample=lambda shape: {"a": torch.zeros(8), "b": torch.zeros(3)}),
        sf.ShapeError,
        [r"N = 8", r"\(3,\)"],
    ),
    (
        "impossible draws",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x) + at([1, 4], -torch.inf, (N, 3))),
        sf.NonFiniteError,
        ["log_prob", "-inf", "2 of 8", r"\[1, 4\]", "support"],
    ),
    (
        "log_prob without draws",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x).sum()),
        sf.ShapeError,
        [r"N = 8|\(8,\)", r"\(\)"],
    ),
    (
        "log_prob of one draw",
        lambda w: Given(w.p, log_prob=lambda x: w.p.log_prob(x).sum()[None]),
        sf.ShapeError,
        [r"N = 8|\(8,\)", r"\(1,\)"],
    ),
    (
        "uniform",
        lambda w: Uniform(w.theta - 1, w.theta + 1),
        sf.SupportError,
        ["Uniform", "boundary", "[Dd]etach", "rsample"],
    ),
]


@pytest.mark.parametrize(("p", "error", "patterns"), [c[1:] for c in MEASURES], ids=[c[0] for c in MEASURES])
def test_measure(world, p, error, patterns):
    measure = p(world)
    refuses(world, lambda w: w.expectation(measure, lambda x: torch.zeros(N)), error, *patterns)


def test_a_detached_measure_is_allowed_under_no_grad(world):
    before = world.bits()
    with torch.no_grad():
        assert world.expectation(Bernoulli(logits=world.theta.detach()), lambda x: x.sum(-1)).ndim == 0
    assert world.bits() == before


@pytest.mark.parametrize("num_samples", [0, -1, 2.0, True, False, None, "8"])
def test_num_samples(world, num_samples):
    refuses(
        world,
        lambda w: w.expectation(w.p, lambda x: x.sum(-1), num_samples),
        sf.ScorefnError,
        "num_samples",
        re.escape(repr(num_samples)),
        "at least 1",
    )


# ------------------------------------------------------------------------------------------------ the options


class OneBlock:
    """A coupling whose draws all share their randomness."""

    unbiased = True

    def sample(self, p, num_samples):
        return p.sample((num_samples,)), torch.zeros(num_samples, dtype=torch.long)


class Shaped:
    """A baseline of any shape."""

    unbiased = True

    def __init__(self, *shape):
        self.shape = shape

    def __call__(self, signal, draws):
        return torch.zeros(self.shape)


OPTIONS = [
    ("leave-one-out at N = 1", {"baseline": sf.LeaveOneOut(), "num_samples": 1}, sf.ScorefnError, ["two", "1"]),
    ("leave-one-out in one block", {"baseline": sf.LeaveOneOut(), "coupling": OneBlock()}, sf.ScorefnError, ["8", "1"]),
    ("unknown baseline", {"baseline": "rloo"}, sf.ScorefnError, ["'rloo'", "auto"]),
    ("reward-to-go", {"credit": sf.RewardToGo()}, sf.ShapeError, ["RewardToGo", "independent problems", "structured"]),
    (
        "influence",
        {"credit": sf.Influence(torch.ones(1, 1, dtype=torch.bool))},
        sf.ShapeError,
        ["Influence", "independent problems"],
    ),
    ("a row of baselines", {"baseline": Shaped(1, 8)}, sf.ShapeError, ["Shaped", r"\(1, 8\)", r"\(8, 1\)"]),
    ("a flat baseline", {"baseline": Shaped(8)}, sf.ShapeError, ["Shaped", r"\(8,\)", r"\(8, 1\)"]),
    ("a scalar baseline", {"baseline": Shaped()}, sf.ShapeError, ["Shaped", r"\(\)", r"\(8, 1\)"]),
    ("a row of constants", {"baseline": sf.Constant(torch.zeros(8))}, sf.ShapeError, [r"\(8,\)", r"\(8, 1\)"]),
    ("too many constants", {"baseline": sf.Constant(torch.zeros(2, 8, 1))}, sf.ShapeError, [r"\(2, 8, 1\)"]),
    (
        "shape spoils fx",
        {"shape": lambda fx: fx / 0.0},
        sf.NonFiniteError,
        ["nan|inf", "of 8"],
    ),
    ("shape changes N", {"shape": lambda fx: fx[:4]}, sf.ShapeError, [r"\(4, 1\)", r"\(8, 1\)"]),
]


@pytest.mark.parametrize(("options", "error", "patterns"), [c[1:] for c in OPTIONS], ids=[c[0] for c in OPTIONS])
def test_options(world, options, error, patterns):
    refuses(world, lambda w: w.expectation(w.p, lambda x: x.sum(-1), **options), error, *patterns)


def test_auto_needs_no_baseline_at_one_block():
    theta = torch.tensor([0.3, -0.2], requires_grad=True)
    for options in [{"num_samples": 1}, {"num_samples": N, "coupling": OneBlock()}]:
        torch.manual_seed(0)
        auto = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), **options)
        torch.manual_seed(0)
        none = sf.expectation(Bernoulli(logits=theta), lambda x: x.sum(-1), baseline=None, **options)
        assert torch.equal(*(torch.autograd.grad(v, theta)[0] for v in (auto, none)))


def test_a_moving_average_keeps_to_its_problems():
    world = World("MovingAverage")  # it has learned one problem
    refuses(world, lambda w: w.expectation(w.p, lambda x: x), sf.ShapeError, r"\(\)", r"\(3,\)", "new one")
