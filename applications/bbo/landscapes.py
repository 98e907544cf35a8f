"""Functions with several optima, all known, and the rules that integrate over their spaces: exact free energies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.distributions import Distribution


@dataclass(frozen=True)
class Landscape:
    """A function with several optima, and a rule that integrates over its space.

    Attributes:
        f: values ``[N]`` of points ``[N, D]``.
        optima: ``[M, D]``, all of them.
        points: ``[G, D]``, of the rule.
        weight: of each of them.
        hot: the temperature at the start.
        cold: and at the end.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    optima: Tensor
    points: Tensor
    weight: float
    hot: float
    cold: float

    def least(self, temperature: float) -> float:
        """The smallest free energy that any distribution has."""
        return -temperature * float((-self.f(self.points) / temperature).logsumexp(0) + math.log(self.weight))

    @torch.no_grad()
    def free_energy(self, p: Distribution, temperature: float) -> float:
        """Of p, by the rule."""
        log_p = p.log_prob(self.points)
        return float((log_p.exp() * (self.f(self.points) + temperature * log_p)).sum()) * self.weight

    def shares(self, log_density: Tensor) -> Tensor:
        """How much of a density ``[G]`` is nearest to each optimum, ``[M]``."""
        nearest = torch.cdist(self.points, self.optima).argmin(1)
        density = (log_density - log_density.logsumexp(0)).exp()
        return torch.zeros(len(self.optima), dtype=density.dtype).index_add_(0, nearest, density)

    def boltzmann_shares(self) -> Tensor:
        """Of the coldest Boltzmann distribution."""
        return self.shares(-self.f(self.points) / self.cold)


def himmelblau(x: Tensor) -> Tensor:
    """``[N]`` of ``[N, 2]`` (Himmelblau, 1972)."""
    a, b = x.unbind(-1)
    return (a.square() + b - 11).square() + (a + b.square() - 7).square()


def himmelblau_landscape(width: float = 7.0, step: float = 0.05) -> Landscape:
    """Its four zeros by Newton's method from where they are known to be, and a square grid."""
    near = [(3.0, 2.0), (-2.8, 3.1), (-3.8, -3.3), (3.6, -1.8)]
    optima = torch.tensor(near, dtype=torch.float64)
    for _ in range(20):
        a, b = optima.unbind(1)
        residual = torch.stack([a.square() + b - 11, a + b.square() - 7], 1)
        jacobian = torch.stack(
            [torch.stack([2 * a, torch.ones_like(a)], 1), torch.stack([torch.ones_like(a), 2 * b], 1)], 1
        )
        optima = optima - torch.linalg.solve(jacobian, residual)
    axis = torch.arange(-width, width + step / 2, step, dtype=torch.float64)
    return Landscape("himmelblau", himmelblau, optima, torch.cartesian_prod(axis, axis), step**2, 100.0, 1.0)


def twomax(x: Tensor) -> Tensor:
    """``[N]`` of ``[N, n]``."""
    ones = x.sum(-1)
    return -torch.maximum(ones, x.shape[-1] - ones)


def twomax_landscape(bits: int = 12) -> Landscape:
    """All strings."""
    strings = torch.tensor(list(product((0.0, 1.0), repeat=bits)), dtype=torch.float64)
    return Landscape("twomax", twomax, strings[[0, -1]], strings, 1.0, 4.0, 0.5)
