"""Sums over plates: from blocks of columns to blocks of columns, apart for each index of the plates that are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from scorefn.posteriors.plates import Block, Plates


class Link(NamedTuple):
    """Which sources are summed into one target, apart for each index of the plates that are kept."""

    kept: Plates
    target: Block
    sources: int  # as bits
    blocks: list[Block]  # that the bits stand for


def terms(links: Iterator[Link], depth: int) -> Iterator[Term]:
    """One term for each set of plates."""
    by_plates = dict[Plates, list[Link]]()
    for link in links:
        if link.sources:
            by_plates.setdefault(link.kept, []).append(link)
    for kept, group in by_plates.items():
        blocks, used = group[0].blocks, 0
        for link in group:
            used |= link.sources
        targets, target_order = _side([link.target for link in group], kept, depth)
        positions = list(bits(used))
        sources, source_order = _side([blocks[at] for at in positions], kept, depth)
        columns = [positions[at] for at in source_order]
        rows = [group[at].sources for at in target_order]
        mask = torch.tensor([[row >> at & 1 for at in columns] for row in rows], dtype=torch.get_default_dtype())
        yield Term(targets, sources, mask)


def _side(blocks: list[Block], kept: Plates, depth: int) -> tuple[tuple[Bundle, ...], list[int]]:
    """Blocks of one shape together; the order in which the blocks stand then."""
    dims = {plate.dim for plate in kept}
    by_shape = dict[tuple[int, ...], list[int]]()
    for number, block in enumerate(blocks):
        by_shape.setdefault(block.shape, []).append(number)
    bundles = list[Bundle]()
    for shape, numbers in by_shape.items():
        columns = [column for n in numbers for column in range(blocks[n].start, blocks[n].start + blocks[n].size)]
        summed = tuple(dim for dim in range(-depth, 0) if dim not in dims and shape[dim] != 1)
        bundles.append(Bundle(torch.tensor(columns), len(numbers), shape, summed))
    return tuple(bundles), [number for numbers in by_shape.values() for number in numbers]


@dataclass(frozen=True, eq=False)
class Bundle:
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
class Term:
    """Sums of source blocks into target blocks, apart for each index of some plates; mask ``[targets, sources]``."""

    targets: tuple[Bundle, ...]
    sources: tuple[Bundle, ...]
    mask: Tensor

    @property
    def adjoint(self) -> Term:
        """The other way."""
        return Term(self.sources, self.targets, self.mask.T)

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


def summed_terms(terms: Iterable[Term], v: Tensor, columns: int) -> Tensor:
    """``[..., source columns] -> [..., target columns]``, zeros where no term reaches."""
    out: Tensor | None = None
    for term in terms:
        out = term.add_to(out, v, columns)
    return v.new_zeros(*v.shape[:-1], columns) if out is None else out


def bits(number: int) -> Iterator[int]:
    """The positions of a number's ones, from the lowest."""
    while number:
        yield (number & -number).bit_length() - 1
        number &= number - 1
