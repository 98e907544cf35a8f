"""Where a graph knows its dependencies from: tracking, what was kept of an earlier run, or the user."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.warnings import DependencyWarning, warn
from scorefn.graph.records import Site
from scorefn.tracking import Tracking

_SOON = 16  # runs from the first one to the next that is tracked; then twice as many each time, up to audit_every


class Layout(NamedTuple):
    """What a shape leads with, and all sites on which it may depend.

    Args:
        leader: the site whose draws it leads with; None: it has none.
        axes: sites of the axes after N.
        reached: names of sites.
    """

    leader: str | None
    axes: tuple[str, ...]
    reached: frozenset[str]

    def differs(self, other: Layout) -> bool:
        """Whether the two are shapes of another form."""
        return self.axes != other.axes or (self.leader is None) != (other.leader is None)


class Unknown(Exception):
    """It cannot be told on which sites something depends."""


class Source(Protocol):
    """Tells on which sites a distribution or a cost depends; names in, names out, ancestors included."""

    def open(self) -> None:
        """The block begins."""

    def close(self) -> None:
        """The block ends."""

    def site(self, name: str, tensors: list[Tensor], kind: Any) -> tuple[Collection[str], Collection[str]]:
        """Sites whose draws lead the shape of a distribution's parameters, and all on which it may depend."""

    def drawn(self, name: str, value: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Collection[str]]:
        """The value to go on with, and the sites that are seen in it."""

    def cost(self, name: str, value: Tensor, kind: Any) -> tuple[Collection[str], Collection[str] | None]:
        """The same for a cost; None: its dependencies are known at the end, from the whole program."""


class Tracked:
    """By taint: see ``scorefn.tracking``."""

    def __init__(self) -> None:
        self._tracking = Tracking()

    @property
    def escaped(self) -> bool:
        """Whether a value left the tensor graph, so that Python may go another way at the next values."""
        return bool(self._tracking.escapes)

    def checking(self) -> AbstractContextManager[None]:
        """A block in which values are read only to raise an error."""
        return self._tracking.checking()

    def open(self) -> None:
        """Enter the tracking."""
        self._tracking.__enter__()

    def close(self) -> None:
        """Leave it."""
        self._tracking.__exit__(None, None, None)

    def site(self, name: str, tensors: list[Tensor], kind: Any) -> tuple[Collection[str], Collection[str]]:
        """What the parameters carry, and what has escaped."""
        return self._ordered(self._tracking.carried(tensors)), self._tracking.dependencies(tensors)

    def drawn(self, name: str, value: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Collection[str]]:
        """A tracked copy."""
        carried = self._tracking.carried(value)
        return self._tracking.decision(name, value, given=tensors), carried

    def cost(self, name: str, value: Tensor, kind: Any) -> tuple[Collection[str], Collection[str] | None]:
        """What the value carries, and what has escaped."""
        return self._ordered(self._tracking.carried(value)), self._tracking.dependencies(value)

    def _ordered(self, names: Collection[str]) -> list[str]:
        return [name for name in self._tracking.decisions if name in names]


class Declared:
    """By the user, who names what each site and cost is computed from."""

    escaped = False

    def __init__(self, parents: Mapping[str, Sequence[str]]) -> None:
        self._parents = parents
        self._ancestors = dict[str, dict[str, None]]()

    def open(self) -> None:
        """Nothing is watched."""

    def close(self) -> None:
        """Nothing was watched."""

    def site(self, name: str, tensors: list[Tensor], kind: Any) -> tuple[Collection[str], Collection[str]]:
        """What was declared, and the ancestors."""
        found = self._closure(name)
        self._ancestors[name] = {**found, name: None}
        return found, found

    def drawn(self, name: str, value: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Collection[str]]:
        """As it is."""
        return value, ()

    def cost(self, name: str, value: Tensor, kind: Any) -> tuple[Collection[str], Collection[str] | None]:
        """What was declared, and the ancestors."""
        found = self._closure(name)
        return found, found

    def _closure(self, name: str) -> dict[str, None]:
        found = dict[str, None]()
        for parent in self._parents.get(name, ()):
            if parent not in self._ancestors:
                raise ScorefnError(
                    f"dependencies= says that {name!r} depends on {parent!r}, which was not sampled before it: the "
                    f"sites so far are {list(self._ancestors)}. Correct the name or the order."
                )
            found.update(self._ancestors[parent])
        return found


class Kept:
    """From earlier runs of the same program, which are compared with this one site by site."""

    escaped = False

    def __init__(self, programs: Programs, sites: Mapping[str, Site]) -> None:
        self._programs = programs
        self._sites = sites  # of this run

    def open(self) -> None:
        """Nothing is watched."""

    def close(self) -> None:
        """Nothing was watched."""

    def site(self, name: str, tensors: list[Tensor], kind: Any) -> tuple[Collection[str], Collection[str]]:
        """As it was."""
        return self._look_up(kind)

    def drawn(self, name: str, value: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Collection[str]]:
        """As it is."""
        return value, ()

    def cost(self, name: str, value: Tensor, kind: Any) -> tuple[Collection[str], Collection[str] | None]:
        """As it was; its dependencies are known when the whole program is."""
        return self._look_up(kind)[0], None

    def _look_up(self, kind: Any) -> tuple[Collection[str], Collection[str]]:
        if (layout := self._programs.layouts.get(kind)) is None:
            raise Unknown
        reached = [name for name in self._sites if name in layout.reached]
        if layout.leader is None:
            return (), reached
        if layout.leader in self._sites:
            return (layout.leader,), reached
        for site in self._sites.values():  # of another program: any that lies along the same axes
            if tuple(axis.site for axis in site.path) == layout.axes:
                return (site.name,), reached
        raise Unknown


class Programs:
    """The dependency maps of a graph that is entered again and again; none is kept where ``audit_every`` is None.

    A map belongs to a signature: names, families and numbers of dimensions of all sites and costs, in their order. It
    is kept where no value left the tensor graph, so that only the state of Python can make the program another; it is
    tracked anew after 16, 32, 64, ... runs, at last every ``audit_every``, and where it had missed something it is
    never kept again.
    """

    def __init__(self, audit_every: int | None) -> None:
        self.layouts = dict[Any, Layout]()
        self._maps = dict[Any, tuple[frozenset[str], ...]]()
        self.audit_every = audit_every
        self._longest, self._static = audit_every or 1, audit_every is not None
        self._run, self._next, self._gap = 0, 1, _SOON

    def source(self, sites: Mapping[str, Site]) -> Tracked | Kept:
        """For the run that begins; its sites are added as they are sampled."""
        self._run += 1
        if self._static and self._run < self._next and self._maps:
            return Kept(self, sites)
        return Tracked()

    def learn(
        self,
        signature: tuple[Any, ...],
        layouts: Sequence[tuple[Any, Layout]],
        found: Sequence[Collection[str]],
        escaped: bool,
    ) -> None:
        """Take in what a tracked run has shown."""
        if not self._static:
            return
        reached = tuple(map(frozenset, found))
        known = self._maps.get(signature)
        if known is not None and not all(new <= old for new, old in zip(reached, known, strict=True)):
            self._forget()
            warn(
                "A graph that was entered again was tracked anew, and a cost depends on a site that it did not depend "
                "on before, with the same sites and costs as before: earlier gradients may have been biased. The "
                "program changes with something that its signature does not show (a warm-up, a gate on a parameter). "
                "It is tracked in every run from here on; make a new StochasticGraph where the program changes.",
                DependencyWarning,
            )
            return
        if escaped or any(new.differs(self.layouts.get(kind, new)) for kind, new in layouts):
            self._forget()
            return
        for kind, new in layouts:
            old = self.layouts.get(kind)
            self.layouts[kind] = new if old is None else new._replace(reached=new.reached | old.reached)
        self._maps[signature] = reached if known is None else tuple(a | b for a, b in zip(reached, known, strict=True))
        self._next = self._run + min(self._gap, self._longest)
        self._gap = min(2 * self._gap, self._longest)

    def known(self, signature: tuple[Any, ...]) -> tuple[frozenset[str], ...] | None:
        """The map of a program; None: it was never tracked, so the next run will be."""
        found = self._maps.get(signature)
        if found is None and torch.is_grad_enabled():
            self._next = self._run
        return found

    def _forget(self) -> None:
        self._static = False
        self.layouts.clear()
        self._maps.clear()
