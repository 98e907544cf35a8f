"""Search over bit strings."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.factors import Factors
from scorefn.search.points import Numbers, as_integer, as_numbers


class BernoulliSearch(Factors):
    """Minimise over bit strings by natural-gradient steps of independent Bernoulli distributions.

    ``CategoricalSearch`` for two values, 0 and 1, with p the probability of a 1; points are float64. With u the
    utilities of ``nes_utilities``, a generation of N points does::

        g = sum_k u_k (x_k - p)                                the natural gradient, in p, of E u
        p <- p + r g / |g / sqrt(p (1 - p))|                   r: radius of a trust region, by signal-to-noise ratio
        p <- min(max(p, margin), 1 - margin)                   margin = min(1/D, 0.27)
        N = 4 + floor(3 ln D)

    Under pure noise r decays, and the walk of all bits stays bounded. A bit that does not matter while others do may
    drift as far as the margin, where it is still drawn both ways. With r fixed this is population-based incremental
    learning, and with two points of weight 1 and -1 the compact genetic algorithm (Ollivier, Arnold, Auger & Hansen,
    2017, "Information-geometric optimization algorithms", JMLR 18, section 4.3).

    Source: Akimoto, Shirakawa, Yoshinari, Uchida, Saito & Nishida (2019), "Adaptive stochastic natural gradient method
    for one-shot neural architecture search", ICML.

    Args:
        dimension: D, how many bits.
        p0: initial probability of a 1, one number or ``[D]``.
        margin: the least probability of either value; None: ``min(1/D, 0.27)``.
        popsize: N.
        seed: as for ``SNES``.
        limits: as for ``CategoricalSearch``.

    Raises:
        ScorefnError: dimension, p0 or margin that makes no sense; as for ``SNES``.
        ShapeError: p0 is neither one number nor ``[D]``.

    Example:
        >>> from scorefn.search import BernoulliSearch
        >>> strategy = BernoulliSearch(20, seed=0, ftarget=-20.0)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, -x.sum(1))
        >>> strategy.result.best_f
        -20.0
    """

    method = "bernoulli"

    def __init__(
        self,
        dimension: int,
        *,
        p0: float | Numbers = 0.5,
        margin: float | None = None,
        popsize: int | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        bits = as_integer(dimension)
        if bits is None or bits < 1:
            raise ScorefnError(f"dimension must be a number of bits, at least 1, but it is {dimension!r}.")
        p = as_numbers(p0, "p0", p0.device if isinstance(p0, Tensor) else torch.device("cpu"))
        if p.ndim and p.shape != (bits,):
            raise ShapeError(
                f"p0 has shape {tuple(p.shape)}, but there are {bits} bits: give one probability, or one per bit."
            )
        if not bool(((p > 0) & (p < 1)).all()):
            raise ScorefnError(
                f"p0 must lie between 0 and 1, but it is {p0}: a bit that is never drawn is not searched."
            )
        p = p.expand(bits)
        counts = torch.full((bits,), 2, device=p.device)
        table = torch.stack([1 - p, p], 1)
        super().__init__(table, counts, margin=margin, popsize=popsize, seed=seed, limits=limits)

    @property
    def probabilities(self) -> Tensor:
        """``[D]``, the probability of a 1; a copy."""
        ones: Tensor = self._state["table"][:, 1]
        return ones.clone()

    @property
    def mean(self) -> Tensor:
        """``[D]`` float64, the most likely point, the one to recommend; of equally likely values 0."""
        table = self._state["table"]
        most: Tensor = table[:, 1] > table[:, 0]
        return most.double()
