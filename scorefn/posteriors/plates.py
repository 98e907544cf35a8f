"""PlateCredit: which factor of the ELBO is charged to which element of which guide site.

A program is the guide's sites in the order in which they are sampled. A factor has a *level*, the last site that can
have reached it: for -log q the site itself, for log p the last guide site among the latents that the model has met by
then. Two rules then decide, and neither looks at values:

* order: a decision is charged with the factors whose level is not before its own site;
* plates: within a plate that both share, only at its own index, unless a site outside that plate was sampled in
  between: such a site may have read every index and passed it on.

Where it is known on which sites a factor depends (``Program.reach``), both rules are applied to those alone.

Blocks that keep the same plates apart are summed together: a credit costs a few tensor operations for each set of
plates, however many sites there are, and no mask between single elements is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from scorefn.core import Credit, ShapeError, in_transform


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


class Reach(NamedTuple):
    """What one step can influence, as bits: later steps, and factors in the order of the program."""

    steps: int
    factors: int


@dataclass(frozen=True)
class Program:
    """The guide's sites in the order in which they are sampled.

    Args:
        steps: one for each site.
        depth: how many dimensions hold plates.
        reach: what each step can influence at most, transitively; None: all that comes later.
    """

    steps: tuple[Step, ...]
    depth: int
    reach: tuple[Reach, ...] | None = None

    @property
    def influence(self) -> tuple[_Term, ...]:
        """From factors to decisions."""
        return self._kept_terms("influence", _influence)

    @property
    def before(self) -> tuple[_Term, ...]:
        """From decisions to the decisions that they can reach."""
        return self._kept_terms("before", _before)

    def _kept_terms(self, name: str, make: Callable[[_Relations], Iterator[_Link]]) -> tuple[_Term, ...]:
        if (found := self.__dict__.get(name)) is None:
            with torch.inference_mode(False):  # what is made there may not be used elsewhere
                found = tuple(_terms(make(self._relations), self.depth))
            if not in_transform():
                self.__dict__[name] = found
        return found

    @cached_property
    def _relations(self) -> _Relations:
        return _Relations(self)


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
        return self._by_program(v, lambda program, v: _summed(program.influence, v, self.num_decisions))

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, J]``."""
        self._check(u, self.num_decisions, "decisions")
        return self._by_program(
            u, lambda program, u: _summed([term.adjoint for term in program.influence], u, self.num_values)
        )

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Decisions whose influence strictly contains k's, and earlier ones with the same influence."""
        self._check(log_prob, self.num_decisions, "decisions")
        return self._by_program(log_prob, _predecessors)

    def __getitem__(self, index: Any) -> PlateCredit:
        """The credit of some of the draws."""
        return self if self.which is None else replace(self, which=self.which[index])

    def _check(self, v: Tensor, columns: int, noun: str) -> None:
        if v.shape[-1] != columns:
            raise ShapeError(f"{self!r} met {v.shape[-1]} {noun}: it belongs to the draws it came with.")

    def _by_program(self, v: Tensor, summed: Callable[[Program, Tensor], Tensor]) -> Tensor:
        if self.which is None:
            return summed(self.programs[0], v)
        rows = [(self.which == index).nonzero().flatten() for index in range(len(self.programs))]
        parts = [summed(program, v[row]) for program, row in zip(self.programs, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]


class _Link(NamedTuple):
    """Which sources are summed into one target, apart for each index of the plates that are kept."""

    kept: Plates
    target: Block
    sources: int  # as bits
    blocks: list[Block]  # that the bits stand for


class _Relations:
    """Who can influence whom, and through which sites."""

    def __init__(self, program: Program) -> None:
        self.steps = program.steps
        self.factors = [block for step in program.steps for block in step.factors]
        level = [number for number, step in enumerate(program.steps) for _ in step.factors]
        starts = [sum(len(step.factors) for step in program.steps[:number]) for number in range(len(program.steps))]
        everything = (1 << len(self.factors)) - 1
        self.to_steps = [-1 << number + 1 for number in range(len(self.steps))]  # later ones
        self.to_factors = [everything >> start << start for start in starts]
        if program.reach is not None:
            self.to_steps = [bits & reach.steps for bits, reach in zip(self.to_steps, program.reach, strict=True)]
            self.to_factors = [bits & reach.factors for bits, reach in zip(self.to_factors, program.reach, strict=True)]
            self.into_factors = _transposed(self.to_factors, len(level))
            into = _transposed(self.to_steps, len(self.steps))
            self.into_steps = [bits | 1 << number for number, bits in enumerate(into)]
        else:
            self.into_factors = [(1 << at + 1) - 1 for at in level]
            self.into_steps = [(1 << number + 1) - 1 for number in range(len(self.steps))]
        plates = frozenset[Plate]().union(*(step.plates for step in self.steps))
        self.without = {
            plate: sum(1 << number for number, step in enumerate(self.steps) if plate not in step.plates)
            for plate in plates
        }

    def kept(self, shared: Plates, carriers: int) -> Plates:
        """The plates whose indices stay apart on the way through these sites."""
        return frozenset(plate for plate in shared if not carriers & self.without.get(plate, 0))


def _transposed(rows: list[int], columns: int) -> list[int]:
    """Bit i of row j for bit j of row i."""
    return [sum(1 << number for number, row in enumerate(rows) if row >> column & 1) for column in range(columns)]


def _bits(number: int) -> Iterator[int]:
    while number:
        yield (number & -number).bit_length() - 1
        number &= number - 1


def _influence(relations: _Relations) -> Iterator[_Link]:
    factors = relations.factors
    for number, step in enumerate(relations.steps):
        if (block := step.decision) is None:
            continue
        reached, sources = relations.to_factors[number], dict[Plates, int]()
        if not block.plates:
            sources[frozenset()] = reached
        else:
            for at in _bits(reached):
                carriers = relations.to_steps[number] & relations.into_factors[at]
                kept = relations.kept(block.plates & factors[at].plates, carriers)
                sources[kept] = sources.get(kept, 0) | 1 << at
        yield from (_Link(kept, block, bits, factors) for kept, bits in sources.items())


def _before(relations: _Relations) -> Iterator[_Link]:
    steps = relations.steps
    numbers = [number for number, step in enumerate(steps) if step.decision is not None]
    decisions = [step.decision for step in steps if step.decision is not None]
    for number, block in zip(numbers, decisions, strict=True):
        sources = dict[Plates, int]()
        for at, (earlier, other) in enumerate(zip(numbers, decisions, strict=True)):
            if relations.to_steps[earlier] >> number & 1:
                carriers = relations.to_steps[earlier] & relations.into_steps[number]
                kept = relations.kept(block.plates & other.plates, carriers)
                sources[kept] = sources.get(kept, 0) | 1 << at
        yield from (_Link(kept, block, bits, decisions) for kept, bits in sources.items())


def _terms(links: Iterator[_Link], depth: int) -> Iterator[_Term]:
    """One term for each set of plates."""
    by_plates = dict[Plates, list[_Link]]()
    for link in links:
        if link.sources:
            by_plates.setdefault(link.kept, []).append(link)
    for kept, group in by_plates.items():
        blocks, used = group[0].blocks, 0
        for link in group:
            used |= link.sources
        targets, target_order = _side([link.target for link in group], kept, depth)
        positions = list(_bits(used))
        sources, source_order = _side([blocks[at] for at in positions], kept, depth)
        columns = [positions[at] for at in source_order]
        rows = [group[at].sources for at in target_order]
        mask = torch.tensor([[row >> at & 1 for at in columns] for row in rows], dtype=torch.get_default_dtype())
        yield _Term(targets, sources, mask)


def _side(blocks: list[Block], kept: Plates, depth: int) -> tuple[tuple[_Bundle, ...], list[int]]:
    """Blocks of one shape together; the order in which the blocks stand then."""
    dims = {plate.dim for plate in kept}
    by_shape = dict[tuple[int, ...], list[int]]()
    for number, block in enumerate(blocks):
        by_shape.setdefault(block.shape, []).append(number)
    bundles = list[_Bundle]()
    for shape, numbers in by_shape.items():
        columns = [column for n in numbers for column in range(blocks[n].start, blocks[n].start + blocks[n].size)]
        summed = tuple(dim for dim in range(-depth, 0) if dim not in dims and shape[dim] != 1)
        bundles.append(_Bundle(torch.tensor(columns), len(numbers), shape, summed))
    return tuple(bundles), [number for numbers in by_shape.values() for number in numbers]


@dataclass(frozen=True, eq=False)
class _Bundle:
    """Blocks of one shape of which the same dimensions are kept."""

    columns: Tensor  # of all blocks, one block after the other
    count: int
    shape: tuple[int, ...]
    summed: tuple[int, ...]  # dimensions that are not kept

    def gathered(self, v: Tensor) -> Tensor:
        """``[..., columns] -> [..., blocks, kept]``."""
        chosen = v if self.covers(v.shape[-1]) else v.index_select(-1, self.columns.to(v.device))
        blocks = chosen.reshape(*v.shape[:-1], self.count, *self.shape)
        if self.summed:
            blocks = blocks.sum(self.summed, keepdim=True)
        return blocks.reshape(*v.shape[:-1], self.count, math.prod(self._narrow))

    def spread(self, w: Tensor) -> Tensor:
        """``[..., blocks, kept] -> [..., elements]``."""
        lead = (*w.shape[:-2], self.count)
        whole = w.reshape(*lead, *self._narrow).expand(*lead, *self.shape)
        return whole.reshape(*w.shape[:-2], len(self.columns))

    def covers(self, columns: int) -> bool:
        """Whether these are all columns, in their order."""
        return columns == len(self.columns) and self._in_order

    @cached_property
    def _in_order(self) -> bool:
        return self.columns.tolist() == list(range(len(self.columns)))

    @cached_property
    def _narrow(self) -> tuple[int, ...]:
        depth = len(self.shape)
        return tuple(1 if dim - depth in self.summed else size for dim, size in enumerate(self.shape))


@dataclass(frozen=True, eq=False)
class _Term:
    """Sums of source blocks into target blocks, apart for each index of some plates; mask ``[targets, sources]``."""

    targets: tuple[_Bundle, ...]
    sources: tuple[_Bundle, ...]
    mask: Tensor

    @property
    def adjoint(self) -> _Term:
        """The other way."""
        return _Term(self.sources, self.targets, self.mask.T)

    def add_to(self, out: Tensor | None, v: Tensor, columns: int) -> Tensor:
        """``out [..., target columns] + M v``; None: zeros."""
        sums = _joined([bundle.gathered(v) for bundle in self.sources], -2)
        if self._single:
            sums = sums.sum(-2, keepdim=True)
        elif sums.shape[-1] == 1:
            sums = (sums.squeeze(-1) @ self.mask.to(v).T).unsqueeze(-1)
        else:
            sums = self.mask.to(v) @ sums
        parts = sums.split([bundle.count for bundle in self.targets], -2) if len(self.targets) > 1 else (sums,)
        spread = _joined([bundle.spread(part) for bundle, part in zip(self.targets, parts, strict=True)], -1)
        if len(self.targets) == 1 and self.targets[0].covers(columns):
            return spread if out is None else out + spread
        if out is None:
            out = v.new_zeros(*v.shape[:-1], columns)
        return out.index_add(-1, _joined([bundle.columns for bundle in self.targets], -1).to(v.device), spread)

    @cached_property
    def _single(self) -> bool:
        """Whether one block receives all."""
        return len(self.mask) == 1 and bool(self.mask.all())


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _summed(terms: Iterable[_Term], v: Tensor, columns: int) -> Tensor:
    out: Tensor | None = None
    for term in terms:
        out = term.add_to(out, v, columns)
    return v.new_zeros(*v.shape[:-1], columns) if out is None else out


def _predecessors(program: Program, log_prob: Tensor) -> Tensor:
    columns = log_prob.shape[-1]
    before, own = _summed(program.before, log_prob, columns), dict[int, Tensor]()
    for step in program.steps:
        if (block := step.decision) is not None:
            value = log_prob.narrow(-1, block.start, block.size).reshape(*log_prob.shape[:-1], *block.shape)
            own[block.start] = _earlier(value, block).reshape(*log_prob.shape[:-1], block.size)
    return before + assembled(own, log_prob, columns)


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
