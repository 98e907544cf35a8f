"""A batch split over the processes of a ``torch.distributed`` group: gradients and denominators of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError, World
from scorefn.core.process_groups import (
    ProcessGroup,
    check_process_group,
    gathered,
    greet,
    meet,
    refuse_misfits,
    summed,
    widest,
)

__all__ = [
    "World",
    "all_reduce_gradients",
    "gather_over_ranks",
    "shared_denominator",
    "sum_over_ranks",
]


@torch.no_grad()
def all_reduce_gradients(params: Tensor | Iterable[Tensor], process_group: ProcessGroup | None = None) -> None:
    """Replace every ``.grad`` by its mean over ranks, in one all-reduce: what DDP does, without wrapping a module.

    With ``loss_r`` the loss of rank r, ``grad <- 1/W sum_r grad loss_r``. So a loss that is a mean over N draws on
    every rank gives the gradient of the mean over all W N; where ranks differ in N, or the mean is over tokens, divide
    a *sum* by ``shared_denominator``. Call it after ``backward`` and before the gradient is clipped or used. A missing
    gradient counts as 0; a parameter without gradient on every rank keeps none.

    Args:
        params: the same on every rank, in the same order; those that do not require grad are passed over.
        process_group: the ranks; None: all processes of the job.

    Raises:
        ScorefnError: no parameters that require grad, on two devices, a sparse gradient, or parameters that differ
            between ranks. Every ``.grad`` is then as before.
        LostRankError: another process ended or does not answer; likewise.

    Example:
        >>> import torch, torch.distributed as dist, scorefn as sf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> module = torch.nn.Linear(2, 1)
        >>> module(torch.ones(3, 2)).sum().backward()
        >>> sf.scale.all_reduce_gradients(module.parameters())  # one sum for all of them
        >>> module.weight.grad
        tensor([[3., 3.]])
        >>> dist.destroy_process_group()
    """
    group = World() if process_group is None else process_group
    check_process_group(group)
    if not isinstance(params, Iterable):
        raise ScorefnError(f"params must be tensors, but it is {params!r}: pass module.parameters().")
    wanted = [p for p in ([params] if isinstance(params, Tensor) else list(params)) if p.requires_grad]
    if not wanted:
        raise ScorefnError("all_reduce_gradients was given no tensor that requires grad: pass module.parameters().")
    if len(devices := {str(p.device) for p in wanted}) > 1:
        raise ScorefnError(
            f"The parameters lie on {sorted(devices)}, but one all-reduce adds on one device: call "
            "all_reduce_gradients once for each of them."
        )
    if any(p.grad is not None and p.grad.layout != torch.strided for p in wanted):
        raise ScorefnError(
            "A gradient is sparse, and adding ranks' gradients needs the same entries everywhere: make the embedding "
            "with sparse=False."
        )
    dtype = wanted[0].dtype
    for p in wanted[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    layout = crc32(repr([(tuple(p.shape), str(p.dtype)) for p in wanted]).encode())
    numbers = [len(wanted), sum(p.numel() for p in wanted), layout]
    found = [tuple(row) for row in greet("all_reduce_gradients", numbers, wanted[0], group)]
    told = [f"{count} tensors of {entries} entries (shapes {shapes:08x})" for count, entries, shapes in found]
    refuse_misfits("all_reduce_gradients", "what it was given", told, "Pass the same parameters in the same order.")
    present = torch.tensor([p.grad is not None for p in wanted]).to(wanted[0].device, dtype)
    parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in wanted]
    flat = summed(torch.cat([present, *(part.reshape(-1).to(dtype) for part in parts)]), group)
    anywhere, rest = flat[: len(wanted)].tolist(), flat[len(wanted) :] / len(found)
    for p, known, mean in zip(wanted, anywhere, rest.split([p.numel() for p in wanted]), strict=True):
        if known == 0:
            continue
        mean = mean.reshape(p.shape).to(p.dtype)
        if p.grad is None:
            p.grad = mean.clone()
        else:
            p.grad.copy_(mean)


def shared_denominator(count: float | Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """The count of all ranks divided by their number: what a *sum* is divided by, so that the mean over ranks is right.

    With sums s_r and counts n_r of W ranks, and ``d = sum_r n_r / W``, the mean over ranks that DDP and
    ``all_reduce_gradients`` take of ``s_r / d`` is ``sum_r s_r / sum_r n_r``: the ratio of the whole batch. The mean of
    the ratios ``s_r / n_r`` is another number wherever the n_r differ. As in
    ``surrogate.sum() / shared_denominator(len(draws))`` for ranks that differ in N, or
    ``TokenMean(shared_denominator(draws.mask.sum()))``.

    Args:
        count: of draws, steps or tokens here: a number, or a tensor with one count per problem; on its device it is
            added, so that nccl needs one on the GPU.
        process_group: the ranks; None: all processes of the job.

    Returns:
        Of count's shape, on its device, in float64 (float32 on mps).

    Raises:
        ScorefnError: a count that is not finite or below 0, of another shape on another rank, or 0 on all of them.
        LostRankError: another process ended or does not answer.

    Example:
        >>> import torch, torch.distributed as dist, scorefn as sf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> sf.scale.shared_denominator(6)  # with 6 here and 2 on another rank: 4
        tensor(6., dtype=torch.float64)
        >>> dist.destroy_process_group()
    """
    group = World() if process_group is None else process_group
    try:
        number = torch.as_tensor(count).detach()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ScorefnError(f"A count must be a number or a tensor of numbers, but it is {count!r}.") from error
    number = number.to(widest(number.device)).unsqueeze(0)
    wrong = not bool(((number >= 0) & (number < torch.inf)).all())
    rows, bad = meet("shared_denominator", number, int(wrong), group)
    if any(bad):
        at = [rank for rank, is_bad in enumerate(bad) if is_bad]
        raise ScorefnError(
            f"A count on rank(s) {at} is negative, NaN or infinite (the count of this rank is {count!r}): "
            "shared_denominator adds numbers of draws, steps or tokens."
        )
    total = summed(number, group).squeeze(0)
    if not bool((total > 0).all()):
        raise ScorefnError(
            "The counts of all ranks add up to 0, which nothing can be divided by: no draw, step or token is there."
        )
    return total / len(rows)


def sum_over_ranks(v: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """``sum_r v_r``, the same on every rank; for statistics of a whole batch. It carries no gradient.

    Args:
        v: of one shape and dtype on every rank.
        process_group: the ranks; None: all processes of the job.

    Raises:
        ScorefnError: shapes or dtypes that differ between ranks, or a dtype that is not added.
        LostRankError: another process ended or does not answer.

    Example:
        >>> import torch, torch.distributed as dist, scorefn as sf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> episodes = torch.tensor([5.0, 60.0])  # how many, and their summed returns
        >>> number, total = sf.scale.sum_over_ranks(episodes)
        >>> total / number  # the mean return over the episodes of all ranks
        tensor(12.)
        >>> dist.destroy_process_group()
    """
    group = World() if process_group is None else process_group
    _check_tensor("sum_over_ranks", v)
    meet("sum_over_ranks", v.unsqueeze(0), 0, group)
    return summed(v, group)


def gather_over_ranks(v: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """The rows of every rank one after the other, ``[N, ...] -> [sum_r N_r, ...]``, without gradient.

    Every rank sends its rows to all: for numbers as small as the returns of some episodes.

    Args:
        v: rows of one shape and dtype on every rank; their number may differ, and may be 0.
        process_group: the ranks; None: all processes of the job.

    Raises:
        ShapeError: no axis of rows.
        ScorefnError: rows of another shape or dtype on another rank, or a dtype that is not added.
        LostRankError: another process ended or does not answer.

    Example:
        >>> import torch, torch.distributed as dist, scorefn as sf
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> returns = torch.tensor([3.0, 20.0, 4.0])  # ranks may have more of them, or none
        >>> sf.scale.gather_over_ranks(returns).median()
        tensor(4.)
        >>> dist.destroy_process_group()
    """
    _check_tensor("gather_over_ranks", v)
    if v.ndim == 0:
        raise ShapeError("gather_over_ranks joins rows, but v has shape (): give v.unsqueeze(0) for one number.")
    return gathered("gather_over_ranks", v, World() if process_group is None else process_group)[0]


def _check_tensor(name: str, v: object) -> None:
    if not isinstance(v, Tensor):
        raise ScorefnError(f"{name} takes a tensor, but it was given {v!r}: wrap it by torch.tensor.")
