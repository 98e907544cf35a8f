"""Evolution strategies in the form of OpenAI: a mean that an optimiser moves, and a fixed standard deviation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.clip_up import OptimizerFactory, descended, fresh_optimizer
from scorefn.search.mirrored import DiagonalStrategy
from scorefn.search.pgpe import centred_ranks
from scorefn.search.points import Numbers, as_sigma, as_start, is_number
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import LocalSums
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, check_overflow, checked_rate


class OpenAIES(DiagonalStrategy):
    """Minimise by the mean of a normal distribution of fixed standard deviations, moved by an optimiser.

    A generation is ``m +- sigma z_k`` for N/2 directions z; r_k are the centred ranks of the values of all N points,
    from 1/2 for the lowest to -1/2 for the highest, ties sharing the mean of theirs::

        g = 1/N sum_k r_k z_k/sigma,    m <- a step of the optimiser along g

    g is the score-function gradient of ``E r`` in m. The optimiser is Adam with ``weight_decay m`` added to the
    descended gradient. The released program omits ``1/sigma``, which Adam undoes but for the decay: its decay of .005
    is one of ``.005/sigma`` here. As sigma stays, the search ends about sigma from an optimum; tolerances of sigma
    never fire. Memory is as in ``PGPE``.

    Source: Salimans, Ho, Chen, Sidor & Sutskever (2017), "Evolution strategies as a scalable alternative to
    reinforcement learning", algorithm 1 and section 2.1.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the standard deviation, one number or ``[D]``; .02 in the source.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``; noisy returns want 100 or more.
        learning_rate: of Adam; None: .01.
        weight_decay: of Adam; None: .005.
        optimizer: of the mean in place of Adam: called with a list of one parameter, returns a
            ``torch.optim.Optimizer``, which descends -g.
        dtype: of the points, torch.float64 or torch.float32; the state is kept in float64.
        seed: of the strategy's own generator; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, a rate, dtype or a limit that makes no sense; an unknown limit; a rate of Adam
            beside an optimizer; an optimizer that is none.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> from scorefn.search import OpenAIES
        >>> strategy = OpenAIES(
        ...     [3.0, -2.0], sigma0=0.1, popsize=20, learning_rate=0.1, seed=0, ftarget=1e-2
        ... )
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(-1))
        >>> strategy.stop
        {'ftarget': 0.01}
    """

    method = "openai_es"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        optimizer: OptimizerFactory | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        if optimizer is not None and not (learning_rate is None and weight_decay is None):
            raise ScorefnError(
                "learning_rate and weight_decay belong to Adam, but another optimizer was given: leave them out."
            )
        rate = checked_rate("learning_rate", 0.01 if learning_rate is None else learning_rate)
        decay = 0.005 if weight_decay is None else weight_decay
        if not is_number(decay) or not 0 <= decay < float("inf"):
            raise ScorefnError(f"weight_decay must be 0 or positive, but it is {decay!r}: it pulls the mean to 0.")
        self._optimizer: OptimizerFactory = (
            functools.partial(torch.optim.Adam, lr=rate, weight_decay=decay) if optimizer is None else optimizer
        )
        kind, memory = fresh_optimizer(self._optimizer, start)
        super().__init__(
            {"mean": start, "optimizer": memory},
            settings={},
            sigma0=sigma,
            popsize=popsize,
            dtype=dtype,
            seed=seed,
            fixed={"optimizer_kind": kind},
            limits=Limits.of_options(
                limits,
                "OpenAIES",
                ("popsize", "learning_rate", "weight_decay", "optimizer", "dtype", "seed"),
            ),
        )

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations; a copy."""
        return self._sigma0.clone()

    def learnt_by(self, sums: LocalSums, ranking: Ranking) -> State:
        """One step of the optimiser."""
        gradient = sums.first(ranking.hand_out(centred_ranks(len(ranking), self._sigma0.device)))
        gradient = gradient / (len(ranking) * self._sigma0)
        mean, memory = descended(self._optimizer, self._state["mean"], -gradient, self._state["optimizer"])
        check_overflow("the mean", float(sums.square_lengths().max().sqrt()), gradient, mean)
        return {"mean": mean, "optimizer": memory}
