"""Buffers that are filled, and refusals that change nothing."""

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf


def filled(measure, f, size, **options):
    cv = sf.NaturalControlVariate(measure, **options)
    p = measure() if callable(measure) else measure
    cv.update(sf.draw(p, f, size))
    return cv


# ------------------------------------------------------------------------------------------------ refusals


def fingerprint(cv):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(cv).items()}


def refused(cv, draws, match, kind=sf.ScorefnError, use=None):
    before, parameter = fingerprint(cv), draws.log_prob.detach().clone()
    with pytest.raises(kind, match=match):
        (cv if use is None else use)(draws)
    after = fingerprint(cv)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value is after[name]
    assert torch.equal(parameter, draws.log_prob.detach())


def coin(N=5, batch=()):
    p = Bernoulli(logits=torch.zeros(batch, requires_grad=True))
    return p, sf.draw(p, lambda x: x + 1, N)
