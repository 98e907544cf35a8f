"""PlateCredit: which factor of the ELBO is charged to which element of which guide site.

A program is the guide's sites in the order in which they are sampled. A factor has a *level*, the last site that can
have reached it: for -log q the site itself, for log p the last guide site among the latents that the model has met by
then. Two rules then decide, and neither looks at values:

* order: a decision is charged with the factors whose level is not before its own site;
* plates: within a plate that both share, only at its own index, unless a site outside that plate was sampled in
  between: such a site may have read every index and passed it on.

One sweep along the program carries sums, one for each set of plates, and sums a plate out where it passes a site
outside it. No mask is formed: the cost is linear in sites plus factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorefn.core import Credit, ShapeError


class Plate(NamedTuple):
    """A plate: its name, its dimension counted from the right, its size."""

    name: str
    dim: int
    size: int


Plates: TypeAlias = frozenset[Plate]


@dataclass(frozen=True)
class Block:
    """Columns of decisions or of values: the elements of one site.

    Args:
        start: the first column.
        shape: extents of the dimensions, the same number in every block of a program.
        plates: plates that its dimensions stand for; dimensions without a plate are elements that nothing separates.
    """

    start: int
    shape: tuple[int, ...]
    plates: Plates

    @property
    def size(self) -> int:
        """Number of columns."""
        return math.prod(self.shape)

    def read(self, v: Tensor) -> Tensor:
        """``[..., columns] -> [..., *shape]``."""
        return v.narrow(-1, self.start, self.size).reshape(*v.shape[:-1], *self.shape)

    def columns(self, value: Tensor, like: Tensor) -> Tensor:
        """A value that broadcasts to ``[..., *shape]``, as ``[..., size]`` with the leading axes of like."""
        return value.expand(*like.shape[:-1], *self.shape).reshape(*like.shape[:-1], self.size)


@dataclass(frozen=True)
class Step:
    """One guide site in program order.

    Args:
        plates: the plates inside which it stays, in the guide and in the model.
        decision: its elements, where it needs a score function.
        factors: the blocks of values of this level.
    """

    plates: Plates
    decision: Block | None
    factors: tuple[Block, ...]


@dataclass(frozen=True)
class Program:
    """The guide's sites in the order in which they are sampled; ``depth`` dimensions hold plates."""

    steps: tuple[Step, ...]
    depth: int


@dataclass(frozen=True, eq=False, repr=False)
class PlateCredit(Credit):
    """Program order and plates: the native credit of a guide (see the module).

    It assumes what a plate declares: that its elements do not read one another, neither inside the plate nor by a
    computation without a site between two entries of it. Give ``Total()`` for a program that breaks this; all else is
    charged rather than dropped. Sources: Schulman, Heess, Weber & Abbeel (2015), theorem 1; Ranganath, Gerrish & Blei
    (2014), section 3.1, for the Rao-Blackwellisation.

    Args:
        programs: the different programs among the draws (one, unless control flow depends on draws).
        num_decisions: K.
        num_values: J.
        which: ``[N]``, the program of each draw; None: the first.
    """

    programs: tuple[Program, ...]
    num_decisions: int
    num_values: int
    which: Tensor | None = None

    def __repr__(self) -> str:
        """Short, for messages."""
        return f"PlateCredit({self.num_decisions} decisions, {self.num_values} values)"

    def influence(self, v: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, K]``."""
        self._check(v, self.num_values, "values")
        return self._by_program(v, self.num_decisions, _influence)

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, J]``."""
        self._check(u, self.num_decisions, "decisions")
        return self._by_program(u, self.num_values, _influence_adjoint)

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Decisions whose influence strictly contains k's, and earlier ones with the same influence."""
        self._check(log_prob, self.num_decisions, "decisions")
        return self._by_program(log_prob, self.num_decisions, _predecessors)

    def __getitem__(self, index: Any) -> PlateCredit:
        """The credit of some of the draws."""
        return self if self.which is None else replace(self, which=self.which[index])

    def _check(self, v: Tensor, columns: int, noun: str) -> None:
        if v.shape[-1] != columns:
            raise ShapeError(f"{self!r} met {v.shape[-1]} {noun}: it belongs to the draws it came with.")

    def _by_program(self, v: Tensor, columns: int, sweep: Callable[[Program, Tensor, int], Tensor]) -> Tensor:
        if self.which is None:
            return sweep(self.programs[0], v, columns)
        rows = [(self.which == index).nonzero().flatten() for index in range(len(self.programs))]
        parts = [sweep(program, v[row], columns) for program, row in zip(self.programs, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]


class _Sums:
    """Sums of blocks, one for each set of plates that keeps its indices apart."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.parts: dict[Plates, Tensor] = {}

    def add(self, plates: Plates, value: Tensor) -> None:
        """Add ``[..., *shape]``, summed over the dimensions that none of the plates stands for."""
        value = self._kept(value, plates)
        self.parts[plates] = self.parts[plates] + value if plates in self.parts else value

    def narrow(self, plates: Plates) -> None:
        """Pass a site: indices are kept apart only in its own plates from here on."""
        if all(key <= plates for key in self.parts):
            return
        before, self.parts = self.parts, {}
        for key, value in before.items():
            self.add(key & plates, value)

    def total(self, plates: Plates, like: Tensor) -> Tensor:
        """What reaches each index of these plates; it broadcasts to like ``[..., *shape]``."""
        total = torch.zeros((), dtype=like.dtype, device=like.device)
        for key, value in self.parts.items():
            total = total + self._kept(value, key & plates)
        return total

    def _kept(self, value: Tensor, plates: Plates) -> Tensor:
        kept = {plate.dim for plate in plates}
        summed = [dim for dim in range(-self.depth, 0) if dim not in kept and value.shape[dim] != 1]
        return value.sum(summed, keepdim=True) if summed else value


def _influence(program: Program, v: Tensor, columns: int) -> Tensor:
    sums, parts = _Sums(program.depth), dict[int, Tensor]()
    for step in reversed(program.steps):
        for block in step.factors:
            sums.add(block.plates, block.read(v))
        if step.decision is not None:
            parts[step.decision.start] = step.decision.columns(sums.total(step.decision.plates, v), v)
        sums.narrow(step.plates)
    return assembled(parts, v, columns)


def _influence_adjoint(program: Program, u: Tensor, columns: int) -> Tensor:
    sums, parts = _Sums(program.depth), dict[int, Tensor]()
    for step in program.steps:
        sums.narrow(step.plates)
        if step.decision is not None:
            sums.add(step.decision.plates, step.decision.read(u))
        for block in step.factors:
            parts[block.start] = block.columns(sums.total(block.plates, u), u)
    return assembled(parts, u, columns)


def _predecessors(program: Program, log_prob: Tensor, columns: int) -> Tensor:
    sums, parts = _Sums(program.depth), dict[int, Tensor]()
    for step in program.steps:
        sums.narrow(step.plates)
        if (block := step.decision) is not None:
            own = block.read(log_prob)
            before = sums.total(block.plates, own) + _earlier(own, block)
            parts[block.start] = block.columns(before, log_prob)
            sums.add(block.plates, own)
    return assembled(parts, log_prob, columns)


def _earlier(own: Tensor, block: Block) -> Tensor:
    """Sum over the earlier elements of the same site and of the same plate indices: they have the same influence."""
    kept = {plate.dim for plate in block.plates}
    depth = len(block.shape)
    free = [dim for dim in range(-depth, 0) if dim not in kept and block.shape[dim] != 1]
    if not free:
        return torch.zeros_like(own)
    last = list(range(-len(free), 0))
    moved = own.movedim(free, last)
    flat = moved.flatten(-len(free))
    return (flat.cumsum(-1) - flat).reshape(moved.shape).movedim(last, free)


def assembled(parts: Mapping[int, Tensor], like: Tensor, columns: int) -> Tensor:
    """Pieces at their first columns and zeros elsewhere, ``[..., columns]``."""
    pieces, position = list[Tensor](), 0
    for start in sorted(parts):
        if start > position:
            pieces.append(like.new_zeros(*like.shape[:-1], start - position))
        pieces.append(parts[start])
        position = start + parts[start].shape[-1]
    if position < columns:
        pieces.append(like.new_zeros(*like.shape[:-1], columns - position))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
