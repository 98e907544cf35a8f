"""What one run of a program has sampled and paid so far, and on which sites each of them depends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.graph.checks import check_told
from scorefn.graph.dependencies import Kept, Layout, Programs, Source, Tracked, Unknown
from scorefn.graph.records import Cost, Site


class Block:
    """The record of one run.

    Args:
        source: where its dependencies are known from.
        sites: those sampled so far, which the source may look at.
    """

    def __init__(self, source: Source, sites: dict[str, Site]) -> None:
        self.source = source
        self.sites = sites
        self.costs = dict[str, Cost]()
        self._reached = dict[str, dict[str, None]]()  # of each site: on which its distribution depends
        self._charged = list[Collection[str] | None]()  # of each cost
        self._signature = list[Any]()
        self._layouts = list[tuple[Any, Layout]]()

    def named(self, name: str, given: str | Sequence[str] | None) -> tuple[str, ...] | None:
        """The sites that something is said to be given; None: nothing was said.

        Raises:
            ScorefnError: there is no such site.
        """
        if given is None:
            return None
        names = (given,) if isinstance(given, str) else tuple(given)
        if unknown := [other for other in names if other not in self.sites]:
            raise ScorefnError(
                f"{name!r} is said to be given {unknown[0]!r}, but there is no site of this name: the sites so far are "
                f"{list(self.sites)}. Correct the name or the order."
            )
        return names

    def behind_site(
        self, name: str, dist: Any, kind: Any, tensors: list[Tensor], lead: tuple[str, ...] | None, num_samples: int
    ) -> tuple[Collection[str], Collection[str]]:
        """Sites that lead the shape of a distribution, and sites on which it depends."""
        try:
            found, reached = self.source.site(name, tensors, kind)
        except Unknown:
            if lead is None:
                raise _unknown(name) from None
            return lead, list(self.sites)
        if lead is None and isinstance(self.source, Tracked):
            check_told(num_samples, name, dist, found, reached)
        return found, reached

    def behind_cost(
        self, name: str, value: Tensor, kind: Any, lead: tuple[str, ...] | None
    ) -> tuple[Collection[str], Collection[str] | None]:
        """The same for a cost; None: on which it depends is known at the end."""
        try:
            return self.source.cost(name, value, kind)
        except Unknown:
            if lead is None:
                raise _unknown(name) from None
            return lead, None

    def with_ancestors(self, reached: Collection[str], lead: tuple[str, ...] | None) -> dict[str, None]:
        """Ancestors are among those that were found already, but not among those that were given."""
        found = dict.fromkeys(reached)
        for name in lead or ():
            found |= {**self._reached[name], name: None}
        return found

    def add_site(
        self, site: Site, kind: Any, leader: str | None, axes: tuple[str, ...], reached: Collection[str], ancestors: Any
    ) -> None:
        """Write a site down."""
        self.sites[site.name] = site
        self._reached[site.name] = ancestors
        self._signature.append(kind)
        self._layouts.append((kind, Layout(leader, axes, frozenset(reached))))

    def add_cost(
        self, cost: Cost, kind: Any, leader: str | None, reached: Collection[str] | None, lead: tuple[str, ...] | None
    ) -> None:
        """Write a cost down; how it was computed is part of the program's signature."""
        grown = None if cost.value.grad_fn is None else type(cost.value.grad_fn).__name__
        self.costs[cost.name] = cost
        self._charged.append(None if reached is None else self.with_ancestors(reached, lead))
        self._signature.append((kind, grown))
        self._layouts.append((kind, Layout(leader, tuple(axis.site for axis in cost.path), frozenset(reached or ()))))

    def dependencies(self, programs: Programs) -> list[Collection[str]]:
        """Of each cost, from wherever they are known."""
        signature, charged = tuple(self._signature), list[Collection[str]]()
        kept = programs.known(signature) if isinstance(self.source, Kept) else None
        for place, (cost, found) in enumerate(zip(self.costs.values(), self._charged, strict=True)):
            if found is None:
                found = list(self.sites)[: cost.before] if kept is None else kept[place]
            charged.append({name: None for name in self.sites if name in found})
        if isinstance(self.source, Tracked):
            programs.learn(signature, self._layouts, charged, self.source.escaped)
        return charged


def _unknown(name: str) -> ScorefnError:
    return ScorefnError(
        f"This StochasticGraph was entered again and keeps the dependency map of its program, but {name!r} was "
        "not there before in this form, so that its layout is not known. Use another StochasticGraph for "
        f"another program, a new one for each run of a program that changes, or say given= for {name!r}."
    )
