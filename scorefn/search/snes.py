"""Separable natural evolution strategy."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from scorefn.core import Draws, NonFiniteError, ScorefnError
from scorefn.search.points import Numbers, as_points, as_sigma, as_start, as_values
from scorefn.search.progress import Progress
from scorefn.search.stopping import Limits, history_length
from scorefn.search.strategy import StrategyResult
from scorefn.shaping import nes_utilities


class SNES:
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
            standard deviation grew by more; ``tolfailed=10``: so many generations in a row without a finite value are
            an error.

    Raises:
        ScorefnError: sigma0, popsize, a rate or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> strategy = SNES([3.0, -2.0], sigma0=1.0, seed=0, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(-1))
        >>> strategy.stop
        {'ftarget': 1e-08}
    """

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
        dimension = len(start)
        self._sigma0 = as_sigma(sigma0, start)
        self._popsize = _checked_popsize(4 + int(3 * math.log(dimension)) if popsize is None else popsize)
        self._eta_mean = _checked_rate("eta_mean", eta_mean)
        default = (3 + math.log(dimension)) / (5 * math.sqrt(dimension))
        self._eta_sigma = _checked_rate("eta_sigma", default if eta_sigma is None else eta_sigma)
        self._limits = Limits.of_options(limits, "SNES", ("popsize", "eta_mean", "eta_sigma", "seed"))
        if self._limits.maxfevals is not None and self._limits.maxfevals < self._popsize:
            raise ScorefnError(
                f"maxfevals={self._limits.maxfevals} does not pay for one generation of {self._popsize} points: raise "
                "it, or lower popsize."
            )
        self._generator = _own_generator(seed, start.device)
        self._progress = Progress()
        self._stop: dict[str, float] = {}
        self.location = start.requires_grad_()
        self.log_scale = self._sigma0.log().requires_grad_()

    @property
    def popsize(self) -> int:
        """N, how many points a generation has."""
        return self._popsize

    @property
    def distribution(self) -> Independent[Normal]:
        """The search distribution: batch shape ``[]``, event shape ``[D]``, a function of location and log_scale."""
        return Independent(Normal(self.location, self.log_scale.exp(), validate_args=False), 1, validate_args=False)

    def ask(self) -> Tensor:
        """Points to evaluate, ``[N, D]`` in float64, a fresh sample with each call."""
        with torch.no_grad():
            z = torch.randn(
                (self._popsize, len(self.location)),
                dtype=torch.float64,
                device=self.location.device,
                generator=self._generator,
            )
            return z.mul_(self.log_scale.exp()).add_(self.location)

    def tell(self, x: Numbers, f: Numbers) -> None:
        """Learn from a generation.

        Args:
            x: ``[N, D]``, the points that were evaluated, in any order; points changed since ``ask`` (repaired ones)
                are scored as they are, ``z = (x - m) / sigma``.
            f: ``[N]``, their values; NaN or infinity for a failure.

        Raises:
            ShapeError: x is not ``[N, D]`` or f is not ``[N]``.
            NonFiniteError: x is not finite, or so far away that sigma would overflow, or ``tolfailed`` generations in a
                row had no finite value. The state is then as before.
        """
        points, values = self._generation(x, f)
        progress = self._progress.after(points, values, history_length(len(self.location), self._popsize))
        progress.check_alive(self._limits.tolfailed)
        utilities = nes_utilities(-values)
        with torch.no_grad():
            if bool(utilities.any()):
                sigma = self.log_scale.exp()
                z = (points - self.location) / sigma
                location = self.location + self._eta_mean * sigma * (utilities @ z)
                log_scale = self.log_scale + 0.5 * self._eta_sigma * (utilities @ (z.square() - 1))
                if not bool(torch.isfinite(location + log_scale.exp()).all()):
                    raise NonFiniteError(
                        "This generation would make the mean or sigma infinite: the told points lie too many standard "
                        f"deviations away (up to {float(z.abs().max()):.1e}). Tell points near those that ask returned."
                    )
                self.location.copy_(location)
                self.log_scale.copy_(log_scale)
            self._progress = progress
            self._stop = self._limits.fired(progress, self.location, self.log_scale.exp(), self._sigma0, self._popsize)

    def scored(self, x: Numbers, f: Numbers) -> Draws:
        """The generation as draws of ``distribution``, for ``surrogate`` and the diagnostics; no state is changed.

        ``fx`` are N times the utilities u, ``[N, 1]``, so that the mean over draws is the sum above; larger is better:
        they are *ascended* while f is minimised.

        Args:
            x: ``[N, D]``.
            f: ``[N]``.
        """
        points, values = self._generation(x, f)
        log_prob = self.distribution.log_prob(points)
        return Draws(points, log_prob.unsqueeze(-1), len(values) * nes_utilities(-values).unsqueeze(-1))

    @property
    def stop(self) -> dict[str, float]:
        """What ends the search, with the threshold it met; empty, hence false, while it should go on."""
        return dict(self._stop)

    @property
    def result(self) -> StrategyResult:
        """Where the search stands; tensors are copies."""
        progress = self._progress
        return StrategyResult(
            mean=self.location.detach().clone(),
            sigma=self.log_scale.detach().exp(),
            best_x=None if progress.best_x is None else progress.best_x.clone(),
            best_f=progress.best_f,
            evaluations=progress.evaluations,
            iterations=progress.iterations,
            failed=progress.failed,
            stop=self.stop,
        )

    def state_dict(self) -> dict[str, Any]:
        """Distribution, rates, account and random state: tensors and plain numbers, as ``torch.save`` likes them.

        The limits are not part of it, so that a search can go on with a larger budget.
        """
        return {
            "strategy": "SNES",
            "popsize": self._popsize,
            "eta_mean": self._eta_mean,
            "eta_sigma": self._eta_sigma,
            "location": self.location.detach().clone(),
            "log_scale": self.log_scale.detach().clone(),
            "sigma0": self._sigma0.clone(),
            "progress": self._progress.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the run then equals an uninterrupted one to the bit.

        Raises:
            ScorefnError: the state is of another strategy or another dimension, or is incomplete.
        """
        wanted = self.state_dict()
        if state.get("strategy") != "SNES" or set(state) != set(wanted):
            raise ScorefnError(
                f"This is no state of SNES: it has {sorted(state)} of strategy {state.get('strategy')!r}, but "
                f"{sorted(wanted)} are needed. Pass what SNES.state_dict() returned."
            )
        for name in ("location", "log_scale", "sigma0"):
            if state[name].shape != self.location.shape:
                raise ScorefnError(
                    f"The state's {name} is of a search over {state[name].numel()} coordinates, but this one has "
                    f"{len(self.location)}: make the strategy with an x0 of that length."
                )
        progress = Progress.of_state(state["progress"], self.location.device)
        try:
            self._generator.set_state(state["generator"].cpu())
        except RuntimeError as error:
            raise ScorefnError(f"The state's generator is no state of a torch.Generator here: {error}.") from error
        with torch.no_grad():
            self.location.copy_(state["location"])
            self.log_scale.copy_(state["log_scale"])
            self._sigma0.copy_(state["sigma0"])
        self._popsize = state["popsize"]
        self._eta_mean, self._eta_sigma = state["eta_mean"], state["eta_sigma"]
        self._progress = progress
        self._stop = {}
        if self._progress.iterations:
            mean, sigma = self.location.detach(), self.log_scale.detach().exp()
            self._stop = self._limits.fired(self._progress, mean, sigma, self._sigma0, self._popsize)

    def __repr__(self) -> str:
        return (
            f"SNES(dimension={len(self.location)}, popsize={self._popsize}, evaluations={self._progress.evaluations}, "
            f"best_f={self._progress.best_f:.6g})"
        )

    def _generation(self, x: Numbers, f: Numbers) -> tuple[Tensor, Tensor]:
        device = self.location.device
        points = as_points(x, (self._popsize, len(self.location)), device)
        return points, as_values(f, self._popsize, device)


def _checked_popsize(popsize: int) -> int:
    if isinstance(popsize, bool) or not isinstance(popsize, int) or popsize < 2:
        raise ScorefnError(
            f"popsize must be an integer of at least 2, but it is {popsize!r}: one point alone cannot be ranked. Leave "
            "it out for 4 + floor(3 ln D)."
        )
    return popsize


def _checked_rate(name: str, rate: float) -> float:
    if not 0 < rate < math.inf:
        raise ScorefnError(f"{name} must be a positive number, but it is {rate!r}: nothing would be learnt.")
    return float(rate)


def _own_generator(seed: int | torch.Generator | None, device: torch.device) -> torch.Generator:
    if seed is None or isinstance(seed, torch.Generator):
        where = "cpu" if seed is None else seed.device
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=seed, device=where)))
    try:
        return torch.Generator(device).manual_seed(operator.index(seed))
    except TypeError as error:
        raise ScorefnError(
            f"seed must be an integer, a torch.Generator or None, but it is {seed!r}: torch draws from nothing else."
        ) from error
