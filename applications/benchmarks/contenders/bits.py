"""Expectations over independent bits, and a program of two sites: scorefn's and the loops one would write by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import scorefn as sf
from applications.benchmarks.side_by_side.work import Answer, Work, digest, exactly, on_average

Estimate = Callable[[], Tensor]
"""A surrogate, whose gradient is the estimate."""


def f(x: Tensor) -> Tensor:
    """``[..., D] -> [...]``."""
    value: Tensor = (x - 0.499).square().mean(-1)
    return value


def hand_written(p: Bernoulli, n: int) -> Estimate:
    """Leave-one-out on a distribution object."""

    def estimate() -> Tensor:
        x = p.sample((n,))
        fx = f(x)
        log_prob = p.log_prob(x).sum(-1)
        baseline = (fx.sum() - fx) / (n - 1)
        return ((fx - baseline).detach() * log_prob).mean()

    return estimate


def raw_tensors(logits: Tensor, n: int) -> Estimate:
    """Leave-one-out without a distribution object."""

    def estimate() -> Tensor:
        x = torch.bernoulli(torch.sigmoid(logits.detach()).expand(n, -1))
        fx = f(x)
        log_prob = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
        baseline = (fx.sum() - fx) / (n - 1)
        return ((fx - baseline).detach() * log_prob).mean()

    return estimate


def expectation(num_samples: int, size: int, how: str) -> Work:
    """An expectation over ``size`` bits with its backward pass; ``how``: scorefn, loop or tensors."""
    logits = _logits(size)
    p = Bernoulli(logits=logits)
    estimates: dict[str, Estimate] = {
        "scorefn": lambda: sf.expectation(p, f, num_samples),
        "loop": hand_written(p, num_samples),
        "tensors": raw_tensors(logits, num_samples),
    }
    return _estimation(estimates[how], logits)


def _logits(size: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, size).requires_grad_()


def _estimation(estimate: Estimate, parameter: Tensor, averaged: int = 0) -> Work:
    def run(turn: int) -> None:
        loss = estimate()
        parameter.grad = None
        loss.backward()

    def answer() -> Answer:
        if averaged:
            return on_average(lambda: digest(_gradient(estimate, parameter)), averaged)
        return exactly(digest(_gradient(estimate, parameter)))

    return Work(run, answer)


def _gradient(estimate: Estimate, parameter: Tensor) -> Tensor:
    parameter.grad = None
    estimate().backward()
    assert parameter.grad is not None
    return parameter.grad


# -------------------------------------------------------------------------------------------------- joint estimators


def disarm_by_hand(logits: Tensor) -> Estimate:
    """One antithetic pair: Dong, Mnih & Tucker (2020), eq. 5."""

    def estimate() -> Tensor:
        with torch.no_grad():
            p, u = torch.sigmoid(logits), torch.rand_like(logits)
            one, other = (u < p).to(p), (1 - u < p).to(p)
            sign = torch.where(other > one, -1.0, 1.0) * (one != other)
            weight = 0.5 * (f(one) - f(other)) * sign * torch.sigmoid(logits.abs())
        return (weight * logits).sum()

    return estimate


def disarm(size: int, how: str) -> Work:
    """DisARM over ``size`` bits, one pair; ``how``: scorefn or loop."""
    logits = _logits(size)
    p = torch.distributions.Independent(Bernoulli(logits=logits), 1)
    estimator = sf.DisARM()
    estimate = (lambda: estimator(p, f)) if how == "scorefn" else disarm_by_hand(logits)
    return _estimation(estimate, logits, averaged=400)


def local_by_hand(logits: Tensor) -> Estimate:
    """Every bit summed out in turn, the others drawn: Titsias & Lazaro-Gredilla (2015)."""

    def estimate() -> Tensor:
        with torch.no_grad():
            p, x = torch.sigmoid(logits), torch.bernoulli(torch.sigmoid(logits))
            weight = torch.empty_like(p)
            for i in range(len(p)):
                on, off = x.clone(), x.clone()
                on[i], off[i] = 1.0, 0.0
                weight[i] = f(on) - f(off)
            weight *= p * (1 - p)
        return (weight * logits).sum()

    return estimate


def local_expectation(size: int, how: str) -> Work:
    """Local expectation over ``size`` bits, one draw; ``how``: scorefn or loop."""
    logits = _logits(size)
    p = torch.distributions.Independent(Bernoulli(logits=logits), 1)
    estimator = sf.LocalExpectation()
    estimate = (lambda: estimator(p, f)) if how == "scorefn" else local_by_hand(logits)
    return _estimation(estimate, logits, averaged=50)


# ---------------------------------------------------------------------------------------------------------- programs


def program(num_samples: int, size: int, how: str) -> Work:
    """``z`` bits, ``h`` bits given them, one cost of h and one of z, leave-one-out; ``how``: scorefn or loop."""
    logits = _logits(size)
    weights = torch.linspace(-1.0, 1.0, size * size).reshape(size, size)

    def by_graph() -> Tensor:
        with sf.StochasticGraph(num_samples) as g:
            z = g.sample("z", Bernoulli(logits=logits))
            h = g.sample("h", Bernoulli(logits=(2 * z - 1) @ weights + logits))
            g.cost("size", 0.1 * z.sum(-1))
            g.cost("match", f(h))
        return g.surrogate().mean()

    def by_hand() -> Tensor:
        q = Bernoulli(logits=logits)
        z = q.sample((num_samples,))
        r = Bernoulli(logits=(2 * z - 1) @ weights + logits)
        h = r.sample()
        size_of, match = 0.1 * z.sum(-1), f(h)
        of_z, of_h = q.log_prob(z).sum(-1), r.log_prob(h).sum(-1)
        return (_centred(size_of + match) * of_z + _centred(match) * of_h).mean()

    return _estimation(by_graph if how == "scorefn" else by_hand, logits)


def _centred(value: Tensor) -> Tensor:
    n = len(value)
    centred: Tensor = ((value - value.mean()) * (n / (n - 1))).detach()
    return centred
