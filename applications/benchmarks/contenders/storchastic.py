"""storchastic: sample with a method, add the cost, go backward, as its documentation does."""

from __future__ import annotations

from typing import Any

import numpy as np
import storch
import torch
from storch.method import ScoreFunction
from torch.distributions import Bernoulli, Normal, OneHotCategorical

from applications.benchmarks.contenders.pairs import pairs
from applications.benchmarks.side_by_side.work import Work, digest, exactly


def bits(size: int, num_samples: int) -> Work:
    """An expectation over ``size`` bits with its backward pass."""
    logits = torch.linspace(-1.0, 1.0, size).requires_grad_()
    p = Bernoulli(logits=logits)
    method = ScoreFunction("x", n_samples=num_samples, baseline_factory="batch_average")

    def one() -> torch.Tensor:
        centred = method(p) - 0.499
        storch.add_cost((centred * centred).mean(-1), "f")
        logits.grad = None
        storch.backward()
        assert logits.grad is not None
        return logits.grad

    return Work(lambda turn: _done(one()), lambda: exactly(digest(one())))


def _done(result: Any) -> None:
    """What a call returns is of no use to the clock."""


def belief_net(num_particles: int, data: str) -> Work:
    """A step on the belief net of ``contenders.posteriors``, leave-one-out where there is more than one particle."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(data).items()}
    parameters = [arrays[name].clone().requires_grad_() for name in ("encoder", "decoder", "prior")]
    encoder, decoder, prior = parameters
    method = _method(num_particles)

    def gradient(x: torch.Tensor) -> np.ndarray:
        storch.reset()
        for parameter in parameters:
            parameter.grad = None
        images = storch.denote_independent(x, 0, "data")
        z = method(q := Bernoulli(logits=images @ encoder))
        log_q = q.log_prob(z).sum(-1)
        log_p = Bernoulli(logits=prior).log_prob(z).sum(-1) + Bernoulli(logits=z @ decoder).log_prob(images).sum(-1)
        storch.add_cost(log_q.detach() - log_p, "negative bound")
        storch.backward()
        assert encoder.grad is not None
        return encoder.grad.double().flatten().numpy() * len(x)  # storchastic differentiates the mean of the batch

    return pairs(arrays["images"], gradient)


def mixture(num_particles: int, data: str) -> Work:
    """A step on the mixture of ``contenders.posteriors``, whose assignments are one-hot here."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(data).items()}
    logits, means = (arrays[name].clone().requires_grad_() for name in ("logits", "means"))
    weights, method = arrays["weights"].log(), _method(num_particles)

    def gradient(x: torch.Tensor) -> np.ndarray:
        storch.reset()
        logits.grad = means.grad = None
        points = storch.denote_independent(x, 0, "data")
        z = method(q := OneHotCategorical(logits=storch.denote_independent(logits, 0, "data")))
        log_q = q.log_prob(z)
        log_p = z @ weights + Normal(z @ means, 1.0).log_prob(points)
        storch.add_cost(log_q.detach() - log_p, "negative bound")
        storch.backward()
        assert logits.grad is not None
        return logits.grad.double().flatten().numpy() * len(x)  # storchastic differentiates the mean of the data

    return pairs(arrays["points"], gradient, batch=None)


def _method(num_particles: int) -> ScoreFunction:
    baseline = "batch_average" if num_particles > 1 else "none"
    return ScoreFunction("z", n_samples=num_particles, baseline_factory=baseline)
