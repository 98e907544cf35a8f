"""The parts an estimate uses when nothing is chosen: independent draws, total credit, leave-one-out.

They stand in the core because the core may import nothing else; ``scorefn.reducers`` shows them again
beside their relatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scorefn.core.errors import ScorefnError
from scorefn.core.process_groups import (
    ProcessGroup,
    by_rank,
    check_process_group,
    greet,
    refuse_misfits,
    shown,
    summed,
    widest,
)
from scorefn.core.protocols import Credit, Measure, PyTree

if TYPE_CHECKING:
    from scorefn.core.draws import Draws


@dataclass(frozen=True)
class Independent:
    """Independent draws: ``x_1, ..., x_N ~ p``, each its own block. The default coupling.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Normal(torch.zeros(3), 1.0)
        >>> x, block = sf.Independent().sample(p, 10)
        >>> x.shape, block
        (torch.Size([10, 3]), None)
    """

    unbiased = True

    def sample(self, p: Measure, num_samples: int) -> tuple[PyTree, Tensor | None]:
        """``p.sample((N,))`` and no block."""
        return p.sample(torch.Size((num_samples,))), None


@dataclass(frozen=True)
class Total(Credit):
    """Every value is charged to every decision: ``credit(v)_k = sum_j v_j``.

    REINFORCE with the full return (Williams, 1992). It has no size: the signal is ``[N, *B, 1]``.

    Example:
        >>> import torch, scorefn as sf
        >>> sf.Total()(torch.tensor([[1.0, 10.0, 100.0]]))  # the same for every decision
        tensor([[111.]])
    """

    def influence(self, v: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, 1]``."""
        return v if v.shape[-1] == 1 else v.sum(-1, keepdim=True)

    __call__ = influence

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, 1]``."""
        return self.influence(u)

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """All earlier decisions, so that a constant in f cancels at every order."""
        return torch.zeros_like(log_prob) if log_prob.shape[-1] == 1 else log_prob.cumsum(-1) - log_prob


@dataclass(frozen=True, repr=False)
class LeaveOneOut:
    """Mean signal of the other draws: ``b_i = mean of signal_j over j in i's group outside i's block``.

    Subtracting it gives the sample covariance of score and value, unbiased from two blocks on (RLOO:
    Kool, van Hoof & Welling, 2019, "Buy 4 REINFORCE samples, get a baseline for free!", eq. 5). Absent decisions
    (``mask``) do not enter the mean; a draw without valid others gets 0 and is counted by ``singletons``.

    With a process group the others are those of all its ranks: W ranks with N draws each get the baseline of one
    process with W N draws, by one all-reduce of sums and counts. One draw a rank is then enough. Equal labels of
    ``group`` on two ranks are one group; blocks never reach over ranks, whatever their labels. Ranks may differ in N,
    and in K where there is a mask (episodes of unequal length). All ranks have to call it, in the same order.

    Args:
        process_group: ``sf.scale.World()`` for all processes of the job, or a group that
            ``torch.distributed.new_group`` returned; None: this process alone, and ``torch.distributed`` is left alone.

    Raises:
        ScorefnError: all draws lie in one block, so that no other draw exists; with a process group also draws that do
            not fit between ranks, on every rank alike, and a ``torch.func`` transform.
        LostRankError: another process ended or does not answer.

    Example:
        >>> import torch, scorefn as sf
        >>> log_prob, fx = torch.zeros(3, 1, requires_grad=True), torch.tensor([3.0, 5.0, 10.0])
        >>> draws = sf.Draws(torch.arange(3), log_prob, fx[:, None])
        >>> sf.LeaveOneOut()(draws.signal(), draws).T  # (5 + 10)/2, (3 + 10)/2, (3 + 5)/2
        tensor([[7.5000, 6.5000, 4.0000]])
    """

    process_group: ProcessGroup | None = None

    unbiased = True

    def __post_init__(self) -> None:
        """Check the group."""
        if self.process_group is not None:
            check_process_group(self.process_group)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        blocks = draws.num_blocks if self.process_group is None else 2  # of all ranks: counted where they meet
        if blocks < 2:
            raise ScorefnError(
                f"LeaveOneOut needs two blocks of draws or more, but the {len(draws)} draw(s) form "
                f"{blocks}: there is no other draw to average. Raise num_samples, or use baseline=None."
            )
        if self.process_group is None and draws.mask is None and draws.block is None and draws.group is None:
            return (signal.sum(0) - signal) / (blocks - 1)
        valid = torch.ones_like(signal)
        if draws.mask is not None and draws.mask.shape == signal.shape:
            valid = draws.mask.to(signal)
            signal = torch.where(draws.mask, signal, 0.0)
        total, count = self._others(draws, signal, valid)
        return torch.where(count > 0.5, total / count.clamp(min=1.0), 0.0)

    def singletons(self, draws: Draws) -> int:
        """How many draws have no other in their group outside their block (their baseline is 0), here.

        With a process group the others of all ranks count, and all ranks have to ask.
        """
        one = torch.ones(len(draws), 1, device=draws.log_prob.device)
        counted = self._others(draws, one, one)[1]
        return int((counted < 0.5).sum())

    def __repr__(self) -> str:
        """``LeaveOneOut()``, with the process group where there is one."""
        return shown(self)

    def _others(self, draws: Draws, signal: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Both summed, for each draw, over the draws of its group outside its block: ``[N, ...]`` each."""
        group, block = (
            None if i is None else torch.unique(i, return_inverse=True)[1] for i in (draws.group, draws.block)
        )
        cell = block  # the draws of the same group and block
        if group is not None and block is not None:
            cell = torch.unique(group * len(draws) + block, return_inverse=True)[1]

        def others(everybody: Tensor, v: Tensor) -> Tensor:
            return everybody - (v if cell is None else _sum_by(v, cell)[cell])

        if self.process_group is None:
            return others(_everybody(signal, group), signal), others(_everybody(valid, group), valid)
        total, count = _over_ranks(self.process_group, draws, signal, valid)
        return others(total, signal), others(count, valid)


def _everybody(v: Tensor, group: Tensor | None) -> Tensor:
    """Sum of v ``[N, ...]`` over the group of each draw; over all where there are no groups."""
    return v.sum(0) if group is None else _sum_by(v, group)[group]


def _sum_by(v: Tensor, index: Tensor, size: int | None = None) -> Tensor:
    """Sums of v ``[N, ...]`` by index ``[N]``, ``[size, ...]``; size N, which is enough for 0, 1, ..., where None."""
    return v.new_zeros((len(v) if size is None else size, *v.shape[1:])).index_add(0, index, v)


def _over_ranks(process_group: ProcessGroup, draws: Draws, signal: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Signals and valid ones of all ranks, summed over the group of each draw: ``[N, ...]`` or ``[...]`` each."""
    signal, kind = signal.detach(), "LeaveOneOut"
    labels = None if draws.group is None else torch.unique(draws.group).long()
    masked = int(draws.mask is not None and draws.mask.shape == signal.shape)
    shape = signal.shape[1:]
    mine = [draws.num_blocks, -1 if labels is None else len(labels), masked, shape[-1], *shape[:-1]][:14]
    table = greet(kind, [*mine, *[0] * (14 - len(mine))], signal, process_group)
    blocks = sum(row[0] for row in table)
    if blocks < 2:
        raise ScorefnError(
            f"LeaveOneOut needs two blocks of draws or more, but the {len(draws)} draw(s) of {len(table)} process(es) "
            f"form {blocks}: there is no other draw to average. Raise num_samples, or use baseline=None."
        )
    problems = [tuple(size for size in row[4:] if size) for row in table]
    refuse_misfits(kind, "the batch shape [*B]", problems, "Give every rank the same problems.")
    grouped = ["groups" if row[1] >= 0 else "no groups" for row in table]
    refuse_misfits(kind, "whether draws.group is given", grouped, "Label the draws of every rank, or of none.")
    widths = [row[3] for row in table]
    if not all(row[2] for row in table):
        repair = "Only masked decisions may differ in number: pad to one K with a mask, or sum the values of each draw."
        refuse_misfits(kind, "the number of decisions K", widths, repair)
    index, size = None, 1
    if labels is not None:
        most = max(row[1] for row in table)
        found = by_rank(torch.cat([labels, labels.new_zeros(most - len(labels))]), process_group)
        known = torch.unique(torch.cat([row[: counted[1]] for row, counted in zip(found, table, strict=True)]))
        index, size = torch.searchsorted(known, draws.group.long()), len(known)  # type: ignore[union-attr]
    sums = torch.stack([v.sum(0, keepdim=True) if index is None else _sum_by(v, index, size) for v in (signal, valid)])
    padded = torch.nn.functional.pad(sums.to(widest(sums.device)), (0, max(widths) - shape[-1]))
    everybody = summed(padded, process_group)[..., : shape[-1]].to(signal.dtype)
    if index is not None:
        everybody = everybody[:, index]
    return everybody[0], everybody[1]
