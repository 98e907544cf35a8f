"""Programs: a guide's sites in the order in which they are sampled, and who can influence whom among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from scorefn.core import in_transform
from scorefn.posteriors.plate_sums import Link, Term, bits, terms
from scorefn.posteriors.plates import Plate, Plates, Reach, Step


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
    def influence(self) -> tuple[Term, ...]:
        """From factors to decisions."""
        return self._kept_terms("influence", influence_links)

    @property
    def before(self) -> tuple[Term, ...]:
        """From decisions to the decisions that they can reach."""
        return self._kept_terms("before", predecessor_links)

    def _kept_terms(self, name: str, make: Callable[[Relations], Iterator[Link]]) -> tuple[Term, ...]:
        if (found := self.__dict__.get(name)) is None:
            with torch.inference_mode(False):  # what is made there may not be used elsewhere
                found = tuple(terms(make(self._relations), self.depth))
            if not in_transform():
                self.__dict__[name] = found
        return found

    @cached_property
    def _relations(self) -> Relations:
        return Relations(self)


class Relations:
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


def influence_links(relations: Relations) -> Iterator[Link]:
    """From the factors that a decision can reach to the decision."""
    factors = relations.factors
    for number, step in enumerate(relations.steps):
        if (block := step.decision) is None:
            continue
        reached, sources = relations.to_factors[number], dict[Plates, int]()
        if not block.plates:
            sources[frozenset()] = reached
        else:
            for at in bits(reached):
                carriers = relations.to_steps[number] & relations.into_factors[at]
                kept = relations.kept(block.plates & factors[at].plates, carriers)
                sources[kept] = sources.get(kept, 0) | 1 << at
        yield from (Link(kept, block, bits, factors) for kept, bits in sources.items())


def predecessor_links(relations: Relations) -> Iterator[Link]:
    """From the decisions that can reach a decision to it."""
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
        yield from (Link(kept, block, bits, decisions) for kept, bits in sources.items())
