"""SiteRaoBlackwell: adaptive Rao-Blackwellisation with one coefficient for each site of a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scorefn.core import Draws, Total
from scorefn.reducers import AdaptiveRaoBlackwell

ENOUGH = 10  # degrees of freedom from which on a ratio of moments has light tails


class Columns(NamedTuple):
    """The columns of one site: its key (kind, name, shape), the first one, how many."""

    key: tuple[str, str, tuple[int, ...]]
    start: int
    size: int


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
        self._index: tuple[tuple[Columns, ...], torch.device, Tensor] | None = None

    def coefficient(self, site: str) -> float:
        """c of one site; 0 where it is not known."""
        if site not in self.rows or self.seen[row := self.rows[site]] < ENOUGH:
            return 0.0
        covariance, variance = self.moments[:, row].tolist()
        return -covariance / variance if variance > 0 else 0.0

    def of(self, columns: Sequence[Columns], device: torch.device) -> OfColumns:
        """The baseline of draws with these columns."""
        return OfColumns(self, self._rows_of(tuple(columns), device))

    def _rows_of(self, columns: tuple[Columns, ...], device: torch.device) -> Tensor:
        """The row of each column ``[K]``."""
        if self._index is None or self._index[:2] != (columns, device):
            names = [name for (_, name, _), _, _ in columns]
            for name in names:
                self.rows.setdefault(name, len(self.rows))
            missing = len(self.rows) - len(self.seen)
            self.moments = torch.nn.functional.pad(self.moments, (0, missing))
            self.seen = torch.nn.functional.pad(self.seen, (0, missing))
            rows = torch.tensor([self.rows[name] for name in names])
            sizes = torch.tensor([size for _, _, size in columns])
            self._index = columns, device, rows.repeat_interleave(sizes).to(device)
            self.moments = self.moments.to(device)
        return self._index[2]


class OfColumns:
    """The baseline of one estimate: a column's coefficient is its site's.

    Args:
        sites: what was learnt.
        index: ``[K]``, the row of each column.
    """

    unbiased = True

    def __init__(self, sites: SiteRaoBlackwell, index: Tensor) -> None:
        self.sites, self.index = sites, index
        self.inner = AdaptiveRaoBlackwell(sites.decay)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, K] -> [N, K]``."""
        known = self.sites.seen >= ENOUGH
        if bool(known.any()) and not isinstance(draws.credit, Total):
            used = torch.where(known.to(signal.device), self.sites.moments, 0.0)[:, self.index].to(signal)
            self.inner.covariance, self.inner.variance = used[0], used[1]
        return self.inner(signal, draws)

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Take in one batch: the mean over the elements of each site."""
        if isinstance(draws.credit, Total):
            return
        before = self.sites.moments[:, self.index].to(signal)
        self.inner.covariance, self.inner.variance = before[0], before[1]
        self.inner.update(signal, draws)
        after = torch.stack((self.inner.covariance, self.inner.variance)).to(self.sites.moments)
        total = torch.zeros_like(self.sites.moments).index_add_(1, self.index, after)
        count = torch.zeros_like(total[0]).index_add_(0, self.index, torch.ones_like(after[0]))
        self.sites.moments = torch.where(count > 0, total / count.clamp(min=1), self.sites.moments)
        if draws.mask is None:
            freedom = (count > 0).cpu() * (len(draws) - 1.0)
        else:
            present = (draws.mask.sum(0).to(total) - 1.0).clamp(min=0.0)
            freedom = (torch.zeros_like(count).index_add_(0, self.index, present) / count.clamp(min=1)).cpu()
        self.sites.seen = self.sites.seen + freedom
