"""The parts an estimate uses when nothing is chosen: independent draws, total credit, leave-one-out.

They stand in the core because the core may import nothing else; ``scorefn.reducers`` shows them again
beside their relatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scorefn.core.errors import ScorefnError
from scorefn.core.protocols import Credit, Measure, PyTree

if TYPE_CHECKING:
    from scorefn.core.draws import Draws


@dataclass(frozen=True)
class Independent:
    """Independent draws: ``x_1, ..., x_N ~ p``, each its own block. The default coupling."""

    unbiased = True

    def sample(self, p: Measure, num_samples: int) -> tuple[PyTree, Tensor | None]:
        """``p.sample((N,))`` and no block."""
        return p.sample(torch.Size((num_samples,))), None


@dataclass(frozen=True)
class Total(Credit):
    """Every value is charged to every decision: ``credit(v)_k = sum_j v_j``.

    REINFORCE with the full return (Williams, 1992). It has no size: the signal is ``[N, *B, 1]``.
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


@dataclass(frozen=True)
class LeaveOneOut:
    """Mean signal of the other draws: ``b_i = mean of signal_j over j in i's group outside i's block``.

    Subtracting it gives the sample covariance of score and value, unbiased from two blocks on (RLOO:
    Kool, van Hoof & Welling, 2019, "Buy 4 REINFORCE samples, get a baseline for free!", eq. 5). Absent decisions
    (``mask``) do not enter the mean; a draw without valid others gets 0 and is counted by ``singletons``.

    Raises:
        ScorefnError: all draws lie in one block, so that no other draw exists.
    """

    unbiased = True

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        blocks = draws.num_blocks
        if blocks < 2:
            raise ScorefnError(
                f"LeaveOneOut needs two blocks of draws or more, but the {len(draws)} draw(s) form "
                f"{blocks}: there is no other draw to average. Raise num_samples, or use baseline=None."
            )
        if draws.mask is None and draws.block is None and draws.group is None:
            return (signal.sum(0) - signal) / (blocks - 1)
        valid = torch.ones_like(signal)
        if draws.mask is not None and draws.mask.shape == signal.shape:
            valid = draws.mask.to(signal)
            signal = torch.where(draws.mask, signal, 0.0)
        others = _others(draws)
        count = others(valid)
        return torch.where(count > 0.5, others(signal) / count.clamp(min=1.0), 0.0)

    def singletons(self, draws: Draws) -> int:
        """How many draws have no other in their group outside their block (their baseline is 0)."""
        counted = _others(draws)(torch.ones(len(draws), 1, device=draws.log_prob.device))
        return int((counted < 0.5).sum())


def _others(draws: Draws) -> Callable[[Tensor], Tensor]:
    """What sums v ``[N, ...]``, for each draw, over the draws of its group outside its block."""
    group, block = (None if i is None else torch.unique(i, return_inverse=True)[1] for i in (draws.group, draws.block))
    cell = block  # the draws of the same group and block
    if group is not None and block is not None:
        cell = torch.unique(group * len(draws) + block, return_inverse=True)[1]

    def others(v: Tensor) -> Tensor:
        everybody = v.sum(0) if group is None else _sum_by(v, group)
        return everybody - (v if cell is None else _sum_by(v, cell))

    return others


def _sum_by(v: Tensor, index: Tensor) -> Tensor:
    """Each draw receives the sum of v over the draws with its index; index ``[N]`` in 0..N-1."""
    return torch.zeros_like(v).index_add(0, index, v)[index]
