"""Points in mirrored pairs around the mean, cheap in memory: what strategies of many coordinates share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.search.normal_draws import orthogonal_directions, pulled_back
from scorefn.search.path_rates import default_popsize
from scorefn.search.points import Numbers, as_points
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import Rebuildable
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, checked_pairs

_ORTHOGONAL = 1000
_BLOCK = 1 << 25


class MirroredStrategy(Strategy):
    """A strategy whose generation is ``m + A z_k`` and ``m - A z_k`` for N/2 standard normal directions z.

    The state is kept in float64; the points have the dtype that the caller asks for. Up to 1000 coordinates the
    directions are orthogonal within blocks of D; beyond, where random ones nearly are, they are independent and drawn
    in float32, which costs a sixth of float64. Beside the points only the N/2 directions are kept: points that come
    back unchanged are known by a weighted sum of each.

    Args:
        state: with ``mean``, ``[D]``.
        settings: numbers that belong to a saved state.
        sigma0: ``[D]``.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``.
        dtype: of the points, torch.float64 or torch.float32.
        seed: see ``SNES``.
        limits: when to stop.
        fixed: see ``Strategy``.
    """

    def __init__(
        self,
        state: State,
        *,
        settings: Mapping[str, float],
        sigma0: Tensor,
        popsize: int | None,
        dtype: torch.dtype,
        seed: int | torch.Generator | None,
        limits: Limits,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        dimension = len(sigma0)
        size = checked_pairs(default_popsize(dimension) if popsize is None else popsize)
        if dtype not in (torch.float32, torch.float64):
            raise ScorefnError(f"dtype must be torch.float64 or torch.float32, but it is {dtype!r}: of the points.")
        super().__init__(
            state,
            settings=settings,
            shape=(size, dimension),
            sigma0=sigma0,
            seed=seed,
            limits=limits,
            fixed={"dtype": str(dtype), **(fixed or {})},
        )
        self._dtype = dtype
        self._places = torch.linspace(1, 2, dimension, dtype=dtype, device=sigma0.device)
        self._asked: tuple[State, Tensor, Tensor] | None = None  # the state, a sum of each point, the directions
        self._paired = False

    # ------------------------------------------------------------------------------------- what a strategy defines

    @abstractmethod
    def stretched(self, z: Tensor) -> Tensor:
        """``A z``, ``[n, D]`` of z ``[n, D]``."""

    @abstractmethod
    def local(self, steps: Tensor) -> Tensor:
        """``A^-1`` of steps ``[n, D]`` from the mean, ``[n, D]``."""

    # ------------------------------------------------------------------------------------------------- the contract

    @property
    def mean(self) -> Tensor:
        """``[D]``, m; a copy."""
        mean: Tensor = self._state["mean"]
        return mean.clone()

    def sampled(self) -> Tensor:
        """``[N, D]``: the pairs, first all ``+``, then all ``-``."""
        half, dimension = self._shape[0] // 2, self._shape[1]
        if dimension <= _ORTHOGONAL:
            z = orthogonal_directions(half, dimension, self._generator).to(self._dtype)
        else:
            z = torch.randn((half, dimension), device=self._sigma0.device, generator=self._generator).to(self._dtype)
        points = torch.empty(self._shape, dtype=self._dtype, device=z.device)
        self.write_pairs(z, points[:half], points[half:])
        self._asked = self._state, points @ self._places, z
        return points

    def write_pairs(self, z: Tensor, above: Tensor, below: Tensor) -> None:
        """Write ``m + A z`` and ``m - A z``, each ``[n, D]``, of z ``[n, D]``."""
        step, mean = self.stretched(z), self._state["mean"].to(z.dtype)
        torch.add(mean, step, out=above)
        torch.sub(mean, step, out=below)

    def check_popsize(self, popsize: int) -> None:
        """Raise ScorefnError where points in pairs cannot be so many."""
        checked_pairs(popsize)

    def told(self, x: Numbers) -> Tensor:
        """The told points ``[N, D]`` in the dtype of the points; those that ``ask`` returned are not copied."""
        if isinstance(x, Tensor) and x.dtype == self._dtype and x.shape == self._shape:
            self._paired = self._known(x.detach())
            if self._paired:
                return x.detach()
        points = as_points(x, self._shape, self._sigma0.device).to(self._dtype)
        if self._dtype != torch.float64 and not bool(points.isfinite().all()):
            raise NonFiniteError(
                f"The told points are not finite in {self._dtype}, the dtype of this search: tell points near those "
                "that ask returned."
            )
        self._paired = self._known(points)
        return points

    def directions(self, points: Tensor) -> Directions:
        """The local coordinates of told points ``[N, D]``, bounded; those of points from ``ask`` are not computed anew.

        Unbounded ones would make the distribution what the farthest point is, or overflow.
        """
        if self._paired and self._asked is not None:
            return Directions(self._asked[2], paired=True)
        z = pulled_back(self.local(points - self._state["mean"]))
        return Directions(z.to(self._dtype), paired=False)

    def _known(self, points: Tensor) -> bool:
        """Whether ``ask`` drew these points from the present distribution; a sum that is NaN equals nothing."""
        return (
            self._asked is not None
            and self._asked[0] is self._state
            and points.device == self._sigma0.device
            and torch.equal(points @ self._places, self._asked[1])
        )


class DiagonalStrategy(MirroredStrategy, Rebuildable):
    """A mirrored strategy with independent coordinates: A is the diagonal of ``sigma``."""

    paired = True

    @property
    def noise_dtype(self) -> torch.dtype:
        """Of the points."""
        return self._dtype

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """The state after a generation, by sums over its directions."""
        return self.learnt_by(self.directions(points), ranking)

    def stretched(self, z: Tensor) -> Tensor:
        """``sigma z``."""
        return z * self.sigma.to(z.dtype)

    def local(self, steps: Tensor) -> Tensor:
        """``steps/sigma``."""
        return steps / self.sigma

    def write_pairs(self, z: Tensor, above: Tensor, below: Tensor) -> None:
        """Write both in one pass each."""
        mean, scale = self._state["mean"].to(z.dtype), self.sigma.to(z.dtype)
        torch.addcmul(mean, z, scale, out=above)
        torch.addcmul(mean, z, scale, value=-1, out=below)


@dataclass(frozen=True, eq=False)
class Directions:
    """Local coordinates z of N points, and sums over them.

    Args:
        z: ``[N, D]``, or ``[N/2, D]`` where the second half of the points is the first mirrored.
        paired: which of the two.
    """

    z: Tensor
    paired: bool

    def square_lengths(self) -> Tensor:
        """``[N]``, ``|z_k|^2``, in float64."""
        square: Tensor = torch.linalg.vector_norm(self.z, dim=1).double().square()
        return square.repeat(2) if self.paired else square

    def first(self, weights: Tensor) -> Tensor:
        """``sum_k w_k z_k``, ``[D]`` in float64, of weights ``[N]``."""
        if self.paired:
            half = len(self.z)
            weights = weights[:half] - weights[half:]
        return (weights.to(self.z.dtype) @ self.z).double()

    def even(self, weights: Tensor) -> Tensor:
        """Weights ``[N]`` of points as those of z in even moments: ``[N]``, or ``[N/2]``."""
        if not self.paired:
            return weights
        half = len(self.z)
        return weights[:half] + weights[half:]

    def second(self, weights: Tensor) -> Tensor:
        """``sum_k w_k z_k^2``, ``[D]`` in float64, of weights ``[N]``; in blocks, so that no copy of z is made."""
        weights = self.even(weights).to(self.z.dtype)
        width = max(1, _BLOCK // len(self.z))
        return torch.cat([weights @ block.square() for block in self.z.split(width, 1)]).double()
