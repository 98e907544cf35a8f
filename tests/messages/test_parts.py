"""Parts that are none, and the tree of errors."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf


@pytest.mark.parametrize("error", [sf.ShapeError, sf.SupportError, sf.NonFiniteError])
def test_every_error_is_a_scorefn_error_and_a_value_error(error):
    assert issubclass(error, sf.ScorefnError)
    assert issubclass(sf.ScorefnError, ValueError)


PARTS = {
    "a coupling by name": ({"coupling": "sobol"}, ["coupling='sobol'", "Sobol()"]),
    "the class of a coupling": ({"coupling": sf.Sobol}, ["coupling=Sobol", "Sobol() with parentheses"]),
    "the class of a baseline": ({"baseline": sf.LeaveOneOut}, ["baseline=LeaveOneOut", "LeaveOneOut() with"]),
    "the class of a moving baseline": ({"baseline": sf.MovingAverage}, ["MovingAverage() with parentheses"]),
    "a number as control variate": ({"control_variate": 3}, ["control_variate=3", "LinearControlVariate"]),
    "the class of a control variate": (
        {"control_variate": sf.LinearControlVariate}, ["a control variate is an object", "LinearControlVariate()"],
    ),
    "the class of a shape": ({"shape": sf.CenteredRank}, ["shape=CenteredRank", "CenteredRank() with parentheses"]),
    "a shape by name": ({"shape": "ranks"}, ["shape='ranks'", "CenteredRank()"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "patterns"), PARTS.values(), ids=PARTS)
def test_parts_that_are_none(options, patterns):
    p = Bernoulli(logits=torch.zeros(2, requires_grad=True))
    with pytest.raises(sf.ScorefnError) as caught:
        sf.expectation(p, lambda x: x, 8, **options)
    for pattern in patterns:
        assert pattern in str(caught.value), caught.value


@pytest.mark.parametrize("credit", [sf.Total, 0.9])
def test_a_credit_that_is_none(credit):
    p = Bernoulli(logits=torch.zeros(2, requires_grad=True))
    with pytest.raises(sf.ScorefnError, match=r"credit=(Total|0\.9).*Total\(\)"):
        sf.surrogate(sf.draw(p, lambda x: x, 8), credit=credit)


@pytest.mark.parametrize("decay", ["x", None, True, torch.ones(2)])
def test_a_decay_that_is_no_number(decay):
    weights = torch.zeros((), requires_grad=True)
    for make in (sf.MovingAverage, sf.AdaptiveRaoBlackwell, lambda decay: sf.BlockConstants([weights], decay)):
        with pytest.raises(sf.ScorefnError, match=r"decay.*a number in \[0, 1\)"):
            make(decay)
