"""Policy gradients with parameter-based exploration: a diagonal normal distribution for very many parameters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.clip_up import ClipUp, OptimizerFactory, descended, fresh_optimizer
from scorefn.search.mirrored import DiagonalStrategy
from scorefn.search.points import Numbers, as_sigma, as_start, is_number
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import LocalSums
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, check_overflow, checked_rate


class PGPE(DiagonalStrategy):
    """Minimise by the mean and the standard deviations of a normal distribution, the mean moved by an optimiser.

    A generation is ``m +- sigma z_k`` for N/2 directions z; r_k are the centred ranks of the values of all N points,
    from 1/2 for the lowest to -1/2 for the highest, ties sharing the mean of theirs::

        g_m   = 1/N sum_k r_k sigma z_k                         m     <- a step of the optimiser along g_m
        g_s   = 1/N sum_k r_k sigma (z_k^2 - 1)                 sigma <- sigma + clip(eta_sigma g_s)

    where clip keeps the change of each sigma within a share ``max_change`` of it. g_m and g_s are the natural gradient
    of ``E r`` in m and twice that in sigma (whose Fisher information is ``2/sigma^2``). Memory beside the points is
    their half, and O(D): with ``dtype=torch.float32`` a policy of 10^6 parameters and 200 points take 1.2 GB.

    Sources: Sehnke et al. (2010), "Parameter-exploring policy gradients", Neural Networks 23, section 3, for mirrored
    draws and both gradients; Toklu, Liskowski & Srivastava (2020), "ClipUp", PPSN, sections 2 and 3, for ranks, the
    optimiser and the clipped change of sigma.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``; noisy returns want 100 or more.
        max_speed: of ``ClipUp``, the longest step of the mean; None: ``|sigma0|/15``, the norm being that of all D.
        optimizer: of the mean in place of ClipUp: called with a list of one parameter, returns a
            ``torch.optim.Optimizer``, which descends -g_m.
        eta_sigma: learning rate of sigma.
        max_change: the largest relative change of a sigma, below 1.
        dtype: of the points, torch.float64 or torch.float32; the state is kept in float64.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, a rate, dtype or a limit that makes no sense; an unknown limit; max_speed beside
            an optimizer; an optimizer that is none.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import PGPE
        >>> strategy = PGPE([3.0, -2.0], sigma0=1.0, popsize=20, seed=0, ftarget=1e-2)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(-1))
        >>> strategy.stop
        {'ftarget': 0.01}
    """

    method = "pgpe"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        max_speed: float | None = None,
        optimizer: OptimizerFactory | None = None,
        eta_sigma: float = 0.1,
        max_change: float = 0.2,
        dtype: torch.dtype = torch.float64,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        if optimizer is not None and max_speed is not None:
            raise ScorefnError("max_speed belongs to ClipUp, but another optimizer was given: leave one of them out.")
        if not is_number(max_change) or not 0 < max_change < 1:
            raise ScorefnError(
                f"max_change must lie between 0 and 1, but it is {max_change!r}: a change by all of sigma ends at 0."
            )
        speed = float(torch.linalg.vector_norm(sigma)) / 15 if max_speed is None else max_speed
        if optimizer is None:
            checked_rate("max_speed", speed)
        clip_up = functools.partial(ClipUp, max_speed=speed)
        self._optimizer: OptimizerFactory = clip_up if optimizer is None else optimizer
        kind, memory = fresh_optimizer(self._optimizer, start)
        super().__init__(
            {"mean": start, "scale": sigma, "optimizer": memory},
            settings={"eta_sigma": checked_rate("eta_sigma", eta_sigma), "max_change": float(max_change)},
            sigma0=sigma.clone(),
            popsize=popsize,
            dtype=dtype,
            seed=seed,
            fixed={"optimizer_kind": kind},
            limits=Limits.of_options(
                limits,
                "PGPE",
                ("popsize", "max_speed", "optimizer", "eta_sigma", "max_change", "dtype", "seed"),
            ),
        )

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations; a copy."""
        scale: Tensor = self._state["scale"]
        return scale.clone()

    def learnt_by(self, sums: LocalSums, ranking: Ranking) -> State:
        """One step of the optimiser, and one of sigma."""
        state, rates, num = self._state, self._settings, len(ranking)
        scale = state["scale"]
        r = ranking.hand_out(centred_ranks(num, self._sigma0.device))
        by_mean = scale * sums.first(r) / num
        by_scale = scale * sums.second(r) / num  # the ranks sum to 0
        mean, memory = descended(self._optimizer, state["mean"], -by_mean, state["optimizer"])
        limit = rates["max_change"] * scale
        changed = scale + (rates["eta_sigma"] * by_scale).clamp(-limit, limit)
        farthest = float(sums.square_lengths().max().sqrt())
        check_overflow("the mean or sigma", farthest, by_mean, by_scale, mean, changed)
        return {"mean": mean, "scale": changed, "optimizer": memory}


def centred_ranks(num: int, device: torch.device) -> Tensor:
    """``[N]`` from 1/2, of the lowest value, to -1/2; Salimans et al. (2017), section 2.1."""
    return torch.linspace(0.5, -0.5, num, dtype=torch.float64, device=device)
