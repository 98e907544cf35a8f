"""Who is charged with what in a graph: the tracked map as a credit, and a baseline for each site."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Baseline, Credit, Draws, LeaveOneOut, ShapeError, Total, is_stateful
from scorefn.core.surrogate import read
from scorefn.graph.records import Path, shared, sizes, width


@dataclass(frozen=True, eq=False)
class GraphCredit(Credit):
    """``credit(v)_k = sum_j mask[k, j] v_j``: each cost is charged to the draws on which it depends.

    Sources: Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation graphs",
    theorem 1.

    Args:
        mask: ``[K, J]`` of numbers 0 and 1.
    """

    mask: Tensor

    def check(self, decisions: int, values: int) -> None:
        """The mask must be ``[K, J]``."""
        if self.mask.shape != (decisions, values):
            raise ShapeError(
                f"{self!r} met {decisions} decisions and {values} values: it belongs to the draws it came with."
            )

    def __repr__(self) -> str:
        """Short, for messages."""
        return f"GraphCredit({len(self.mask)} decisions, {self.mask.shape[1]} values)"

    def influence(self, v: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, K]``."""
        return v @ self.mask.to(v).T

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, J]``."""
        return u @ self.mask.to(u)

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Decisions whose influence strictly contains k's, and earlier ones with the same influence."""
        mask = self.mask.to(log_prob)
        contains = (mask @ mask.T) == mask.sum(1)  # [i, k]: i influences every value that k does
        earlier = torch.ones_like(contains).triu(1)
        return log_prob @ (contains & (~contains.T | earlier)).to(log_prob)


def block(site: Path, cost: Path) -> Tensor:
    """Which draws of a site a cost depends on, ``[prod(site), prod(cost)]``: those it shares its axes with."""
    common = shared(site, cost)
    return torch.kron(torch.eye(width(site[:common])), torch.ones(width(site[common:]), width(cost[common:])))


@dataclass(frozen=True)
class Siblings:
    """Leave-one-out along one axis of a site's draws: among those given the same parents.

    ``b_m = mean of signal_m' over m' != m``. Unbiased, because given its parents a draw is independent of its siblings
    and of what is charged to them.

    Args:
        path: the axes of the site.
        place: which of them.
    """

    path: Path
    place: int
    unbiased = True

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``, K the draws of the site."""
        apart = signal.unflatten(-1, sizes(self.path))
        dim = self.place - len(self.path)
        others = apart.sum(dim, keepdim=True) - apart
        mean: Tensor = others / (apart.shape[dim] - 1)
        return mean.flatten(-len(self.path))


class SiteBaselines:
    """Each site's own baseline, at its own decisions, and zero elsewhere.

    A baseline that several sites share sees their decisions together.

    Args:
        parts: first decision, number of decisions and baseline of each site.
    """

    def __init__(self, parts: Sequence[tuple[int, int, Baseline]]) -> None:
        groups = dict[Any, tuple[Baseline, list[int]]]()
        for start, size, baseline in parts:
            key = baseline if type(baseline) is LeaveOneOut else id(baseline)
            groups.setdefault(key, (baseline, []))[1].extend(range(start, start + size))
        self._groups = tuple((baseline, _place(at)) for baseline, at in groups.values())

    @property
    def unbiased(self) -> bool:
        """Whether all of them are."""
        return all(baseline.unbiased for baseline, _ in self._groups)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        whole = torch.zeros_like(draws.log_prob)
        for baseline, at in self._groups:
            own, part = self._part(signal, draws, at)
            whole[..., at] = read(baseline, own, part).expand(own.shape)
        return whole

    def _part(self, signal: Tensor, draws: Draws, at: slice | list[int]) -> tuple[Tensor, Draws]:
        """What one baseline sees: the decisions of its own sites."""
        signal = signal.expand(draws.log_prob.shape)
        part = copy.copy(draws)  # nothing that was checked changes
        object.__setattr__(part, "log_prob", draws.log_prob[..., at])
        if isinstance(draws.credit, GraphCredit):
            object.__setattr__(part, "credit", GraphCredit(draws.credit.mask[at]))
        part.__dict__.pop("uninfluenced", None)
        return signal[..., at], part


def _place(at: list[int]) -> slice | list[int]:
    """A slice where the columns follow each other."""
    return slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else at


class LearningBaselines(SiteBaselines):
    """The same, where one of them learns."""

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Update those that learn, each with its own decisions."""
        for baseline, at in self._groups:
            if is_stateful(baseline):
                baseline.update(*self._part(signal, draws, at))


def together(parts: Sequence[tuple[int, int, Baseline]], decisions: int) -> Baseline | None:
    """One baseline for all decisions; None where no site has one."""
    if not parts:
        return None
    first = parts[0][2]
    if sum(size for _, size, _ in parts) == decisions and all(
        other is first or (type(other) is LeaveOneOut and other == first) for _, _, other in parts
    ):
        return first
    kind = LearningBaselines if any(is_stateful(baseline) for _, _, baseline in parts) else SiteBaselines
    return kind(parts)


def credit(mask: Tensor) -> Credit:
    """Total where everything depends on everything, which costs less."""
    return Total() if bool(mask.all()) else GraphCredit(mask)
