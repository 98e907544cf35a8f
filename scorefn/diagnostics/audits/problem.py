"""What is audited: a measure, an integrand, and how many draws are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scorefn.core import Coupling, Draws, Integrand, PyTree, draw
from scorefn.core.protocols import tensor_leaves
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.diagnostics.audits.replay import joined

_NUMBERS = 2**22  # of all draws of a sampling test together
_DONORS = 128  # draws from which replacements are chosen
_ROUNDS = 32  # times that a structured measure is drawn from


@dataclass
class Problem:
    """The parts of a problem, and how to draw from them."""

    p: Any
    f: Integrand
    num_samples: int
    coupling: Coupling | None
    given: Draws | None
    parameters: tuple[Tensor, ...] | None
    repeats: int

    @property
    def structured(self) -> bool:
        """Whether p makes several decisions a draw, and its own draws."""
        return callable(getattr(self.p, "draws", None))

    def held(self) -> list[Any]:
        """What p holds and f may change; of a structured measure its modules and tensors, not its environment."""
        if not self.structured:
            return [self.p]
        return [part for part in getattr(self.p, "__dict__", {}).values() if isinstance(part, nn.Module | Tensor)]

    def draws(self) -> Draws:
        """As an estimate would draw them."""
        return draw(self.p, self.f, self.num_samples, coupling=self.coupling)

    def rounds(self, snapshot: Snapshot) -> Iterator[Draws]:
        """Draws, again and again."""
        for _ in range(max(1, min(_ROUNDS if self.structured else 8 * _ROUNDS, self.repeats // self.num_samples))):
            drawn = self.draws()
            snapshot.restore()
            yield drawn

    def plain_sample(self, count: int) -> PyTree:
        """Independent draws of a plain measure."""
        return self.p.sample(torch.Size((count,)))

    def many(self, x: PyTree) -> int:
        """How many draws a sampling test takes."""
        return max(min(self.repeats, _NUMBERS // _size(x)), min(self.repeats, 256))

    def donors(self, x: PyTree) -> PyTree:
        """Draws to replace those of x by: many more than there are, as those of a small support are often the same."""
        if self.structured or self.given is not None:
            return x
        return joined(x, self.plain_sample(max(self.num_samples, min(_DONORS, _NUMBERS // _size(x)))))


def _size(x: PyTree) -> int:
    """Numbers of one draw, in its largest leaf."""
    return max(1, *(leaf[:1].numel() for leaf in tensor_leaves(x)))
