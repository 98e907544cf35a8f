"""Plates, and the columns of the elements that lie in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


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
