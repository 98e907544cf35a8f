"""Exponential natural evolution with a cumulative step size: the default strategy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scorefn.core.checks import no_part
from scorefn.search.noise import SignalToNoise
from scorefn.search.normal_draws import local_coordinates, orthogonal_directions, pulled_back
from scorefn.search.path_rates import PathRates, default_popsize
from scorefn.search.points import Numbers, as_sigma, as_start
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, check_overflow, checked_pairs

_MEAN_RATE = 1.15


class CSANES(Strategy):
    """Minimise by natural-gradient steps of a normal distribution with any covariance, its step size led by a path.

    In the field's terms this is xNES with cumulative step-size adaptation (CSA), a rank-one path and active (negative)
    weights: a natural evolution strategy with what the CMA-ES has, applied by the exponential map. The name stands for
    CSA-NES; it is no method of the literature under that name. The distribution is ``Normal(m, sigma^2 B B^T)`` with
    ``det B = 1``; a generation is ``x_k = m + sigma B z_k``, N/2 orthogonal directions z each used both ways. With k
    the rank of a value (1 the lowest), ties sharing the mean of their weights, and ``r_k = ln((N + 1)/2) - ln k``::

        w_k = max(r_k, 0) / sum of these          n_k = max(-r_k, 0) / sum of these
        v_k = w_k - n_k min(10, D / |z_k|^2)
        s   = sum_k w_k z_k                       m <- m + 1.15 sigma B s
        p   <- (1 - c_s) p + kappa sqrt(c_s (2 - c_s)) s
        u   = |p| / (chi_D l) - 1                 log sigma <- log sigma + min(1, (c_s/d_s) (u |u| - E u |u|) / g)
        q   <- (1 - c_c) q + h kappa sqrt(c_c (2 - c_c)) s
        S   = c_mu sum_k v_k z_k z_k^T + c_1 (q q^T - I),  less its trace
        B   <- B exp(S/2),  q <- exp(-S/2) q

    s and the first sum of S are the natural gradient of ``E u(f)`` in the local coordinates of the distribution,
    for the mean and for the shape. p and q are paths in these coordinates; kappa gives them unit variance when the
    order of the values is random, and the expectation that is subtracted is that of such a path, so that log sigma
    then does not drift. u enters by its signed square: a path that is clearly short (a valley being descended)
    shrinks sigma as fast as it would with u itself, one that is hardly short (many optima, noise) more slowly; as u
    scatters by ``1/sqrt(2D)`` g falls with D, so that the response keeps up with it. h is
    0 while p is longer than ``|p|^2 < (2 + 4/(D + 1)) D l^2`` allows, with ``l^2 = 1 - (1 - c_s)^(2t)`` the growth
    of a path in its first t generations. The exponential is of second order, by squaring, and S is gathered and
    applied every ``floor(0.1/(c_1 + c_mu))`` generations.

    With ``mu = 1/sum w_k^2`` and chi_D the mean length of a standard normal vector::

        c_s = (mu + 2)/(D + mu + 5)                  d_s  = 1 + c_s + 2 max(0, sqrt((mu - 1)/(D + 1)) - 1)
        c_c = (4 + mu/D)/(D + 4 + 2 mu/D)            c_mu = mu/(mu + 1.5 D^1.5)
        c_1 = 4/((D + 1.3)^2 + mu)                   kappa^-2 = N/(N - 1) sum (w_k - 1/N)^2
        g   = min(0.44, 1.92/sqrt(D))

    Sources: Glasmachers, Schaul, Sun, Wierstra & Schmidhuber (2010), "Exponential natural evolution strategies",
    for the update of B; Hansen & Ostermeier (2001), "Completely derandomized self-adaptation in evolution
    strategies", for the paths; Jastrebski & Arnold (2006), "Improving evolution strategies through active
    covariance matrix adaptation", for the negative weights, and Hansen (2016), "The CMA evolution strategy: a
    tutorial", for bounding them; Hansen (2011), "Injecting external solutions into CMA-ES", for the length to which
    points that were never asked are pulled back.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``.
        learning_rate: ``SignalToNoise()`` multiplies the step of the mean, and the changes of log sigma and of S, by
            rates that sink under noise; None: rates of 1.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, learning_rate or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import CSANES
        >>> strategy = CSANES([3.0, -2.0], sigma0=1.0, seed=0, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2)
        >>> strategy.stop
        {'ftarget': 1e-08}
    """

    method = "csanes"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        learning_rate: SignalToNoise | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        dimension = len(start)
        size = checked_pairs(default_popsize(dimension) if popsize is None else popsize)
        if learning_rate is not None and not isinstance(learning_rate, SignalToNoise):
            raise no_part("learning_rate", learning_rate, "use SignalToNoise(), or None for rates of 1.")
        log_sigma = float(sigma.log().mean())
        super().__init__(
            {
                "mean": start,
                "log_sigma": log_sigma,
                "factor": torch.diag(sigma / math.exp(log_sigma)),
                "sigma_path": torch.zeros_like(start),
                "shape_path": torch.zeros_like(start),
                "gathered": torch.zeros((dimension, dimension), dtype=torch.float64, device=start.device),
                "updates": 0,
                **({} if learning_rate is None else learning_rate.start(dimension, start.device)),
            },
            settings={},
            shape=(size, dimension),
            sigma0=sigma,
            seed=seed,
            limits=Limits.of_options(limits, "CSANES", ("popsize", "learning_rate", "seed")),
        )
        self._rates = PathRates(size, dimension, start.device)
        self._learning_rate = learning_rate
        self._asked: tuple[State, Tensor, Tensor] | None = None  # the state they were drawn from, points, directions

    @property
    def mean(self) -> Tensor:
        """``[D]``, m."""
        return self._state["mean"].clone()  # type: ignore[no-any-return]

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of the coordinates."""
        lengths: Tensor = torch.linalg.vector_norm(self._state["factor"], dim=1)
        return lengths * math.exp(self._state["log_sigma"])

    @property
    def factor(self) -> Tensor:
        """``[D, D]``, ``sigma B``; the covariance is its product with its transpose."""
        return self._state["factor"] * math.exp(self._state["log_sigma"])  # type: ignore[no-any-return]

    def check_popsize(self, popsize: int) -> None:
        """Raise ScorefnError where points in pairs cannot be so many."""
        checked_pairs(popsize)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see ``Strategy``."""
        super().load_state_dict(state)
        self._rates = PathRates(self.popsize, self._shape[1], self._sigma0.device)

    def sampled(self) -> Tensor:
        """``[N, D]``: mirrored pairs in orthogonal directions."""
        z = orthogonal_directions(self.popsize // 2, self._shape[1], self._generator)
        step = (z @ self._state["factor"].T).mul_(math.exp(self._state["log_sigma"]))
        points = torch.cat([self._state["mean"] + step, self._state["mean"] - step])
        self._asked = self._state, points.clone(), z
        return points

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One step of the mean, the two paths, the step size and, every few generations, the shape."""
        state, rates, dimension = self._state, self._rates, self._shape[1]
        factor = state["factor"]
        z, paired = self._directions(points)
        square = z.square().sum(1)
        weights = ranking.hand_out(rates.weights)
        if paired:  # a pair shares a direction
            one, other = weights.view(2, len(z), 2)
            w, (positive, negative) = one[:, 0] - other[:, 0], (one + other).unbind(1)
        else:
            w, (positive, negative) = weights[:, 0], weights.unbind(1)
        v = torch.addcdiv(positive, negative, square.clamp(min=dimension / 10), value=dimension)
        s = w @ z
        step = factor @ s * (_MEAN_RATE * math.exp(state["log_sigma"]))
        p, q, growth = rates.walked(state, s)
        scatter = ((z * (rates.c_mu * v).unsqueeze(1)).T @ z).addr_(q, q, alpha=rates.c_1)
        memory: State = {}
        if self._learning_rate is not None:
            identity = torch.eye(dimension, dtype=z.dtype, device=z.device)
            exponent = scatter + (2 * growth - scatter.trace() / dimension) * identity
            memory = self._learning_rate.after(state, s, exponent)
            step, scatter = memory["mean_rate"] * step, memory["shape_rate"] * scatter
            growth = memory["shape_rate"] * growth + math.log(state["mean_rate"] / memory["mean_rate"])
        gathered = scatter.add_(state["gathered"])
        if (state["updates"] + 1) % rates.period == 0:
            change = gathered.div_(2)
            change.diagonal().sub_(change.trace() / dimension)
            factor = torch.addmm(factor, factor, _exponential_less_one(change))
            shift = change @ q
            q = q - shift + change @ shift / 2
            gathered = torch.zeros_like(change)
        mean, log_sigma = state["mean"] + step, state["log_sigma"] + growth
        check_overflow("the mean or sigma", square.max().sqrt(), mean, factor, log_sigma)
        return {
            "mean": mean,
            "log_sigma": log_sigma,
            "factor": factor,
            "sigma_path": p,
            "shape_path": q,
            "gathered": gathered,
            "updates": state["updates"] + 1,
            **memory,
        }

    def _directions(self, points: Tensor) -> tuple[Tensor, bool]:
        """The directions ``[N/2, D]`` of points that were asked; otherwise bounded coordinates ``[N, D]``."""
        if self._asked is not None and self._asked[0] is self._state and torch.equal(points, self._asked[1]):
            return self._asked[2], True
        return pulled_back(local_coordinates(points, self._state["mean"], self.factor)), False


def _exponential_less_one(change: Tensor) -> Tensor:
    """``exp(M) - I`` of a symmetric M ``[D, D]``: M is halved to norm 1/2, ``M + M^2/2``, squared back."""
    norm = float(torch.linalg.matrix_norm(change))
    halvings = max(0, math.ceil(math.log2(norm / 0.5))) if norm > 0 else 0
    small = change / 2**halvings
    grow = torch.addmm(small, small, small, alpha=0.5)
    for _ in range(halvings):
        grow = torch.addmm(grow, grow, grow, beta=2.0)
    return grow
