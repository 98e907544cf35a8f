"""Transforms of a whole batch of values: they change what is estimated, and say so.

Each is ``shape(fx) -> fx`` on ``[N, *B, J]``, over the draws, for every problem and value apart, and ascends with f:
the largest f gets the largest output, so that a cost stays a cost. As in ``expectation(..., shape=CenteredRank())``.

With a process group the batch is that of all its ranks, and what each gets is its part of what one process would have
made of the whole: ``sf.scale.World()``, a group that ``torch.distributed.new_group`` returned, or None, which leaves
``torch.distributed`` alone. Ranks may differ in N; all have to call the transform, in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count, in_transform
from scorefn.core.process_groups import (
    ProcessGroup,
    by_rank,
    check_process_group,
    gathered,
    meet,
    merged_moments,
    shown,
    widest,
)

__all__ = ["CenteredRank", "NESUtilities", "Standardize", "nes_utilities", "utilities_by_rank"]


@dataclass(frozen=True, repr=False)
class _OverRanks:
    """The process group of a transform, checked when it is made."""

    process_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        """Check the group."""
        if self.process_group is not None:
            check_process_group(self.process_group)

    def __repr__(self) -> str:
        """The name, with the process group where there is one."""
        return shown(self)


@dataclass(frozen=True, repr=False)
class Standardize(_OverRanks):
    """Mean 0 and standard deviation 1: ``(f_i - mean f) / std f``, with ``std`` that of a sample (N - 1).

    The gradient is that of E f divided by the batch's own spread and shrunk by ``(N - 1)/N``: its length means nothing
    any more, and its direction only nearly what it did, because each draw stands in the mean and the spread that it is
    compared with. A constant f, or one draw, gives zeros. What f passes on pathwise is divided by the spread likewise,
    mean and spread being taken as constants. Known as advantage normalisation; in group form, Shao et al. (2024),
    "DeepSeekMath", eq. 4.

    With a process group each rank contributes number, mean and sum of squares of its draws, merged stably.

    Args:
        process_group: whose ranks' draws form the batch; None: those of this process.

    Raises:
        ShapeError: fx has no axis of draws.
        NonFiniteError: a value is NaN or infinite, on any rank.
        ScorefnError: fx is no tensor of real numbers, or has other problems or values than on other ranks.
        LostRankError: another process ended or does not answer.

    Example:
        >>> import torch, scorefn as sf
        >>> sf.Standardize()(torch.tensor([0.0, 2.0, 4.0]))
        tensor([-1.,  0.,  1.])
    """

    unbiased = False

    def __call__(self, fx: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, J]``."""
        fx = _checked(self, fx)
        fx = fx if fx.is_floating_point() else fx.to(torch.get_default_dtype())
        values = fx.detach()
        finite = in_transform() or bool(values.isfinite().all())
        if not finite and self.process_group is None:
            raise NonFiniteError(f"Standardize was given a NaN or infinite value, {_NO_DISTANCE}")
        size = values.abs().amax(0).clamp(min=torch.finfo(values.dtype).tiny)  # f of any magnitude has a finite square
        mean = (values / size).mean(0)
        square = (values / size - mean).square().sum(0)
        number, low, high = len(values), values.amin(0), values.amax(0)
        if self.process_group is not None:
            number, size, mean, square, low, high = self._whole(finite, values, (size, mean, square, low, high))
        if number < 2:
            return torch.zeros_like(fx)
        centred = values / size - mean
        spread = square.div(number - 1).sqrt()
        varies = (low != high) & (spread > 4 * torch.finfo(values.dtype).eps)
        slope = torch.where(varies, 1 / torch.where(varies, spread, 1.0), 0.0)
        shaped = centred * slope
        return shaped + (fx - values) * (slope / size) if fx.requires_grad else shaped

    def _whole(
        self, finite: bool, values: Tensor, moments: tuple[Tensor, ...]
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """How many draws all ranks have, and their size, mean, squares, lowest and highest value."""
        numbers, bad = meet("Standardize", values, int(not finite), self.process_group)
        if any(bad):
            at = [rank for rank, is_bad in enumerate(bad) if is_bad]
            raise NonFiniteError(f"Standardize was given a NaN or infinite value on rank(s) {at}, {_NO_DISTANCE}")
        table = by_rank(torch.stack(moments).to(widest(values.device)), self.process_group)
        sizes, means, squares, low, high = table.unbind(1)
        size = sizes.amax(0)
        ratio = sizes / size
        count = torch.tensor(numbers, dtype=table.dtype, device=table.device).reshape(-1, *[1] * size.ndim)
        _, mean, square = merged_moments(count, ratio * means, ratio.square() * squares)
        size, mean, square = (v.to(values.dtype) for v in (size, mean, square))
        return sum(numbers), size, mean, square, low.amin(0), high.amax(0)


_NO_DISTANCE = (
    "which has no distance from the mean. Give failures a finite value, or use ranks (CenteredRank, NESUtilities), "
    "where a failure is the lowest."
)


@dataclass(frozen=True, repr=False)
class CenteredRank(_OverRanks):
    """Ranks spread evenly over [-1/2, 1/2]: ``(rank f_i - 1)/(N - 1) - 1/2``, rank 1 the lowest.

    Only the order of the values enters. Equal values share the mean of their ranks; NaN and infinite values are
    failures and rank lowest, tied. Outputs sum to 0; all tied, or one draw, gives zeros. Salimans et al. (2017),
    "Evolution strategies as a scalable alternative to reinforcement learning", section 2.1.

    Args:
        process_group: among whose ranks' draws each is ranked (every rank sends its values to all); None: this process.

    Raises:
        ShapeError: fx has no axis of draws.
        ScorefnError: fx is no tensor of real numbers, or requires grad; a rank has no gradient.

    Example:
        >>> import torch, scorefn as sf
        >>> sf.CenteredRank()(torch.tensor([0.3, 1e9, torch.nan, 0.3, 0.2]))
        tensor([ 0.1250,  0.5000, -0.5000,  0.1250, -0.2500])
    """

    unbiased = False
    accepts_non_finite = True

    def __call__(self, fx: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, J]``."""
        fx = _checked_for_ranks(self, fx)
        everybody, mine = _gathered(self, fx)
        k = torch.arange(len(everybody) - 1, -1, -1, dtype=torch.float64, device=fx.device)
        return _by_rank(everybody, k / max(len(everybody) - 1, 1) - 0.5)[mine]


@dataclass(frozen=True, repr=False)
class NESUtilities(_OverRanks):
    """The utilities of natural evolution strategies: only the better half of the draws speaks, the best one loudest.

    ``N u_i``, with u of ``nes_utilities``: the mean over draws of ``N u_i log p(x_i)`` has the gradient
    ``sum_i u_i grad log p(x_i)`` of Wierstra et al. (2014), "Natural evolution strategies", JMLR 15, section 3.1.
    Larger f is better: for a cost, shape the estimate of ``-f``.

    Args:
        process_group: among whose ranks' draws each is ranked (every rank sends its values to all); None: this process.

    Raises:
        ShapeError: fx has no axis of draws.
        ScorefnError: fx is no tensor of real numbers, or requires grad; a rank has no gradient.

    Example:
        >>> import torch, scorefn as sf
        >>> sf.NESUtilities()(torch.tensor([30.0, 10.0, 20.0, 0.0]))
        tensor([ 1.9217, -1.0000,  0.0783, -1.0000])
    """

    unbiased = False
    accepts_non_finite = True

    def __call__(self, fx: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, J]``."""
        fx = _checked_for_ranks(self, fx)
        everybody, mine = _gathered(self, fx)
        return len(everybody) * nes_utilities(everybody)[mine]


def nes_utilities(fx: Tensor) -> Tensor:
    """Utilities of values ``[N, ...]`` along the first axis, the largest value best, ``[N, ...]``; they sum to 0.

    With k the rank of a value, 1 the largest::

        u_k = max(0, ln(N/2 + 1) - ln k) / sum_j max(0, ln(N/2 + 1) - ln j) - 1/N

    Equal values share the mean of their utilities; NaN and infinite values are failures and rank last, tied; all tied
    gives zeros. Wierstra et al. (2014), "Natural evolution strategies", JMLR 15, section 3.1.

    Example:
        >>> import torch
        >>> from scorefn.shaping import nes_utilities
        >>> nes_utilities(torch.tensor([30.0, 10.0, 20.0, 0.0]))
        tensor([ 0.4804, -0.2500,  0.0196, -0.2500])
    """
    return _by_rank(fx, utilities_by_rank(len(fx), fx.device))


def utilities_by_rank(num: int, device: torch.device | str | None = None) -> Tensor:
    """``u_1, ..., u_N`` of ``nes_utilities`` (Wierstra et al., 2014), the best first, ``[N]`` in float64.

    Args:
        num: N.
        device: of the result, or its name; None: the default one.

    Raises:
        ScorefnError: num is no integer of at least 1, or device is neither a device nor a name.

    Example:
        >>> from scorefn.shaping import utilities_by_rank
        >>> utilities_by_rank(4)  # two of four speak; the others stand at -1/4
        tensor([ 0.4804,  0.0196, -0.2500, -0.2500], dtype=torch.float64)
    """
    num = check_count("num", num)
    if not isinstance(device, torch.device | str | None):
        raise ScorefnError(
            f"device must be a torch.device or its name, but it is {device!r}: utilities_by_rank takes the number of "
            "ranks and, if need be, where to put them. For utilities of values, use nes_utilities(fx)."
        )
    k = torch.arange(1, num + 1, dtype=torch.float64, device=device)
    height = (math.log(num / 2 + 1) - k.log()).clamp(min=0)
    return height / height.sum() - 1 / num


def _by_rank(fx: Tensor, by_rank: Tensor) -> Tensor:
    """Hand out by_rank ``[N]``, best first, to the values ``[N, ...]``, largest first; ties share their mean."""
    flat = fx.detach().flatten(1) if fx.ndim > 1 else fx.detach().unsqueeze(-1)
    if flat.is_floating_point():
        keys = torch.where(flat.isfinite(), -flat, torch.inf)
    else:  # as they are: a float would tie large ones; ~ turns the order around, where - would overflow
        keys = ~_whole_numbers(flat)
    ordered, order = keys.sort(dim=0, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    column = torch.arange(flat.shape[1], device=fx.device)
    run = (begins.long().cumsum(0) - 1) * flat.shape[1] + column  # ties of one column share a number
    spread = by_rank.unsqueeze(-1).expand(flat.shape)
    total = by_rank.new_zeros(flat.numel()).index_add(0, run.flatten(), spread.flatten())
    count = by_rank.new_zeros(flat.numel()).index_add(0, run.flatten(), torch.ones_like(spread).flatten())
    shared = (total / count.clamp(min=1))[run]
    shared = torch.where(begins.sum(0) > 1, shared, 0.0)
    handed = torch.empty_like(shared).scatter_(0, order, shared).reshape(fx.shape)
    return handed.to(fx.dtype if fx.is_floating_point() else torch.get_default_dtype())


def _gathered(shape: _OverRanks, fx: Tensor) -> tuple[Tensor, slice]:
    """The values of all ranks one after the other, and where those of this one stand."""
    if shape.process_group is None:
        return fx, slice(None)
    return gathered(type(shape).__name__, fx if fx.is_floating_point() else _whole_numbers(fx), shape.process_group)


def _whole_numbers(fx: Tensor) -> Tensor:
    """Integers of any kind in the order of int64."""
    return fx.view(torch.int64) ^ torch.iinfo(torch.int64).min if fx.dtype == torch.uint64 else fx.long()


def _checked(shape: object, fx: Tensor) -> Tensor:
    """The values, refused where they are not real numbers or there is no axis of draws."""
    if not isinstance(fx, Tensor) or fx.is_complex():
        found = fx.dtype if isinstance(fx, Tensor) else f"a {type(fx).__name__}"
        raise ScorefnError(
            f"{type(shape).__name__} compares real numbers, but fx is {found}: give a tensor [N, *B, J], for instance "
            f"{'fx.real' if isinstance(fx, Tensor) else 'torch.as_tensor(fx)'}."
        )
    if fx.ndim == 0 or len(fx) == 0:
        raise ShapeError(
            f"{type(shape).__name__} compares draws, but fx has shape {tuple(fx.shape)}: give [N, *B, J] with N, the "
            "number of draws, first."
        )
    return fx


def _checked_for_ranks(shape: object, fx: Tensor) -> Tensor:
    """The values, refused where a gradient through them would be lost."""
    fx = _checked(shape, fx)
    if fx.requires_grad and torch.is_grad_enabled():
        raise ScorefnError(
            f"{type(shape).__name__} keeps only the order of the values, which has no gradient: the pathwise part of f "
            "would silently be lost. Detach what f returns, or leave the shape out."
        )
    return fx
