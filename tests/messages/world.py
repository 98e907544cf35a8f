"""A measure, a baseline and their optimisers in training; a refusal leaves all of it bit for bit as it was.

Bad input is met by a typed error that says fact, reason and repair. Each call goes through `expectation` with a
baseline that keeps a state; around it, every parameter, every `.grad`, the baseline and the optimiser are compared.
"""

import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli

import scorefn as sf

N = 8


def fingerprint(thing):
    """The bits of everything that a call could change."""
    if isinstance(thing, torch.Tensor):
        grad = None if thing.grad_fn is not None else thing.grad
        return (thing.dtype, tuple(thing.shape), thing.detach().numpy().tobytes(), fingerprint(grad))
    if isinstance(thing, nn.Module):
        return (thing.training, fingerprint(dict(thing.named_parameters())), fingerprint(dict(thing.named_buffers())))
    if isinstance(thing, torch.optim.Optimizer):
        return fingerprint(thing.state_dict())
    if isinstance(thing, dict):
        return tuple((key, fingerprint(value)) for key, value in thing.items())
    if isinstance(thing, list | tuple):
        return tuple(fingerprint(value) for value in thing)
    if hasattr(thing, "update") and hasattr(thing, "unbiased"):
        return fingerprint(vars(thing))
    return thing


@dataclass
class World:
    """A measure, a baseline and their optimisers, in the middle of training."""

    baseline: object
    theta: torch.Tensor = field(default_factory=lambda: torch.tensor([0.3, -0.2, 0.1], requires_grad=True))
    module: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))

    def __post_init__(self):
        self.adam = torch.optim.Adam([self.theta], lr=0.1)
        if self.baseline == "ValueFunction":
            optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
            self.baseline = sf.ValueFunction(
                self.module, lambda draws: torch.ones_like(draws.log_prob).unsqueeze(-1), optimizer=optimizer
            )
        else:
            self.baseline = sf.MovingAverage(0.9)
        for _ in range(3):  # every state is filled, and the last gradients stand
            self.adam.zero_grad()
            self.expectation(self.p, lambda x: x.sum(-1)).backward()
            self.adam.step()

    @property
    def p(self):
        return Bernoulli(logits=self.theta)

    def expectation(self, p, f, num_samples=N, **options):
        return sf.expectation(p, f, num_samples, **{"baseline": self.baseline} | options)

    def bits(self):
        flags = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.distributions.Distribution._validate_args)
        return (fingerprint([self.theta, self.adam, self.baseline, self.module]), flags)


def refuses(world, call, error, *patterns):
    """`call(world)` raises `error` whose text holds every pattern, and nothing has changed."""
    before = world.bits()
    with pytest.raises(error) as caught:
        call(world)
    assert world.bits() == before
    assert type(caught.value) is error
    says(str(caught.value), *patterns)
    return caught.value


def says(text, *patterns):
    for pattern in patterns:
        assert re.search(pattern, text), f"{pattern!r} is not in: {text}"
    assert len(text) > 45, f"too short for a fact, a reason and a repair: {text}"
    assert text.rstrip().endswith("."), text


# ------------------------------------------------------------------------------------------------ what f returns


class Given:
    """A user's measure: p, with one of its two methods replaced."""

    def __init__(self, p, sample=None, log_prob=None):
        self.sample = sample or p.sample
        self.log_prob = log_prob or p.log_prob


def at(places, value, shape=(N,)):
    fx = torch.zeros(shape)
    fx[places] = value
    return fx
