"""Search over unordered choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.factors import Factors, as_table
from scorefn.search.points import Numbers, as_integer
from scorefn.search.strategy_result import StrategyResult


class CategoricalSearch(Factors):
    """Minimise over D unordered choices by natural-gradient steps of independent categorical distributions.

    Choice i takes one of K_i values, ``0, ..., K_i - 1``, with probabilities q_i. With u the utilities of
    ``nes_utilities`` and e(x) the one-hot table of a point, a generation of N points does::

        g = sum_k u_k (e(x_k) - q)                        the natural gradient, in q, of E u
        q <- project(q + r g / |g / sqrt(q)|)             r: radius of a trust region, by signal-to-noise ratio
        N = 4 + floor(3 ln sum_i (K_i - 1))

    ``project`` keeps every probability of choice i at ``margin/(K_i - 1)`` or more, so that no value is lost to drift;
    what lies above these floors is scaled to keep the sum. r grows while successive gradients agree, and decays where
    they are noise (Akimoto et al., 2019; formulas at ``TrustRegion`` in the source).

    Only ranks enter. Equal values share the mean of their utilities; NaN and infinite values are failures and rank
    last, tied; where all are tied nothing moves. O(N D + D K) a generation.

    Sources: Akimoto, Shirakawa, Yoshinari, Uchida, Saito & Nishida (2019), "Adaptive stochastic natural gradient method
    for one-shot neural architecture search", ICML; Hamano, Saito, Nomura, Uchida & Shirakawa (2024), "CatCMA:
    stochastic optimization for mixed-category problems", GECCO, section 4, for the margin and the projection.

    Args:
        categories: K_i of each choice, at least 2.
        q0: initial probabilities, a row ``[K_i]`` for each choice; None: all equal.
        margin: the least probability of leaving the most likely value of a choice; None: ``min(1/D, 0.27)``.
        popsize: N.
        seed: as for ``SNES``.
        limits: as for ``SNES``; equal values being normal here, ``tolfun`` and ``tolfunhist`` are 0 (off) by default,
            and ``tolflatfitness`` is 10.

    Raises:
        ScorefnError: a choice of fewer than 2 values, q0 or margin that makes no sense, as for ``SNES``.

    Example:
        >>> import torch
        >>> from scorefn.search import CategoricalSearch
        >>> strategy = CategoricalSearch([3, 5, 4], seed=0, ftarget=0.0)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, (x != torch.tensor([2, 0, 3])).sum(1))
        >>> strategy.result.best_x
        tensor([2, 0, 3])
    """

    method = "categorical"

    def __init__(
        self,
        categories: Sequence[int],
        *,
        q0: Sequence[Numbers] | None = None,
        margin: float | None = None,
        popsize: int | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        given = list(categories) if isinstance(categories, Iterable) else []
        numbers = [count for entry in given if (count := as_integer(entry)) is not None and count >= 2]
        if not given or len(numbers) < len(given):
            raise ScorefnError(
                f"categories must be integers of at least 2, one per choice, but they are {categories!r}: a choice of "
                "fewer values is none. Leave such a choice out of the search."
            )
        table = as_table([[1 / count] * count for count in numbers] if q0 is None else q0, "q0", numbers)
        super().__init__(table, torch.tensor(numbers), margin=margin, popsize=popsize, seed=seed, limits=limits)

    @property
    def probabilities(self) -> list[Tensor]:
        """q_i ``[K_i]`` of each choice; copies."""
        rows = zip(self._state["table"], self._categories.tolist(), strict=True)
        return [row[:count].clone() for row, count in rows]

    @property
    def mean(self) -> Tensor:
        """``[D]`` int64, the most likely point, the one to recommend; of equally likely values the first."""
        most: Tensor = self._state["table"].argmax(1)
        return most

    @property
    def result(self) -> StrategyResult:
        """Where the search stands; points are int64."""
        known = super().result
        return known if known.best_x is None else replace(known, best_x=known.best_x.long())

    def ask(self) -> Tensor:
        """Points to evaluate, ``[N, D]`` int64, a fresh sample with each call."""
        return super().ask().long()
