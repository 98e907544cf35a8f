"""SiteRaoBlackwell: adaptive Rao-Blackwellisation with one coefficient for each site of a guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scorefn.core import Draws, LeaveOneOut, Total
from scorefn.reducers import AdaptiveRaoBlackwell
from scorefn.reducers.adaptive import batch_moments, controlled
from scorefn.reducers.baselines import check_moments

ENOUGH = 10  # degrees of freedom from which on a ratio of moments has light tails


class Columns(NamedTuple):
    """The columns of one site: its key (kind, name, shape), the first one, how many."""

    key: tuple[str, str, tuple[int, ...]]
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class _Index:
    """Where the columns of some draws stand in what was learnt.

    Args:
        columns: of the draws.
        row: ``[K]``, the row of each column.
        share: ``[rows]``, 1 over the number of columns of each row.
        visited: ``[rows]``, 1 for each row with a column, on the CPU.
    """

    columns: tuple[Columns, ...]
    row: Tensor
    share: Tensor
    visited: Tensor


class SiteRaoBlackwell:
    """``AdaptiveRaoBlackwell`` whose coefficients belong to sites, not to columns.

    With D_k the signal of decision k and N_k the sum of the values that it does not influence, every element of a site
    is charged with ``D_k + c N_k``, ``c = -sum_k Cov(D_k, N_k) / sum_k Var(N_k)`` over the site's elements, from past
    steps. So a ragged minibatch and a resampled plate are served by what their site has learnt, and a coefficient is
    known after few steps.

    What a coefficient is looked up by must be fixed before its decision is made, or ``E[c N score] = 0`` fails: a
    site's name is; the program that a draw went through is not, because its decisions chose it. Until ``ENOUGH``
    degrees of freedom were seen c is 0: a ratio of few moments has heavy tails.

    Args:
        decay: of the averages, in [0, 1).
    """

    unbiased = True

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = AdaptiveRaoBlackwell(decay).decay
        self.rows: dict[str, int] = {}
        self.moments = torch.zeros(2, 0, dtype=torch.float64)  # covariance of D and N, variance of N, of each site
        self.seen = torch.zeros(0)  # degrees of freedom, of each site
        self._index: _Index | None = None

    def coefficient(self, site: str) -> float:
        """c of one site; 0 where it is not known."""
        if site not in self.rows or self.seen[row := self.rows[site]] < ENOUGH:
            return 0.0
        covariance, variance = self.moments[:, row].tolist()
        return -covariance / variance if variance > 0 else 0.0

    def coefficients(self) -> Tensor | None:
        """c of every site, 0 where it is not known; None: of none."""
        if not bool((known := self.seen >= ENOUGH).any()):
            return None
        covariance, variance = self.moments
        return torch.where(known.to(variance.device) & (variance > 0), -covariance / variance, 0.0)

    def of(self, columns: Sequence[Columns], device: torch.device) -> OfColumns:
        """The baseline of draws with these columns."""
        columns = tuple(columns)
        if self._index is None or self._index.columns != columns or self._index.row.device != device:
            self._index = self._indexed(columns, device)
        return OfColumns(self, self._index)

    def _indexed(self, columns: tuple[Columns, ...], device: torch.device) -> _Index:
        names = [name for (_, name, _), _, _ in columns]
        for name in names:
            self.rows.setdefault(name, len(self.rows))
        missing = len(self.rows) - len(self.seen)
        self.moments = torch.nn.functional.pad(self.moments, (0, missing)).to(device)
        self.seen = torch.nn.functional.pad(self.seen, (0, missing))
        row = torch.tensor([self.rows[name] for name in names])
        row = row.repeat_interleave(torch.tensor([size for _, _, size in columns]))
        count = row.bincount(minlength=len(self.rows)).to(self.moments.dtype)
        return _Index(columns, row.to(device), (1 / count.clamp(min=1)).to(device), (count > 0).to(self.seen))


class OfColumns:
    """The baseline of one estimate: a column's coefficient is its site's.

    Args:
        sites: what was learnt.
        index: where these columns stand in it.
    """

    unbiased = True

    def __init__(self, sites: SiteRaoBlackwell, index: _Index) -> None:
        self.sites, self.index = sites, index

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, K] -> [N, K]``."""
        if isinstance(draws.credit, Total) or (by_row := self.sites.coefficients()) is None:
            return LeaveOneOut()(signal, draws)
        return controlled(by_row.to(signal.dtype).index_select(0, self.index.row), signal, draws)

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Take in one batch: the mean over the elements of each site."""
        if isinstance(draws.credit, Total):
            return
        found, present = batch_moments(signal, draws)
        before, row, share = self.sites.moments, self.index.row, self.index.share
        step = found.to(before.dtype) - before.index_select(1, row)
        if present is not None:
            step = torch.where(present, step, 0.0)
        total = torch.zeros_like(before).index_add_(1, row, step)
        after = before + total * share * (1.0 - self.sites.decay)
        check_moments("AdaptiveRaoBlackwell", after)
        self.sites.moments = after
        if draws.mask is None:
            freedom = self.index.visited * (len(draws) - 1)
        else:
            others = (draws.mask.sum(0).to(before) - 1.0).clamp(min=0.0)
            freedom = (torch.zeros_like(share).index_add_(0, row, others) * share).to(self.sites.seen)
        self.sites.seen = self.sites.seen + freedom
