"""What a graph writes down while its block runs: sites, costs, and the axes that their draws lie along."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from scorefn.core import Baseline, ScorefnError, ShapeError


@dataclass(frozen=True, eq=False)
class Axis:
    """The draws of one site given the same parents: an axis after N.

    Args:
        site: whose draws.
        size: M, how many.
        weights: ``[N, *axes before, M, *B']`` of coupled draws, B' a leading part of B; None: 1 / M each.
    """

    site: str
    size: int
    weights: Tensor | None = None
    coupled: bool = False


Path: TypeAlias = tuple[Axis, ...]
"""The axes between N and B, outermost first."""


@dataclass(eq=False)
class Site:
    """One site: ``value [N, *axes, *batch, *event]``.

    Args:
        name: its own.
        dist: whose draws they are.
        raw: as they came from dist, with an axis of the site's own in front where there are parents.
        value: what the user was given.
        path: axes of the value, its own last.
        led: whether dist has a distribution for each draw of a parent.
        own: whether the site has an axis of its own.
        baseline: the site's.
        estimator: of coupled draws, or None.
        pathwise: whether the gradient goes through the value.
    """

    name: str
    dist: Any
    raw: Any
    value: Tensor
    path: Path
    led: bool
    own: bool
    baseline: Baseline | str | None
    estimator: Any
    pathwise: bool

    def __post_init__(self) -> None:
        """Remember how often the value was changed so far."""
        self._version = version(self.value)
        self._log_prob: Tensor | None = None

    @property
    def scored(self) -> bool:
        """Whether its gradient comes by its score."""
        return self.estimator is None and not self.pathwise

    @property
    def log_prob(self) -> Tensor:
        """``[N, *axes, *batch]``, made once."""
        if self._log_prob is None:
            if version(self.value) != self._version:
                raise ScorefnError(
                    f"The draws of site {self.name!r} were changed in place after they were sampled, so that their "
                    "log-probability is not that of what the costs saw. Work on a copy, z.clone()."
                )
            if self.estimator is not None and not self.led:
                log_prob = torch.stack([self.dist.log_prob(x) for x in self.raw])
            else:
                log_prob = self.dist.log_prob(self.raw)
                if self.own and self.led:
                    log_prob = log_prob.movedim(0, len(self.path))
            if (
                not isinstance(log_prob, Tensor)
                or log_prob.shape[: len(self.path) + 1] != self.value.shape[: len(self.path) + 1]
            ):
                found = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
                raise ShapeError(
                    f"The log_prob of site {self.name!r} is {found} for draws of shape {tuple(self.value.shape)}: it "
                    "must lead with the axes of the draws, summing over event dimensions only."
                )
            self._log_prob = log_prob
        return self._log_prob


@dataclass(eq=False)
class Cost:
    """One cost: ``value [N, *axes, *B]``.

    Args:
        name: its own.
        value: as given.
        path: its axes.
        before: how many sites came before it.
    """

    name: str
    value: Tensor
    path: Path
    before: int

    def __post_init__(self) -> None:
        """Remember how often the value was changed so far."""
        self._version = version(self.value)

    @property
    def batch(self) -> torch.Size:
        """``*B``."""
        return self.value.shape[len(self.path) + 1 :]

    def read(self) -> Tensor:
        """The value, unless it was changed since."""
        if version(self.value) != self._version:
            raise ScorefnError(
                f"The cost {self.name!r} was changed in place after it was registered. Register what it became, or "
                "change a copy: g.cost(..., value.clone())."
            )
        return self.value


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def sizes(path: Path) -> tuple[int, ...]:
    """Of the axes."""
    return tuple([axis.size for axis in path]) if path else ()


def place(path: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the axes, which tell one place among the draws from another."""
    return tuple([(axis.site, axis.size) for axis in path]) if path else ()


def shared(first: Path, second: Path) -> int:
    """How many leading axes two paths have in common."""
    count = 0
    for mine, other in zip(first, second, strict=False):
        if mine is not other:
            break
        count += 1
    return count


def weighted(value: Tensor, path: Path, start: int, ndim: int) -> Tensor:
    """``value [N, *path, *B]`` times the weights of its axes from a place on; B has ndim dimensions."""
    equal = 1
    for place, axis in enumerate(path[start:], start + 1):
        if axis.weights is None:
            equal *= axis.size
            continue
        weights = axis.weights
        of_batch = weights.ndim - place - 1
        if of_batch > ndim:
            raise ShapeError(
                f"The estimator of site {axis.site!r} weighs its draws for problems of shape "
                f"{tuple(weights.shape[place + 1 :])}, but the costs have fewer batch dimensions. Declare what is "
                "drawn jointly by Independent(p, ...)."
            )
        shape = (*weights.shape[: place + 1], *[1] * (len(path) - place), *weights.shape[place + 1 :])
        value = value * weights.reshape(*shape, *[1] * (ndim - of_batch))
    return value if equal == 1 else value / equal


def columns(value: Tensor, path: Path) -> Tensor:
    """``[N, *path, *B] -> [N, *B, prod(path)]``."""
    if not path:
        return value.unsqueeze(-1)
    return value.flatten(1, len(path)).movedim(1, -1)


def width(path: Path) -> int:
    """How many columns an entry with these axes has."""
    return math.prod(sizes(path)) if path else 1


def deepest(what: str, names: Collection[str], sites: Mapping[str, Site]) -> str | None:
    """The site whose axes contain those of all others; None for no site.

    Raises:
        ScorefnError: two sites have axes of their own beside each other.
    """
    if len(names) < 2:
        return next(iter(names), None)
    found: str | None = None
    for name in names:
        if found is None or len(sites[name].path) > len(sites[found].path):
            found = name
    if found is not None:
        whole = sites[found].path
        for name in names:
            path = sites[name].path
            if shared(path, whole) < len(path):
                raise ScorefnError(
                    f"{what} depends on the sites {path[-1].site!r} and {whole[-1].site!r}, whose draws lie along "
                    "axes of their own beside each other, so that no shape holds both. Sample one of them for each "
                    "draw of the other: let its distribution have the other's axis in its batch shape, and leave its "
                    "num_samples out."
                )
    return found


def parameters(part: Any) -> list[Tensor]:
    """The tensors that a distribution holds, at any depth."""
    found, seen = list[Tensor](), set[int]()
    _collect(part, found, seen)
    return found


def _collect(part: Any, found: list[Tensor], seen: set[int]) -> None:
    if isinstance(part, Tensor):
        found.append(part)
        return
    if isinstance(part, list | tuple):
        values: Iterable[Any] = part
    elif isinstance(part, Mapping):
        values = part.values()
    elif isinstance(part, nn.Module):
        values = [*part.parameters(), *part.buffers()]
    elif isinstance(part, Distribution | Transform) or (not seen and hasattr(part, "__dict__")):
        values = vars(part).values()
    elif isinstance(part, Constraint):
        return
    else:
        return
    if id(part) not in seen:
        seen.add(id(part))
        for value in values:
            _collect(value, found, seen)
