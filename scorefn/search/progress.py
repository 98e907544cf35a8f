"""The account of a search: what was told so far, as far as stopping and reporting need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from scorefn.core import NonFiniteError


@dataclass(frozen=True, eq=False)
class Progress:
    """Counts, the best point, and the recent past of a search.

    Args:
        evaluations: values told.
        iterations: generations told.
        failed: values that were not finite.
        barren: generations in a row without any finite value.
        flat: generations in a row whose values were finite and all equal.
        best_x: ``[D]``, the point of the lowest value; None before the first finite value.
        best_f: the lowest value.
        spread: largest minus smallest finite value of the last generation; infinite where there is no finite value.
        recent: the lowest values of the last generations, oldest first.
    """

    evaluations: int = 0
    iterations: int = 0
    failed: int = 0
    barren: int = 0
    flat: int = 0
    best_x: Tensor | None = None
    best_f: float = float("inf")
    spread: float = float("inf")
    recent: list[float] = field(default_factory=list)

    def after(self, x: Tensor, f: Tensor, history: int) -> Progress:
        """The account after one more generation, x ``[N, D]`` and f ``[N]``; ``recent`` keeps ``history`` values."""
        ordered = torch.where(torch.isfinite(f), f, torch.inf)
        lowest, index = ordered.min(0)
        low = float(lowest)
        failed = int(ordered.isinf().sum())
        counted = replace(
            self,
            evaluations=self.evaluations + len(f),
            iterations=self.iterations + 1,
            failed=self.failed + failed,
        )
        if failed == len(f):
            return replace(counted, barren=self.barren + 1, spread=float("inf"))
        spread = float(torch.where(ordered.isinf(), -torch.inf, ordered).max()) - low
        better = low < self.best_f
        return replace(
            counted,
            barren=0,
            flat=self.flat + 1 if spread == 0.0 and failed == 0 else 0,
            best_x=x[index].clone() if better else self.best_x,
            best_f=low if better else self.best_f,
            spread=spread,
            recent=[*self.recent, low][-history:],
        )

    def check_alive(self, limit: float) -> None:
        """Refuse to go on after ``limit`` generations in a row without a finite value."""
        if self.barren >= limit:
            raise NonFiniteError(
                f"{self.barren} generations in a row had no finite value: there is nothing to learn from. Start at a "
                "point whose neighbourhood can be evaluated, or lower sigma0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, one list and one tensor."""
        state = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**state, "recent": list(self.recent), "best_x": None if self.best_x is None else self.best_x.clone()}

    @staticmethod
    def of_state(state: Mapping[str, Any], device: torch.device) -> Progress:
        """The account that ``state_dict`` wrote, its point moved to ``device``."""
        best_x = None if state["best_x"] is None else state["best_x"].to(device).clone()
        return Progress(**{**state, "recent": list(state["recent"]), "best_x": best_x})
