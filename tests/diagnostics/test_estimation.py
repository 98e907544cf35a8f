"""What an estimation is, and what it refuses; the parameters that can be measured."""

from functools import partial

import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.estimation import as_estimate, checked_parameters, pinned


@pytest.fixture
def p():
    return torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True))


def test_it_is_an_estimate_summed_over_the_problems(p):
    estimation = Estimation(p, lambda x: x, sf.Enumerate(batch_ndim=1))
    assert estimation().item() == pytest.approx(1.5)
    estimation().backward()
    assert as_estimate((p, lambda x: x.sum(-1), sf.Enumerate()))().item() == pytest.approx(1.5)


def test_given_draws(p):
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    estimation = Estimation(p, lambda x: x.sum(-1), partial(sf.expectation, num_samples=2))
    assert estimation.at(lambda shape: x)().item() == pytest.approx(2.5)
    assert "sample" not in vars(p)
    assert torch.equal(pinned(p, lambda shape: x).log_prob(x), p.log_prob(x))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((3, abs, abs), "int is not a measure"),
        ((None, 3, abs), "f must be callable.*3"),
        ((None, abs, sf.DisARM), "estimator must be callable"),
    ],
)
def test_parts_that_cannot_play_their_role(p, parts, message):
    first, *rest = parts
    with pytest.raises(sf.ScorefnError, match=message):
        Estimation(p if first is None else first, *rest)


@pytest.mark.parametrize("subject", [3, "abs", (1, 2), int])
def test_what_is_no_estimate(subject):
    with pytest.raises(sf.ScorefnError, match="callable without arguments"):
        as_estimate(subject)


def test_parameters():
    q, other = torch.zeros(2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    assert checked_parameters(q) == (q,)
    assert len(checked_parameters(nn.Linear(2, 1).parameters())) == 2
    for params, message in (
        ([], "no parameters to differentiate"),
        ([q, 3.0], r"params\[1\] is a float.*module.parameters"),
        ([q, torch.zeros(4)], r"params\[1\], of shape \(4,\), does not require grad"),
        ([q, other, q], r"params\[2\] is the same tensor as params\[0\], of shape \(2,\)"),
        ({"a": q}, r"params\[0\] is a str"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            checked_parameters(params)
