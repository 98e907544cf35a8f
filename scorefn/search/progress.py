"""The account of a search: what was told so far, as far as stopping and reporting need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.search.ranking import Ranking
from scorefn.search.saved_state import check_counted, check_finite, refuse_number


@dataclass(frozen=True, eq=False)
class Progress:
    """Counts, the best point, and the past of a search.

    Args:
        evaluations: values told.
        iterations: generations told.
        failed: values that were not finite.
        barren: generations in a row without any finite value.
        flat: generations in a row whose values were finite and all equal.
        best_x: ``[D]``, the point of the lowest value; None before the first finite value.
        best_f: the lowest value.
        spread: largest minus smallest finite value of the last generation; infinite where there is no finite value.
        lowest: the lowest value of each generation that had a finite one, oldest first.
        medians: the median value of these generations.
    """

    evaluations: int = 0
    iterations: int = 0
    failed: int = 0
    barren: int = 0
    flat: int = 0
    best_x: Tensor | None = None
    best_f: float = float("inf")
    spread: float = float("inf")
    lowest: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)

    def after(self, x: Tensor, ranking: Ranking) -> Progress:
        """The account after one more generation of points ``[N, D]``; it shares, and lengthens, the lists."""
        counted = replace(
            self,
            evaluations=self.evaluations + len(ranking),
            iterations=self.iterations + 1,
            failed=self.failed + ranking.failed,
        )
        if ranking.failed == len(ranking):
            return replace(counted, barren=self.barren + 1, spread=float("inf"))
        better = ranking.lowest < self.best_f
        self.lowest.append(ranking.lowest)
        self.medians.append(ranking.median)
        return replace(
            counted,
            barren=0,
            flat=self.flat + 1 if ranking.flat else 0,
            best_x=x[ranking.best].clone() if better else self.best_x,
            best_f=ranking.lowest if better else self.best_f,
            spread=ranking.highest - ranking.lowest,
        )

    def check_alive(self, ranking: Ranking, limit: float) -> None:
        """Refuse a generation that would be number ``limit`` in a row without a finite value."""
        if ranking.failed == len(ranking) and self.barren + 1 >= limit:
            raise NonFiniteError(
                f"{self.barren + 1} generations in a row had no finite value: there is nothing to learn from. Start at "
                "a point whose neighbourhood can be evaluated, or lower sigma0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, two tensors of the past and one of the best point."""
        state = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        past = {name: torch.tensor(state[name], dtype=torch.float64) for name in ("lowest", "medians")}
        return {**state, **past, "best_x": None if self.best_x is None else self.best_x.clone()}

    @staticmethod
    def of_state(state: Any, device: torch.device, width: int) -> Progress:
        """The account that ``state_dict`` wrote, its point of ``width`` numbers moved to ``device``.

        Raises:
            ScorefnError: it is none.
        """
        own = {name: value for name, value in Progress().state_dict().items() if name != "best_x"}
        if (
            not isinstance(state, Mapping)
            or set(state) != {*own, "best_x"}
            or not all(isinstance(state[name], type(value)) for name, value in own.items())
            or not state["lowest"].ndim == state["medians"].ndim == 1
            or not len(state["lowest"]) == len(state["medians"])
            or not isinstance(state["best_x"], Tensor | None)
            or (state["best_x"] is not None and state["best_x"].numel() != width)
        ):
            raise ScorefnError(
                f"The state's progress is no account of a search over {width} coordinates: pass what state_dict() "
                "returned, unchanged."
            )
        for name, value in own.items():
            if isinstance(value, int):
                check_counted(name, state[name])
        for name in ("lowest", "medians", "best_x"):
            check_finite(name, state[name])
        none_yet = state["best_x"] is None
        for name in ("best_f", "spread"):  # infinite where there was no value
            if (
                math.isnan(state[name])
                or state[name] == -math.inf
                or (name == "best_f" and none_yet != math.isinf(state[name]))
            ):
                refuse_number(name, state[name])
        past = {name: state[name].tolist() for name in ("lowest", "medians")}
        best_x = None if state["best_x"] is None else state["best_x"].to(device).clone()
        return Progress(**{**state, **past, "best_x": best_x})
