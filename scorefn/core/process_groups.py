"""Sums over the processes of a ``torch.distributed`` group: what makes a batch that is split over ranks one batch.

One collective does everything, ``all_reduce``, which every backend has for tensors on any of its devices. Before sums
are added, each rank says in sixteen integers what it is about to add: where that does not fit, every rank refuses, and
none waits for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from scorefn.core.checks import no_part
from scorefn.core.errors import LostRankError, ScorefnError
from scorefn.core.protocols import in_transform


@dataclass(frozen=True)
class World:
    """All processes of the job: the default group of ``torch.distributed``, looked up when it is used.

    So it can be written down before ``init_process_group``, copied and pickled, which a group itself cannot.

    Example:
        >>> import pickle, scorefn as sf
        >>> everybody = sf.LeaveOneOut(process_group=sf.scale.World())  # before any process runs
        >>> pickle.loads(pickle.dumps(everybody)) == everybody
        True
    """


ProcessGroup: TypeAlias = Any
"""``World()``, or a group that ``torch.distributed.new_group`` returned."""

_WORDS = 16  # integers of a greeting
_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


def check_process_group(process_group: ProcessGroup) -> None:
    """Refuse what is neither a group nor the noun for the default one."""
    if isinstance(process_group, World) or (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        return
    if isinstance(process_group, int):
        raise ScorefnError(
            "process_group is what torch.distributed.new_group returns to a process that is no member of the group: "
            "it has no part in that group's sums. Leave process_group out on this rank, or use World()."
        )
    use = "use World() for all processes, a group from torch.distributed.new_group(ranks), or None for this one alone."
    raise no_part("process_group", process_group, use)


def rank_and_size(process_group: ProcessGroup) -> tuple[int, int]:
    """This process's number in the group, and how many there are.

    Raises:
        ScorefnError: no group, one that this process is no member of, or torch.distributed was not started.
    """
    check_process_group(process_group)
    if not (dist.is_available() and dist.is_initialized()):
        raise ScorefnError(
            f"process_group={process_group!r} was given, but torch.distributed has not been started: start the program "
            'with torchrun and call torch.distributed.init_process_group("gloo") (or "nccl") first, or leave '
            "process_group out."
        )
    group = _group(process_group)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ScorefnError(
            f"This process, rank {dist.get_rank()} of the job, is no member of process_group: use the group on its "
            "members only."
        )
    return rank, dist.get_world_size(group)


def summed(v: Tensor, process_group: ProcessGroup) -> Tensor:
    """Sum over ranks of v, which has one shape and dtype everywhere; v itself is left alone.

    Raises:
        LostRankError: another process ended, or did not answer within the group's timeout.
    """
    total = v.detach().clone(memory_format=torch.contiguous_format)
    try:
        dist.all_reduce(total, group=_group(process_group))
    except RuntimeError as error:
        told = " ".join(str(error).split())[:200]
        raise LostRankError(
            f"Rank {dist.get_rank()} could not add to the others ({type(error).__name__}: {told}): another process "
            "ended, or did not answer within the group's timeout. No sum over the batch exists without it: this call "
            "changed nothing, and the job cannot go on. Start it again from its last checkpoint."
        ) from error
    return total


def by_rank(v: Tensor, process_group: ProcessGroup) -> Tensor:
    """v of every rank ``[W, ...]``, in their order: a sum to which each adds its own row."""
    rank, size = rank_and_size(process_group)
    table = v.new_zeros((size, *v.shape))
    table[rank] = v.detach()
    return summed(table, process_group)


def greet(kind: str, numbers: Sequence[int], like: Tensor, process_group: ProcessGroup) -> list[list[int]]:
    """The numbers of every rank, ``[W][...]``: what each is about to add.

    Args:
        kind: what the sums are for, as a user calls it.
        numbers: at most fourteen.
        like: on its device the numbers travel.
        process_group: the ranks.

    Raises:
        ScorefnError: ranks that are about to add different things; inside a ``torch.func`` transform.
        LostRankError: as ``summed``.
    """
    if in_transform():
        raise ScorefnError(
            f"{kind} with a process_group adds over processes, which a torch.func transform or torch.compile cannot "
            "trace: leave process_group out there."
        )
    row = torch.zeros(_WORDS, dtype=torch.int64)
    row[: len(numbers) + 2] = torch.tensor([crc32(kind.encode()), len(numbers), *numbers])
    table = by_rank(row.to(like.device), process_group).tolist()
    if any(other[:2] != table[0][:2] for other in table):
        odd = [rank for rank, other in enumerate(table) if other[:2] != row[:2].tolist()]
        raise ScorefnError(
            f"This rank is about to add what {kind} needs, but rank(s) {odd} something else: every process of "
            "the group has to make the same calls in the same order. Look for a branch that only some of them take."
        )
    return [other[2 : 2 + len(numbers)] for other in table]


def refuse_misfits(kind: str, what: str, found: Sequence[Any], repair: str) -> None:
    """Refuse numbers or shapes that differ between ranks, alike on all of them."""
    if any(one != found[0] for one in found):
        told = ", ".join(f"{one} on rank {rank}" for rank, one in enumerate(found[:8]))
        raise ScorefnError(f"{kind} adds over processes, but {what} differs between them: {told}. {repair}")


def meet(kind: str, v: Tensor, flag: int, process_group: ProcessGroup) -> tuple[list[int], list[int]]:
    """How many rows v ``[N, ...]`` has on each rank, and the flag of each; all refuse where rows do not fit."""
    if v.dtype not in _DTYPES:
        raise ScorefnError(
            f"{kind} was given {v.dtype}, which cannot be added over processes: convert it, for instance to "
            "torch.int64 or torch.float64."
        )
    sizes = list(v.shape[1:])[:10]
    table = greet(kind, [len(v), flag, _DTYPES.index(v.dtype), *sizes, *[0] * (10 - len(sizes))], v, process_group)
    shapes = [tuple(size for size in row[3:] if size) for row in table]
    refuse_misfits(kind, "the shape of one row", shapes, "Give every rank the same, summed or padded.")
    refuse_misfits(kind, "the dtype", [_DTYPES[row[2]] for row in table], "Convert them to one.")
    return [row[0] for row in table], [row[1] for row in table]


def gathered(kind: str, v: Tensor, process_group: ProcessGroup) -> tuple[Tensor, slice]:
    """The rows of v ``[N, ...]`` of all ranks in their order, N their own, and where those of this rank stand."""
    v = v.detach()
    numbers, _ = meet(kind, v, 0, process_group)
    rank, _ = rank_and_size(process_group)
    first = sum(numbers[:rank])
    everybody = v.new_zeros((sum(numbers), *v.shape[1:]))
    everybody[first : first + len(v)] = v
    return summed(everybody, process_group), slice(first, first + len(v))


def merged_moments(count: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean, and sum of squares about that mean, of all ranks' values together, from those of each ``[W, ...]``.

    Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances". A rank
    without values has a count of 0.
    """
    total = count.sum(0)
    origin = mean[0]
    whole = origin + ((count / total.clamp(min=1)) * (mean - origin)).sum(0)
    return total, whole, square.sum(0) + (count * (mean - whole).square()).sum(0)


def widest(device: torch.device) -> torch.dtype:
    """The dtype that sums travel in: counts stay whole numbers, and the order of ranks hardly matters."""
    return torch.float32 if device.type == "mps" else torch.float64


def shown(part: object) -> str:
    """A part with its process group only where it has one."""
    group = part.process_group  # type: ignore[attr-defined]
    return f"{type(part).__name__}({'' if group is None else f'process_group={group!r}'})"


def _group(process_group: ProcessGroup) -> Any:
    return None if isinstance(process_group, World) else process_group
