"""When a search ends, in the words that users of evolution strategies know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.progress import Progress

MESSAGES = {
    "ftarget": "a value reached ftarget",
    "maxfevals": "no further generation fits into maxfevals",
    "maxiter": "maxiter generations were told",
    "tolx": "all standard deviations are below tolx",
    "tolfun": "the values of the last generation and the best of the recent ones differ by less than tolfun",
    "tolfunhist": "the best values of the recent generations differ by less than tolfunhist",
    "tolflatfitness": "more than tolflatfitness generations in a row had equal values everywhere",
    "tolfacupx": "a standard deviation grew by more than tolfacupx: sigma0 was far too small, or f has no minimum",
    "noeffectcoord": "a fifth of a standard deviation no longer changes a coordinate of the mean in float64",
    "callback": "the callback asked for it",
}
_LEAST = {"ftarget": -math.inf, "maxfevals": 1.0, "maxiter": 1.0, "tolfacupx": 1.0, "tolfailed": 1.0}
CONVERGED = frozenset({"ftarget", "tolx", "tolfun", "tolfunhist"})


@dataclass(frozen=True)
class Limits:
    """The thresholds; names and meanings follow the pycma package.

    Args:
        ftarget: stop at a value of ftarget or less.
        maxfevals: never spend more evaluations than this.
        maxiter: generations; None: ``100 + 150 (D + 3)^2 / sqrt(N)``.
        tolx: stop when all standard deviations are smaller.
        tolfun: stop when the values of the last generation, and the best ones of the recent ``10 + 30 D / N``
            generations, span less.
        tolfunhist: stop when those best ones alone span less.
        tolflatfitness: how many generations in a row may have equal values everywhere.
        tolfacupx: stop when a standard deviation grew by more than this factor.
        tolfailed: how many generations in a row without a finite value are an error.

    Raises:
        ScorefnError: a limit that is NaN, negative (but ftarget) or smaller than one generation.
    """

    ftarget: float | None = None
    maxfevals: float | None = None
    maxiter: float | None = None
    tolx: float = 1e-11
    tolfun: float = 1e-11
    tolfunhist: float = 1e-12
    tolflatfitness: float = 1
    tolfacupx: float = 1e3
    tolfailed: float = 10

    def __post_init__(self) -> None:
        """Check every threshold."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ScorefnError(
                    f"{entry.name} must be a number, but it is {value!r}: nothing ever compares as smaller."
                    + (" Use None for no target." if entry.default is None else " Use 0 to switch a tolerance off.")
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

    def fired(self, progress: Progress, mean: Tensor, sigma: Tensor, sigma0: Tensor, popsize: int) -> dict[str, float]:
        """What ends the search now, with its threshold; mean and sigmas are ``[D]``."""
        length = history_length(len(mean), popsize)
        recent = progress.lowest[-length:]
        history = max(recent) - min(recent) if len(recent) == length else math.inf
        default = 100 + 150 * (len(mean) + 3) ** 2 / math.sqrt(popsize)
        maxiter = default if self.maxiter is None else self.maxiter
        widest, grown = torch.stack([sigma.max(), (sigma / sigma0).max()]).tolist()
        checks: dict[str, tuple[bool, float | None]] = {
            "ftarget": (self.ftarget is not None and progress.best_f <= self.ftarget, self.ftarget),
            "maxfevals": (
                self.maxfevals is not None and progress.evaluations + popsize > self.maxfevals,
                self.maxfevals,
            ),
            "maxiter": (progress.iterations >= maxiter, maxiter),
            "tolx": (widest < self.tolx, self.tolx),
            "tolfun": (max(progress.spread, history) < self.tolfun, self.tolfun),
            "tolfunhist": (history < self.tolfunhist, self.tolfunhist),
            "tolflatfitness": (progress.flat > self.tolflatfitness, self.tolflatfitness),
            "tolfacupx": (grown > self.tolfacupx, self.tolfacupx),
            "noeffectcoord": (bool((mean + 0.2 * sigma == mean).any()), 0.2),
        }
        return {name: threshold for name, (hit, threshold) in checks.items() if hit and threshold is not None}


def history_length(dimension: int, popsize: int) -> int:
    """How many generations count as recent: ``10 + 30 D / N``, as in pycma."""
    return 10 + 30 * dimension // popsize
