"""Observations on one scale: running mean and variance that stand still while a batch is collected and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count
from scorefn.core.process_groups import (
    ProcessGroup,
    by_rank,
    check_process_group,
    meet,
    merged_moments,
)


class ObservationNormalization(nn.Module):
    """The first layer of a policy's or value function's network: ``clip((x - mean) / sqrt(variance), -clip, clip)``.

    ``forward`` never changes the statistics. ``update`` does, and is to be called between two batches, after the
    gradient step: what was acted upon is then what is scored, and importance ratios are 1 on first use. Statistics that
    move while a batch is collected change the policy under its own draws. Before the first update this is the identity.

    An update merges the batch with what was seen before (Chan, Golub & LeVeque, 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances"): with n and m steps, and d the difference of the two means,

        mean <- mean + d m / (n + m),    n variance <- n variance + m batch_variance + d^2 n m / (n + m),

    so that mean and (population) variance are those of all steps ever seen, in whatever pieces they came. They are kept
    in float64 and counted in int64, all in the ``state_dict``. A feature that has been constant is centred only.

    Args:
        shape: ``[*obs]``, the shape of one observation; an int for a vector.
        clip: the largest size of what is returned; ``math.inf`` for none.
        process_group: ``sf.scale.World()`` or a group of ``torch.distributed``, whose ranks each merge the steps of all
            of them, by one all-reduce of counts, means and squares; all have to update. None: this process alone.

    Raises:
        ScorefnError: shape has sizes below 1, clip is not positive, or process_group is none.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import ObservationNormalization
        >>> normalization = ObservationNormalization(3)
        >>> network = nn.Sequential(normalization, nn.Linear(3, 2))
        >>> seen = torch.randn(64, 10, 3) * 5 + 100
        >>> normalization.update(seen)
        >>> bool(normalization(seen).mean().abs() < 1e-5)
        True
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    scale: Tensor

    def __init__(
        self, shape: int | Sequence[int], *, clip: float = 10.0, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        sizes = shape if isinstance(shape, Sequence) else (shape,)
        self.shape = torch.Size(check_count("each size in shape", size) for size in sizes)
        if not clip > 0:
            raise ScorefnError(f"clip must be positive, but it is {clip!r}: math.inf clips nothing.")
        self.clip = float(clip)
        if process_group is not None:
            check_process_group(process_group)
        self.process_group = process_group
        self.register_buffer("mean", torch.zeros(self.shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(self.shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones_like(self.variance), persistent=False)
        self._updated = False
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def forward(self, observations: Tensor) -> Tensor:
        """``[*batch, *obs] -> [*batch, *obs]``, in the dtype of the observations (integers: the default dtype).

        Raises:
            ShapeError: the observations do not end with ``[*obs]``.
        """
        self._check_shape(observations)
        dtype = observations.dtype if observations.is_floating_point() else torch.get_default_dtype()
        if not self._updated:
            return observations.to(dtype)
        normalized = (observations - self.mean) / self.scale
        if self.clip != math.inf:
            normalized = normalized.clamp(-self.clip, self.clip)
        return normalized.to(dtype)

    @torch.no_grad()
    def update(self, observations: Tensor, mask: Tensor | None = None) -> None:
        """Merge the observations that are present into the statistics.

        Args:
            observations: ``[*batch, *obs]``.
            mask: ``[*batch]`` bool, False where there is no observation; None: all are present.

        Raises:
            ShapeError: the observations do not end with ``[*obs]``, or mask is not ``[*batch]``.
            ScorefnError: mask is not bool.
            NonFiniteError: an observation that is present is NaN or infinite, or too large to be squared. Nothing is
                changed then.
            LostRankError: another process of the group ended or does not answer.
        """
        self._check_shape(observations)
        batch = observations.shape[: observations.ndim - len(self.shape)]
        if mask is not None:
            _check_mask(mask, batch)
            observations = observations[mask]
        rows = observations.reshape(-1, *self.shape).to(self.mean)
        more, batch_variance, batch_mean = len(rows), self.variance, self.mean
        if more:
            batch_variance, batch_mean = torch.var_mean(rows, 0, correction=0)
        if self.process_group is not None:
            more, batch_variance, batch_mean = self._of_all_ranks(rows, batch_variance, batch_mean)
        if more == 0:
            return
        seen = self.count.to(self.mean)
        total = seen + more
        difference = batch_mean - self.mean
        mean = self.mean + difference * (more / total)
        variance = (seen * self.variance + more * batch_variance + difference.square() * (seen * more / total)) / total
        if not bool(torch.isfinite(mean + variance).all()):
            bad = (~torch.isfinite(rows)).flatten(1).any(1)
            raise NonFiniteError(
                f"Observations are NaN or infinite in {int(bad.sum())} of {len(rows)} steps"
                f"{'' if bool(bad.any()) else self._elsewhere()}: merged, they would make every later "
                "observation NaN, so nothing was changed. Find out why the environment returns them, or mask them."
            )
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.count.add_(more)
        _refresh(self)

    def _of_all_ranks(self, rows: Tensor, variance: Tensor, mean: Tensor) -> tuple[int, Tensor, Tensor]:
        """Number, variance and mean of the steps of all ranks."""
        numbers, _ = meet("ObservationNormalization", rows, 0, self.process_group)
        table = by_rank(torch.stack([mean, variance]), self.process_group)
        count = torch.tensor(numbers).to(table).reshape(-1, *[1] * mean.ndim)
        _, whole, square = merged_moments(count, table[:, 0], count * table[:, 1])
        return sum(numbers), square / max(sum(numbers), 1), whole

    def _elsewhere(self) -> str:
        """Where else the fault is when all observations here are finite."""
        overflow = ", but their squares overflow"
        return overflow if self.process_group is None else f"{overflow}, or those of another rank are not finite"

    def _check_shape(self, observations: Tensor) -> None:
        ndim = len(self.shape)
        if observations.ndim < ndim or observations.shape[observations.ndim - ndim :] != self.shape:
            raise ShapeError(
                f"The observations have shape {tuple(observations.shape)}, but they must end with the shape of one "
                f"observation, {tuple(self.shape)}."
            )

    def extra_repr(self) -> str:
        """The shape and the clip, for print."""
        return f"{tuple(self.shape)}, clip={self.clip}"


@torch.no_grad()
def _refresh(module: Any, _keys: Any = None) -> None:
    """What follows from the statistics: ``sqrt(variance)``, or 1 where that is only the rounding of a constant."""
    scale = module.variance.sqrt()
    rounding = 10 * torch.finfo(scale.dtype).eps * module.mean.abs()
    module.scale.copy_(torch.where(scale <= rounding, 1.0, scale))
    module._updated = bool(module.count > 0)


def _check_mask(mask: Tensor, batch: torch.Size) -> None:
    if mask.dtype != torch.bool:
        raise ScorefnError(f"mask is {mask.dtype}, but it must be torch.bool: True where there is an observation.")
    if mask.shape != batch:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, but the observations have batch shape {tuple(batch)}: one entry for "
            "each observation is needed."
        )
