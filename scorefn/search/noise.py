"""Learning rates that follow the signal-to-noise ratio of the updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.search.points import is_number
from scorefn.search.strategy import State


@dataclass(frozen=True)
class SignalToNoise:
    """Learning rates of mean and shape that sink where updates are mostly noise, and rise again where they agree.

    An update d of the parameters, in coordinates in which the Fisher information is the identity, is followed by
    moving averages; its rate eta is then changed, for the mean and for the covariance apart::

        E <- (1 - beta) E + beta d,    V <- (1 - beta) V + beta |d|^2
        snr = (|E|^2 - beta/(2 - beta) V) / (V - |E|^2)
        eta <- min(1, eta exp(min(gamma eta, beta) clip(snr/(alpha eta) - 1, -1, 1)))

    In the local coordinates of ``Normal(m, A A^T)`` d is s for the step ``A s`` of the mean, and ``M/sqrt 2`` for the
    change ``A exp(M) A^T`` of the covariance. Because the best step size is inversely proportional to the rate of the
    mean, sigma is multiplied by the old over the new one. With it the default popsize solves noisy and multimodal
    problems that otherwise need a large one, at the price of more evaluations on simple ones. A search that is careful
    looks like one that stagnates: set ``tolstagnation=0``, and a budget.

    Source: Nomura, Akimoto & Ono (2023), "CMA-ES with learning rate adaptation: can CMA-ES with default population size
    solve multimodal and noisy problems?", GECCO, section 4, with the constants of its section 4.3.

    Args:
        alpha: the ratio ``snr/eta`` that is aimed at.
        beta_mean: rate of the averages of the mean.
        beta_shape: rate of the averages of the covariance.
        gamma: damping of the change of eta.

    Raises:
        ScorefnError: a constant that is not positive, or a beta of 1 or more.

    Example:
        >>> import torch
        >>> from scorefn.search import CSANES, SignalToNoise
        >>> noise = torch.Generator().manual_seed(0)
        >>> strategy = CSANES([3.0, -2.0], 1.0, learning_rate=SignalToNoise(), seed=0)
        >>> for _ in range(60):
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(1) + torch.randn(len(x), generator=noise))
        >>> bool(strategy.result.mean.norm() < 1)  # noise of size 1
        True
    """

    alpha: float = 1.4
    beta_mean: float = 0.1
    beta_shape: float = 0.03
    gamma: float = 0.1

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the constants."""
        for name in ("alpha", "beta_mean", "beta_shape", "gamma"):
            value, least_above = getattr(self, name), 1.0 if name.startswith("beta") else math.inf
            if not is_number(value) or not 0 < value < least_above:
                raise ScorefnError(
                    f"{name} must be positive{' and below 1' if least_above == 1 else ''}, but it is {value!r}: the "
                    "averages would not move, or remember nothing."
                )

    def start(self, dimension: int, device: torch.device) -> State:
        """What is remembered before the first generation: rates of 1 and averages of 0."""
        return {
            "mean_rate": 1.0,
            "mean_drift": torch.zeros(dimension, dtype=torch.float64, device=device),
            "mean_power": 0.0,
            "shape_rate": 1.0,
            "shape_drift": torch.zeros((dimension, dimension), dtype=torch.float64, device=device),
            "shape_power": 0.0,
        }

    def after(self, state: State, step: Tensor, exponent: Tensor) -> State:
        """What is remembered after a generation; its rates are those to be used for it.

        Args:
            state: what ``start`` or ``after`` returned; further entries are left out.
            step: ``[D]``, s of the mean.
            exponent: ``[D, D]``, symmetric, M of the covariance, its trace (the step size) included.
        """
        mean = _followed(state, "mean", step, self.beta_mean, self.alpha, self.gamma)
        return {**mean, **_followed(state, "shape", exponent / math.sqrt(2), self.beta_shape, self.alpha, self.gamma)}


def _followed(state: State, name: str, change: Tensor, beta: float, alpha: float, gamma: float) -> State:
    drift = (1 - beta) * state[f"{name}_drift"] + beta * change
    signal, square = torch.stack([drift.square().sum(), change.square().sum()]).tolist()
    power = (1 - beta) * state[f"{name}_power"] + beta * square
    noise = power - signal
    ratio = (signal - beta / (2 - beta) * power) / noise if noise > 0 else 0.0
    rate = state[f"{name}_rate"]
    rate *= math.exp(min(gamma * rate, beta) * min(1.0, max(-1.0, ratio / (alpha * rate) - 1)))
    return {f"{name}_rate": min(1.0, rate), f"{name}_drift": drift, f"{name}_power": power}
