"""How far to step along a natural gradient: by the signal-to-noise ratio of those seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorefn.search.strategy import check_overflow

_SIGNAL = 1.3
_NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class TrustRegion:
    """A step of Fisher length r along each natural gradient; r grows while these agree, and shrinks where they do not.

    With F the Fisher information, g the score-function gradient and ``s = F^-1/2 g`` the whitened one, of n degrees of
    freedom::

        y = s / |s|                                        the step is r F^-1/2 y, so that KL(before, after) ~ r^2 / 2
        b = min(1, r / sqrt(n))
        p <- (1 - b) p + sqrt(b (2 - b)) y                 a path of what the gradients have in common
        w <- (1 - b)^2 w + b (2 - b)                       E|p|^2 if they have nothing in common
        r <- min(sqrt(n), r exp(b (|p|^2 / 1.3 - w)))

    Under pure noise r decays like 1/t, so that the distribution does not wander off.

    Source: Akimoto, Shirakawa, Yoshinari, Uchida, Saito & Nishida (2019), "Adaptive stochastic natural gradient method
    for one-shot neural architecture search", ICML, section 4, with 1.3 in place of their 1.5, both measured.

    Args:
        path: p, of any shape.
        weight: w.
        radius: r.
    """

    path: Tensor
    weight: float = 0.0
    radius: float = 1.0

    def step(self, whitened: Tensor, freedom: int) -> tuple[Tensor, TrustRegion] | None:
        """The whitened step ``r y`` and the region after it; None where there is nothing to follow.

        Args:
            whitened: s, of the path's shape.
            freedom: n, the rank of F.
        """
        size = float(torch.linalg.vector_norm(whitened))
        check_overflow("the step of the search distribution", size, size)
        if size <= _NOTHING:  # identical points: what is left of utilities that sum to zero is rounding
            return None
        unit = whitened / size
        rate = min(1.0, self.radius / math.sqrt(freedom))
        path = (1 - rate) * self.path + math.sqrt(rate * (2 - rate)) * unit
        weight = (1 - rate) ** 2 * self.weight + rate * (2 - rate)
        growth = rate * (float(path.square().sum()) / _SIGNAL - weight)
        return self.radius * unit, TrustRegion(path, weight, min(math.sqrt(freedom), self.radius * math.exp(growth)))

    def state(self) -> dict[str, Any]:
        """The entries of a strategy's state that ``of_state`` reads."""
        return {"path": self.path, "path_weight": self.weight, "radius": self.radius}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> TrustRegion:
        """The region that ``state`` wrote."""
        return cls(state["path"], state["path_weight"], state["radius"])


def default_margin(factors: int) -> float:
    """``min(1/n, 0.27)``: how likely one of n factors is at least to leave its most likely value.

    1/n is the mutation rate of the simplest evolutionary algorithm. 0.27 is what the margin of Hamano, Saito, Nomura,
    Uchida & Shirakawa (2024), "CatCMA", ``1 - 0.73^(1/n)``, is for a single factor.
    """
    return min(1 / factors, 0.27)


def discrete_limits(limits: Mapping[str, float | None]) -> dict[str, float | None]:
    """Limits where equal values are no sign of convergence: in a discrete space the best one is met again and again."""
    return {"tolfun": 0.0, "tolfunhist": 0.0, "tolflatfitness": 10, **limits}


def default_popsize(freedom: int) -> int:
    """``4 + floor(3 ln n)``, n the degrees of freedom."""
    return 4 + int(3 * math.log(freedom))
