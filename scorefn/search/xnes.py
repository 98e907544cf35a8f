"""Exponential natural evolution strategy, as published."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorefn.search.normal_draws import local_coordinates, pulled_back
from scorefn.search.points import Numbers, as_sigma, as_start
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, check_overflow, checked_popsize, checked_rate
from scorefn.shaping import utilities_by_rank


class XNES(Strategy):
    """Minimise by natural-gradient steps of a normal distribution with any covariance, ``Normal(m, A A^T)``.

    With ``x_k = m + A z_k``, utilities u of N ranks as in ``SNES``, and D coordinates::

        G  = sum_k u_k (z_k z_k^T - I),    g = tr(G)/D
        m <- m + eta_mean A sum_k u_k z_k
        A <- A exp((eta_sigma g I + eta_shape (G - g I))/2)
        N  = 4 + floor(3 ln D),   eta_mean = 1,   eta_sigma = eta_shape = (9 + 3 ln D)/(5 D sqrt D)

    The reference for what ``CSANES`` improves on: it needs 4 to 10 times as many evaluations on a sphere. Memory is
    O(D^2), time O(D^3).

    Source: Glasmachers, Schaul, Sun, Wierstra & Schmidhuber (2010), "Exponential natural evolution strategies", GECCO,
    algorithm 1 and table 1.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N; the default rates belong to the default N.
        eta_mean: learning rate of the mean.
        eta_sigma: learning rate of the step size; None: as above.
        eta_shape: learning rate of the shape; None: as above.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, a rate or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import XNES
        >>> strategy = XNES([3.0, -2.0], sigma0=1.0, seed=0, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, (x[:, 0] + x[:, 1]) ** 2 + 100 * (x[:, 0] - x[:, 1]) ** 2)
        >>> strategy.stop
        {'ftarget': 1e-08}
    """

    method = "xnes"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        eta_mean: float = 1.0,
        eta_sigma: float | None = None,
        eta_shape: float | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        dimension = len(start)
        known = 4 + int(3 * math.log(dimension))
        default = (9 + 3 * math.log(dimension)) / (5 * dimension * math.sqrt(dimension))
        super().__init__(
            {"mean": start, "factor": torch.diag(sigma)},
            settings={
                "eta_mean": checked_rate("eta_mean", eta_mean),
                "eta_sigma": checked_rate("eta_sigma", default if eta_sigma is None else eta_sigma),
                "eta_shape": checked_rate("eta_shape", default if eta_shape is None else eta_shape),
            },
            shape=(checked_popsize(known if popsize is None else popsize, 2, "4 + floor(3 ln D)"), dimension),
            sigma0=sigma,
            seed=seed,
            limits=Limits.of_options(limits, "XNES", ("popsize", "eta_mean", "eta_sigma", "eta_shape", "seed")),
        )

    @property
    def mean(self) -> Tensor:
        """``[D]``, m."""
        return self._state["mean"].clone()  # type: ignore[no-any-return]

    @property
    def factor(self) -> Tensor:
        """``[D, D]``, A; the covariance is ``A A^T``."""
        return self._state["factor"].clone()  # type: ignore[no-any-return]

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of the coordinates."""
        lengths: Tensor = torch.linalg.vector_norm(self._state["factor"], dim=1)
        return lengths

    def sampled(self) -> Tensor:
        """``[N, D]``, independent points."""
        z = torch.randn(self._shape, dtype=torch.float64, device=self._sigma0.device, generator=self._generator)
        points: Tensor = z @ self._state["factor"].T + self._state["mean"]
        return points

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One natural-gradient step."""
        u = ranking.hand_out(utilities_by_rank(len(ranking), points.device))
        mean, factor = self._state["mean"], self._state["factor"]
        z = pulled_back(local_coordinates(points, mean, factor))
        identity = torch.eye(self._shape[1], dtype=torch.float64, device=points.device)
        gradient = (z * u.unsqueeze(1)).T @ z - u.sum() * identity
        size = gradient.trace() / self._shape[1] * identity
        rates = self._settings
        exponent = rates["eta_sigma"] * size + rates["eta_shape"] * (gradient - size)
        mean = mean + rates["eta_mean"] * factor @ (u @ z)
        factor = factor @ torch.linalg.matrix_exp(exponent / 2)
        check_overflow("the mean or the covariance", float(z.abs().max()), mean, factor)
        return {"mean": mean, "factor": factor}
