"""Separable natural evolution with a cumulative step size: the diagonal sibling of CSANES."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scorefn.search.mirrored import DiagonalStrategy
from scorefn.search.path_rates import PathRates
from scorefn.search.points import Numbers, as_sigma, as_start
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import LocalSums
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, check_overflow


class SeparableCSANES(DiagonalStrategy):
    """Minimise by natural-gradient steps of a normal distribution with independent coordinates, led by two paths.

    In the field's terms this is SNES with what the sep-CMA-ES has: cumulative step-size adaptation, a rank-one path and
    active weights. The distribution is ``Normal(m, sigma^2 diag(d)^2)`` with ``det diag(d) = 1``; a generation is
    ``m +- sigma d z_k`` for N/2 directions z. Weights, paths p and q, kappa and the rates c_s, d_s and c_c are those
    of ``CSANES``; with squares taken coordinate by coordinate::

        s     = sum_k w_k z_k,    m <- m + sigma d s
        p, q and log sigma  as in CSANES
        S     = c_mu sum_k v_k z_k^2 + c_1 (q^2 - 1),  less its mean
        d     <- d exp(S/2),    q <- exp(-S/2) q
        c_mu  = mu/(mu + 3 sqrt D),    c_1 = 4 (D + 2)/(3 ((D + 1.3)^2 + mu))

    The diagonal has D numbers to learn, not D (D + 1)/2, hence the larger rates. Time and memory are O(N D); rotated
    ill-conditioned problems are what this method cannot learn.

    Sources: those of ``CSANES``; Ros & Hansen (2008), "A simple modification in CMA-ES achieving linear time and space
    complexity", PPSN, section 3, for the factor (D + 2)/3 of c_1; Schaul, Glasmachers & Schmidhuber (2011), "High
    dimensions and heavy tails for natural evolution strategies", GECCO, for the exponential update of a diagonal.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``.
        dtype: of the points, torch.float64 or torch.float32; the state is kept in float64.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, dtype or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import SeparableCSANES
        >>> strategy = SeparableCSANES([3.0, -2.0], sigma0=1.0, seed=0, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x[:, 0] ** 2 + 1e6 * x[:, 1] ** 2)
        >>> strategy.stop
        {'ftarget': 1e-08}
    """

    method = "separable"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        log_scale = sigma.log()
        log_sigma = float(log_scale.mean())
        super().__init__(
            {
                "mean": start,
                "log_sigma": log_sigma,
                "log_shape": log_scale - log_sigma,
                "sigma_path": torch.zeros_like(start),
                "shape_path": torch.zeros_like(start),
                "updates": 0,
            },
            settings={},
            sigma0=sigma,
            popsize=popsize,
            dtype=dtype,
            seed=seed,
            limits=Limits.of_options(limits, "SeparableCSANES", ("popsize", "dtype", "seed")),
        )
        self._rates = _SeparableRates(self.popsize, len(start), start.device)

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations."""
        scale: Tensor = (self._state["log_shape"] + self._state["log_sigma"]).exp()
        return scale

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see ``Strategy``."""
        super().load_state_dict(state)
        self._rates = _SeparableRates(self.popsize, self._shape[1], self._sigma0.device)

    def learnt_by(self, sums: LocalSums, ranking: Ranking) -> State:
        """One step of the mean, the two paths, the step size and the shape."""
        state, rates, dimension = self._state, self._rates, self._shape[1]
        w, negative = ranking.hand_out(rates.weights).unbind(1)
        square = sums.square_lengths()
        s = sums.first(w)
        mean = state["mean"] + self.sigma * s
        p, q, growth = rates.walked(state, s)
        log_sigma = state["log_sigma"] + growth
        second = sums.second(torch.addcdiv(w, negative, square, value=dimension))
        change = rates.c_mu * second + rates.c_1 * (q.square() - 1)
        change = (change - change.mean()) / 2
        log_shape = state["log_shape"] + change
        check_overflow("the mean or sigma", float(square.max().sqrt()), mean, (log_shape + log_sigma).exp())
        return {
            "mean": mean,
            "log_sigma": log_sigma,
            "log_shape": log_shape,
            "sigma_path": p,
            "shape_path": q * (-change).exp(),
            "updates": state["updates"] + 1,
        }


class _SeparableRates(PathRates):
    """See ``SeparableCSANES``."""

    def __init__(self, num: int, dimension: int, device: torch.device) -> None:
        super().__init__(num, dimension, device)
        self.c_1 *= (dimension + 2) / 3
        self.c_mu = self.mu / (self.mu + 3 * math.sqrt(dimension))
