"""When a search ends, in the words that users of evolution strategies know."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from statistics import median

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.search.points import WIDEST, is_number
from scorefn.search.progress import Progress

MESSAGES = {
    "ftarget": "a value reached ftarget",
    "maxfevals": "no further generation fits into maxfevals",
    "maxiter": "maxiter generations were told",
    "timeout": "timeout seconds have passed",
    "armfevals": "the evaluations that this restart was allowed are spent",
    "tolx": "all standard deviations are below tolx",
    "tolfun": "the values of the last generation and the best of the recent ones differ by less than tolfun",
    "tolfunhist": "the best values of the recent generations differ by less than tolfunhist",
    "tolstagnation": "neither the best nor the median values became lower over the last tolstagnation generations",
    "tolflatfitness": "more than tolflatfitness generations in a row had equal values everywhere",
    "tolfacupx": "a standard deviation grew by more than tolfacupx: sigma0 was far too small, or f has no minimum",
    "tolconditioncov": "the covariance has a condition number above tolconditioncov",
    "tolfailed": "tolfailed generations in a row had no finite value",
    "noeffectaxis": "a tenth of a standard deviation along a principal axis no longer changes the mean in float64",
    "noeffectcoord": "a fifth of a standard deviation no longer changes a coordinate of the mean in float64",
    "swept": "every coordinate was searched",
    "overflow": "the distribution would leave what float64 can hold",
    "callback": "the callback asked for it",
}
CONVERGED = frozenset({"ftarget", "tolx", "tolfun", "tolfunhist"})
_LEAST = {"ftarget": -math.inf, "maxfevals": 1.0, "maxiter": 1.0, "tolfacupx": 1.0, "tolfailed": 1.0}
_NEUTRAL = {
    "ftarget": "None for no target",
    "maxfevals": "None for no limit",
    **dict.fromkeys(("maxiter", "tolstagnation"), "None for the default"),
    **dict.fromkeys(("tolfacupx", "tolconditioncov", "tolflatfitness", "tolfailed"), "inf for no limit"),
}
_STAGNATION_EVERY = 10  # generations between looks at the past, which cost its length


@dataclass(frozen=True)
class Limits:
    """The thresholds; names and meanings follow the pycma package (Hansen, Akimoto & Baudis, 2019).

    Three criteria have fixed thresholds: ``noeffectcoord``, where a fifth of a standard deviation no longer changes a
    coordinate of the mean in float64; ``noeffectaxis``, where a tenth of one along a principal axis does not, looked at
    like ``tolconditioncov``; ``overflow``, where a standard deviation is above 1e150.

    Args:
        ftarget: stop at a value of ftarget or less.
        maxfevals: never spend more evaluations than this.
        maxiter: generations; None: ``100 + 150 (D + 3)^2 / sqrt(N)``.
        tolx: stop when all standard deviations are smaller.
        tolfun: stop when the values of the last generation, and the best ones of the recent ``10 + 30 D / N``
            generations, span less.
        tolfunhist: stop when those best ones alone span less.
        tolstagnation: stop when, over a window of this many generations, or of a fifth of all where that is more, the
            best and the median values of the last 30 % have medians no lower than those of the first 30 %; looked at
            every tenth generation. None: ``120 + 30 D / N``; 0: never.
        tolflatfitness: how many generations in a row may have equal values everywhere.
        tolfacupx: stop when a standard deviation grew by more than this factor.
        tolconditioncov: stop when the largest eigenvalue of the covariance is more than this times the smallest; looked
            at every ``10 + D`` generations, by strategies that have a full factor of the covariance.
        tolfailed: how many generations in a row without a finite value are an error.

    Raises:
        ScorefnError: a limit that is NaN, negative (but ftarget) or smaller than one generation.

    Example:
        >>> from scorefn.search import SNES, Limits
        >>> # what a strategy of one's own hands on; the others take them by keyword
        >>> Limits(ftarget=1e-8, tolx=1e-6)
        Limits(ftarget=1e-08, tolx=1e-06)
        >>> search = SNES([3.0, -2.0], 1.0, seed=0, maxfevals=20)
        >>> while not search.stop:
        ...     search.tell(x := search.ask(), x.square().sum(1))
        >>> search.stop
        {'maxfevals': 20}
    """

    ftarget: float | None = None
    maxfevals: float | None = None
    maxiter: float | None = None
    tolx: float = 1e-11
    tolfun: float = 1e-11
    tolfunhist: float = 1e-12
    tolstagnation: float | None = None
    tolflatfitness: float = 1
    tolfacupx: float = 1e3
    tolconditioncov: float = 1e14
    tolfailed: float = 10

    __repr__ = representation

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check every threshold."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            if not is_number(value) or math.isnan(value):
                raise ScorefnError(
                    f"{entry.name} must be a number, but it is {value!r}: nothing can be compared with that. Use "
                    f"{_NEUTRAL.get(entry.name, '0 to switch a tolerance off')}."
                )
            floor = _LEAST.get(entry.name, 0.0)
            if value < floor:
                raise ScorefnError(f"{entry.name} must be at least {floor}, but it is {value}.")

    @classmethod
    def of_options(cls, options: Mapping[str, float | None], owner: str, others: tuple[str, ...]) -> Limits:
        """The limits that a strategy was given by keyword; an unknown one is refused, with the known ones listed."""
        known = tuple(entry.name for entry in fields(cls))
        for name in options:
            if name not in known:
                raise ScorefnError(
                    f"{owner} has no option {name!r}, and ignoring it would mislead. It knows "
                    f"{', '.join((*others, *known))}."
                )
        return cls(**options)  # type: ignore[arg-type]

    def fired(
        self,
        progress: Progress,
        mean: Tensor,
        sigma: Tensor,
        sigma0: Tensor,
        popsize: int,
        factor: Callable[[], Tensor | None] = lambda: None,
    ) -> dict[str, float]:
        """What ends the search now, with its threshold.

        Args:
            progress: the account.
            mean: ``[D]``.
            sigma: ``[D]``, the standard deviations of the coordinates.
            sigma0: ``[D]``, the first ones.
            popsize: N.
            factor: returns an A ``[D, D]`` of which the covariance is ``A A^T``, or None; called when its axes are
                looked at.
        """
        dimension, iterations = len(mean), progress.iterations
        still = (torch.add(mean, sigma, alpha=0.2) == mean).any()
        widest, grown, no_effect = torch.stack([sigma.amax(), (sigma / sigma0).amax(), still.to(sigma.dtype)]).tolist()
        found: dict[str, float] = {}
        if self.ftarget is not None and progress.best_f <= self.ftarget:
            found["ftarget"] = self.ftarget
        if self.maxfevals is not None and progress.evaluations + popsize > self.maxfevals:
            found["maxfevals"] = self.maxfevals
        maxiter = 100 + 150 * (dimension + 3) ** 2 / math.sqrt(popsize) if self.maxiter is None else self.maxiter
        if iterations >= maxiter:
            found["maxiter"] = maxiter
        if widest < self.tolx:
            found["tolx"] = self.tolx
        span = _recent_span(progress.lowest, history_length(dimension, popsize), max(self.tolfun, self.tolfunhist))
        if max(progress.spread, span) < self.tolfun:
            found["tolfun"] = self.tolfun
        if span < self.tolfunhist:
            found["tolfunhist"] = self.tolfunhist
        window = 120 + 30 * dimension / popsize if self.tolstagnation is None else self.tolstagnation
        if window and iterations % _STAGNATION_EVERY == 0 and _stagnates(progress, window):
            found["tolstagnation"] = window
        if progress.flat > self.tolflatfitness:
            found["tolflatfitness"] = self.tolflatfitness
        if grown > self.tolfacupx:
            found["tolfacupx"] = self.tolfacupx
        if widest > WIDEST:
            found["overflow"] = WIDEST
        if no_effect:
            found["noeffectcoord"] = 0.2
        if iterations % (10 + dimension) == 0 and (root := factor()) is not None:
            axes, lengths, _ = torch.linalg.svd(root)
            longest, shortest = lengths[[0, -1]].tolist()
            if longest * longest > self.tolconditioncov * shortest * shortest:
                found["tolconditioncov"] = self.tolconditioncov
            if bool(((mean + 0.1 * (axes * lengths).T) == mean).all(1).any()):
                found["noeffectaxis"] = 0.1
        return found


def history_length(dimension: int, popsize: int) -> int:
    """How many generations count as recent: ``10 + 30 D / N``, as in pycma."""
    return 10 + 30 * dimension // popsize


def _recent_span(lowest: list[float], length: int, threshold: float) -> float:
    """Largest minus smallest of the last ``length`` values; infinite where that is no less than the threshold."""
    if len(lowest) < length or abs(lowest[-1] - lowest[-length]) >= threshold:
        return math.inf  # two of them differ already: no need to look at all, which may be thousands
    recent = lowest[-length:]
    return max(recent) - min(recent)


def _stagnates(progress: Progress, window: float) -> bool:
    """Whether the newest 30 % of a window of best and of median values are no lower than its oldest 30 %."""
    length = math.ceil(max(window, len(progress.lowest) / 5))
    if len(progress.lowest) < length:
        return False
    part = max(1, 3 * length // 10)
    pasts = (progress.lowest[-length:], progress.medians[-length:])
    return all(median(past[-part:]) >= median(past[:part]) for past in pasts)
