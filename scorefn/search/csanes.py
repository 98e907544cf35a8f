"""Exponential natural evolution with a cumulative step size: the default strategy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.normal_draws import local_coordinates, orthogonal_directions
from scorefn.search.points import Numbers, as_sigma, as_start
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, check_overflow, checked_popsize


class CSANES(Strategy):
    """Minimise by natural-gradient steps of a normal distribution with any covariance, its step size led by a path.

    The distribution is ``Normal(m, sigma^2 B B^T)`` with ``det B = 1``; a generation is ``x_k = m + sigma B z_k``, N/2
    orthogonal directions z each used both ways. With k the rank of a value (1 the lowest), ties sharing the mean of
    their weights, and ``r_k = ln((N + 1)/2) - ln k``::

        w_k = max(r_k, 0) / sum of these          a_k = w_k - max(-r_k, 0) / sum of these, so that they sum to 0
        v_k = a_k  if a_k >= 0,  a_k D / |z_k|^2  otherwise
        s   = sum_k w_k z_k                       m <- m + sigma B s
        p   <- (1 - c_s) p + kappa sqrt(c_s (2 - c_s)) s
        u   = |p| / chi_D - 1                     log sigma <- log sigma + min(1, 2 (c_s/d_s) u |u|)
        q   <- (1 - c_c) q + h kappa sqrt(c_c (2 - c_c)) s
        S   = c_mu sum_k v_k z_k z_k^T + c_1 (q q^T - I),  less its trace
        B   <- B exp(S/2),  q <- exp(-S/2) q

    s and the first sum of S are the natural gradient of ``E u(f)`` in the local coordinates of the distribution, for
    the mean and for the shape. p and q are paths in these coordinates; kappa gives them unit variance when the order of
    the values is random, so that log sigma then does not drift. u enters as ``2 u |u|``: a path that is clearly short
    (a valley being descended) shrinks sigma as fast as ``u`` would at u = -1/2, one that is hardly short (many optima,
    noise) more slowly. h is 0 while p is longer than ``|p|^2 < (2 + 4/(D + 1)) D`` allows. The exponential is of second
    order, by squaring, and S is gathered and applied every ``floor(0.1/(c_1 + c_mu))`` generations.

    With ``mu = 1/sum w_k^2`` and chi_D the mean length of a standard normal vector::

        c_s = (mu + 2)/(D + mu + 5)                  d_s  = 1 + c_s + 2 max(0, sqrt((mu - 1)/(D + 1)) - 1)
        c_c = (4 + mu/D)/(D + 4 + 2 mu/D)            c_mu = mu/(mu + 1.5 D^1.5)
        c_1 = 4/((D + 1.3)^2 + mu)                   kappa^-2 = N/(N - 1) sum (w_k - 1/N)^2

    Sources: Glasmachers, Schaul, Sun, Wierstra & Schmidhuber (2010), "Exponential natural evolution strategies", for
    the update of B; Hansen & Ostermeier (2001), "Completely derandomized self-adaptation in evolution strategies", for
    the paths; Jastrebski & Arnold (2006), "Improving evolution strategies through active covariance matrix adaptation",
    for the negative weights, and Hansen (2016), "The CMA evolution strategy: a tutorial", for bounding them.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N, even; None: ``4 + floor(4.5 ln D)``, rounded up to an even number.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
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
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        dimension = len(start)
        size = checked_popsize(default_popsize(dimension) if popsize is None else popsize, 4, "the default")
        if size % 2:
            raise ScorefnError(
                f"popsize must be even, but it is {size}: points come in mirrored pairs. Use {size - 1} or {size + 1}."
            )
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
            },
            settings={},
            shape=(size, dimension),
            sigma0=sigma,
            seed=seed,
            limits=Limits.of_options(limits, "CSANES", ("popsize", "seed")),
        )
        self._rates = _Rates(size, dimension, start.device)
        self._asked: tuple[Tensor, Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        """``[D]``, m."""
        return self._state["mean"]  # type: ignore[no-any-return]

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of the coordinates."""
        lengths: Tensor = torch.linalg.vector_norm(self._state["factor"], dim=1)
        return lengths * math.exp(self._state["log_sigma"])

    def sampled(self) -> Tensor:
        """``[N, D]``: mirrored pairs in orthogonal directions."""
        z = orthogonal_directions(self.popsize // 2, self._shape[1], self._generator)
        step = (z @ self._state["factor"].T).mul_(math.exp(self._state["log_sigma"]))
        points = torch.cat([self.mean + step, self.mean - step])
        self._asked = points.clone(), z
        return points

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One step of the mean, the two paths, the step size and, every few generations, the shape."""
        state, rates = self._state, self._rates
        dimension = self._shape[1]
        log_sigma, factor = state["log_sigma"], state["factor"]
        half, whole = self._local(points)
        z = half if whole is None else whole
        both = ranking.hand_out(rates.weights)
        w, a = both[:, 0], both[:, 1]
        square = z.square().sum(1)
        v = torch.where(a < 0, a * dimension / (square if whole is not None else square.repeat(2)), a)
        if whole is None:  # the pairs share a direction
            n = len(z)
            w, v = w[:n] - w[n:], v[:n] + v[n:]
        s = w @ z
        mean = state["mean"] + math.exp(log_sigma) * (factor @ s)
        p = (1 - rates.c_s) * state["sigma_path"] + rates.kappa * math.sqrt(rates.c_s * (2 - rates.c_s)) * s
        square_length = float(p @ p)
        updates = state["updates"] + 1
        u = math.sqrt(square_length) / rates.chi - 1
        log_sigma += min(1.0, 2 * rates.c_s / rates.d_s * u * abs(u))
        grown = square_length / (dimension * (1 - (1 - rates.c_s) ** (2 * updates)))
        q = (1 - rates.c_c) * state["shape_path"]
        if grown < 2 + 4 / (dimension + 1):
            q = q + rates.kappa * math.sqrt(rates.c_c * (2 - rates.c_c)) * s
        gathered = torch.addmm(state["gathered"], (z * (rates.c_mu * v).unsqueeze(1)).T, z)
        gathered.addr_(q, q, alpha=rates.c_1)
        if updates % rates.period == 0:
            change = (
                gathered - torch.eye(dimension, dtype=z.dtype, device=z.device).mul_(gathered.trace() / dimension)
            ) / 2
            grow = _exponential_less_one(change)
            factor = torch.addmm(factor, factor, grow)
            q = q - change @ q + change @ (change @ q) / 2
            gathered = torch.zeros_like(gathered)
        check_overflow("the mean or sigma", float(square.max().sqrt()), mean, factor, log_sigma)
        return {
            "mean": mean,
            "log_sigma": log_sigma,
            "factor": factor,
            "sigma_path": p,
            "shape_path": q,
            "gathered": gathered,
            "updates": updates,
        }

    def _local(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """The directions ``[N/2, D]`` of points that were asked; otherwise the local coordinates ``[N, D]`` of all."""
        if self._asked is not None and torch.equal(points, self._asked[0]):
            return self._asked[1], None
        z = local_coordinates(points, self.mean, math.exp(self._state["log_sigma"]) * self._state["factor"])
        return z, z


class _Rates:
    """Weights and learning rates of N points in D dimensions; see ``CSANES``."""

    def __init__(self, num: int, dimension: int, device: torch.device) -> None:
        k = torch.arange(1, num + 1, dtype=torch.float64)
        r = math.log((num + 1) / 2) - k.log()
        positive, negative = r.clamp(min=0), (-r).clamp(min=0)
        w = positive / positive.sum()
        self.weights = torch.stack([w, w - negative / negative.sum()], 1).to(device)
        mu = 1 / float(w.square().sum())
        self.kappa = (num / (num - 1) * float((w - 1 / num).square().sum())) ** -0.5
        self.c_s = (mu + 2) / (dimension + mu + 5)
        self.d_s = 1 + self.c_s + 2 * max(0.0, math.sqrt((mu - 1) / (dimension + 1)) - 1)
        self.c_c = (4 + mu / dimension) / (dimension + 4 + 2 * mu / dimension)
        self.c_1 = 4 / ((dimension + 1.3) ** 2 + mu)
        self.c_mu = mu / (mu + 1.5 * dimension**1.5)
        self.chi = math.sqrt(2) * math.exp(math.lgamma((dimension + 1) / 2) - math.lgamma(dimension / 2))
        self.period = max(1, int(0.1 / (self.c_1 + self.c_mu)))


def default_popsize(dimension: int) -> int:
    """``4 + floor(4.5 ln D)``, rounded up to an even number."""
    size = 4 + int(4.5 * math.log(dimension))
    return size + size % 2


def _exponential_less_one(change: Tensor) -> Tensor:
    """``exp(M) - I`` of a symmetric M ``[D, D]``: M is halved to norm 1/2, ``M + M^2/2``, squared back."""
    norm = float(torch.linalg.matrix_norm(change))
    halvings = max(0, math.ceil(math.log2(norm / 0.5))) if norm > 0 else 0
    small = change / 2**halvings
    grow = torch.addmm(small, small, small, alpha=0.5)
    for _ in range(halvings):
        grow = torch.addmm(grow, grow, grow, beta=2.0)
    return grow
