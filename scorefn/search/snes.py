"""Separable natural evolution strategy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from scorefn.core import Draws
from scorefn.search.points import Numbers, as_points, as_sigma, as_start, as_values
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import LocalSums, Rebuildable
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, check_overflow, checked_popsize, checked_rate
from scorefn.shaping import nes_utilities, utilities_by_rank


class SNES(Strategy, Rebuildable):
    """Minimise by natural-gradient steps of a normal distribution with independent coordinates.

    With ``x_k = m + sigma z_k``, k the rank of its value (1 the lowest) among N, and D coordinates::

        u_k    = max(0, ln(N/2 + 1) - ln k) / sum_j max(0, ln(N/2 + 1) - ln j) - 1/N
        m     <- m + eta_mean sigma sum_k u_k z_k
        sigma <- sigma exp(eta_sigma/2 sum_k u_k (z_k^2 - 1))
        N      = 4 + floor(3 ln D),   eta_mean = 1,   eta_sigma = (3 + ln D) / (5 sqrt D)

    Only ranks enter: f may be noisy, discontinuous or known up to a monotone transform. Equal values share the mean of
    their utilities. NaN and infinite values are failures and rank last, tied; where all are tied nothing moves. Memory
    and time are O(N D); rotated ill-conditioned problems are what this method cannot learn.

    The update is ``Fisher^-1`` times the score-function gradient: ``surrogate(strategy.scored(x, f)).mean()`` has the
    gradient that ``tell`` follows, in ``location`` and ``log_scale``. These two keep float64 whatever f returns.

    Sources: Schaul, Glasmachers & Schmidhuber (2011), "High dimensions and heavy tails for natural evolution
    strategies", GECCO; Wierstra et al. (2014), "Natural evolution strategies", JMLR 15, sections 2 and 3.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N; the default rates belong to the default N.
        eta_mean: learning rate of the mean.
        eta_sigma: learning rate of log sigma; None: as above.
        seed: of the strategy's own generator; None: drawn from torch's global generator (so that ``torch.manual_seed``
            reproduces the run), a ``torch.Generator``: drawn from that one.
        limits: when to stop, in pycma's words, here with their defaults. ``ftarget=None``: a value this low;
            ``maxfevals=None``: no more evaluations; ``maxiter=None``: generations, ``100 + 150 (D + 3)^2 / sqrt(N)``;
            ``tolx=1e-11``: all standard deviations below it; ``tolfun=1e-11``: the values of the last generation, and
            the best ones of the last ``10 + 30 D / N``, span less; ``tolfunhist=1e-12``: those best ones alone span
            less; ``tolflatfitness=1``: more generations in a row with one value everywhere; ``tolfacupx=1e3``: a
            standard deviation grew by more; ``tolstagnation=None``: no lower best and median values over this many
            generations, ``120 + 30 D / N`` or a fifth of all, 0 for never; ``tolconditioncov=1e14``: a full covariance
            is worse conditioned; ``tolfailed=10``: so many generations in a row without a finite value are
            an error. Thresholds that are fixed: ``noeffectcoord``, ``noeffectaxis``, ``overflow``.

    Raises:
        ScorefnError: sigma0, popsize, a rate or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import SNES
        >>> strategy = SNES([3.0, -2.0], sigma0=1.0, seed=0, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(-1))
        >>> strategy.stop
        {'ftarget': 1e-08}
    """

    method = "snes"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        eta_mean: float = 1.0,
        eta_sigma: float | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        dimension = len(start)
        known = 4 + int(3 * math.log(dimension))
        default = (3 + math.log(dimension)) / (5 * math.sqrt(dimension))
        size = checked_popsize(known if popsize is None else popsize, 2, "4 + floor(3 ln D)")
        settings = {
            "eta_mean": checked_rate("eta_mean", eta_mean),
            "eta_sigma": checked_rate("eta_sigma", default if eta_sigma is None else eta_sigma),
        }
        super().__init__(
            {"location": start.requires_grad_(), "log_scale": sigma.log().requires_grad_()},
            settings=settings,
            shape=(size, dimension),
            sigma0=sigma,
            seed=seed,
            limits=Limits.of_options(limits, "SNES", ("popsize", "eta_mean", "eta_sigma", "seed")),
        )

    @property
    def location(self) -> Tensor:
        """``[D]``, m; requires grad, and is the search's own: read it only."""
        return self._state["location"]  # type: ignore[no-any-return]

    @property
    def log_scale(self) -> Tensor:
        """``[D]``, log sigma; requires grad, and is the search's own: read it only."""
        return self._state["log_scale"]  # type: ignore[no-any-return]

    @property
    def mean(self) -> Tensor:
        """``[D]``, m."""
        return self.location.detach().clone()

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations."""
        return self.log_scale.detach().exp()

    @property
    def distribution(self) -> Independent[Normal]:
        """The search distribution: batch shape ``[]``, event shape ``[D]``, a function of location and log_scale."""
        return Independent(Normal(self.location, self.log_scale.exp(), validate_args=False), 1, validate_args=False)

    def sampled(self) -> Tensor:
        """``[N, D]``, independent points."""
        z = torch.randn(self._shape, dtype=torch.float64, device=self._sigma0.device, generator=self._generator)
        return z.mul_(self.sigma).add_(self.location.detach())

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One natural-gradient step."""
        utilities = ranking.hand_out(utilities_by_rank(len(ranking), points.device))
        z = (points - self.location.detach()).div_(self.sigma)  # in place: [N, D] may be large
        first, farthest = utilities @ z, max(abs(float(end)) for end in z.aminmax())
        return self._stepped(first, utilities @ z.square_().sub_(1), farthest)

    def learnt_by(self, sums: LocalSums, ranking: Ranking) -> State:
        """One natural-gradient step."""
        utilities = ranking.hand_out(utilities_by_rank(len(ranking), self._sigma0.device))
        first, second = sums.first(utilities), sums.second(utilities) - utilities.sum()
        return self._stepped(first, second, float(sums.square_lengths().max().sqrt()))

    def _stepped(self, first: Tensor, second: Tensor, farthest: float) -> State:
        """The step along ``sum_k u_k z_k`` and ``sum_k u_k (z_k^2 - 1)``, each ``[D]``."""
        location = self.location.detach() + self._settings["eta_mean"] * self.sigma * first
        log_scale = self.log_scale.detach() + 0.5 * self._settings["eta_sigma"] * second
        check_overflow("the mean or sigma", farthest, location + log_scale.exp())
        check_overflow("1/sigma", farthest, (-log_scale).exp())
        return {"location": location.requires_grad_(), "log_scale": log_scale.requires_grad_()}

    def scored(self, x: Numbers, f: Numbers) -> Draws:
        """The generation as draws of ``distribution``, for ``surrogate`` and the diagnostics; no state is changed.

        ``fx`` are N times the utilities u, ``[N, 1]``, so that the mean over draws is the sum above; larger is better:
        they are *ascended* while f is minimised.

        Args:
            x: ``[N, D]``.
            f: ``[N]``.
        """
        points = as_points(x, self._shape, self._sigma0.device)
        values = as_values(f, self.popsize, self._sigma0.device)
        log_prob = self.distribution.log_prob(points)
        return Draws(points, log_prob.unsqueeze(-1), len(values) * nes_utilities(-values).unsqueeze(-1))
