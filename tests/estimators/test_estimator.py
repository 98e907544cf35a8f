"""What every joint estimator refuses of f, and where."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf

ESTIMATORS = [
    sf.DisARM(),
    sf.ARMS(3),
    sf.DoubleControlVariate(2),
    sf.REBAR(),
    sf.Enumerate(),
    sf.LocalExpectation(),
    sf.SumAndSample(2),
    sf.UnorderedSet(2),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x.sum(-1) * 1j, "one real number per draw, but it returned torch.complex64"),
        (lambda x: x.sum(-1).half(), "f returned torch.float16 .* but the distribution is torch.float32"),
        (lambda x: x.sum(-1).double(), "f returned torch.float64 .* but the distribution is torch.float32"),
        (lambda x: x.sum(-1) / 0, "f is (inf|nan) at draw"),
        (lambda x: x.sum(-1, keepdim=True).expand(-1, 3), "f returned shape"),
    ],
)
def test_values_that_are_refused(estimator, f, message):
    logits = torch.zeros(2, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match=message):
        estimator(Bernoulli(logits=logits), f)
    assert logits.grad is None


def test_the_double_control_variate_inside_a_transform():
    def value(logits):
        return sf.DoubleControlVariate(3)(Bernoulli(logits=logits, validate_args=False), lambda x: x.prod(-1))

    with pytest.raises(sf.ScorefnError, match="which a torch.func transform cannot trace"):
        torch.func.grad(value)(torch.zeros(3))
