"""The most probable values summed, the rest sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import check_count
from scorefn.core.representation import representation
from scorefn.estimators.problems import check_batch_ndim
from scorefn.estimators.weighted_support import MAX_OUTCOMES, WeightedSupport


@dataclass(frozen=True)
class SumAndSample(WeightedSupport):
    """The k most probable values C summed (k = num_summed), m draws from the rest (m = num_samples).

    With x_j from p restricted to the values outside C::

        sum_{x in C} p(x) f(x) + (1 - p(C)) / m sum_j f(x_j)

    and the gradient ``sum_{x in C} grad p(x) (f(x) - mean b) + (1 - p(C)) / m sum_j grad log p(x_j) (f(x_j) - b_j)``.
    The baseline b_j is the mean of the other draws; of the summed values, weighed by p, where m = 1. It does not
    depend on x_j, and what it is multiplied with has mean 0: ``grad p(C) + (1 - p(C)) E[grad log p(x_j)] = 0``.

    The variance is that of the draws times ``(1 - p(C))^2``: it vanishes as p concentrates. Sources: Liang, Norouzi,
    Berant, Le & Lao (2018), "Memory augmented policy optimization for program synthesis and semantic parsing";
    Liu, Regier, Tripuraneni, Jordan & McAuliffe (2019), "Rao-Blackwellized stochastic gradients for discrete
    distributions"; the baseline: Kool, van Hoof & Welling (2019), applied to the draws.

    Serves ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` and ``Independent`` of these. The log-probabilities of
    all joint values of a problem are enumerated (at most 2^20), f is evaluated k + m times. Where the support has
    k + m values or fewer, f is evaluated at each, and value and gradient are exact.

    Args:
        num_summed: k.
        num_samples: m.
        batch_ndim: how many leading batch dimensions of p are problems of their own; the others are drawn jointly,
            with the event. None: all of them where p is an ``Independent``, none otherwise.

    Attributes:
        evaluations: k + m, at most.

    Raises:
        ScorefnError: num_summed or num_samples is no integer of at least 1; p is of another family or its support has
            more than 2^20 joint values.
        ShapeError: f returned values of other problems than batch_ndim says.

    Example:
        >>> import torch
        >>> from scorefn import SumAndSample
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.tensor([4.0, 2.0, 0.0, 0.0, -1.0], requires_grad=True)
        >>> p = torch.distributions.Categorical(logits=logits)
        >>> SumAndSample(2, 2)(p, lambda x: x.float()).backward()
        >>> logits.grad.shape
        torch.Size([5])
    """

    num_summed: int
    num_samples: int = 1
    batch_ndim: int | None = None
    unbiased = True

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_batch_ndim(self.batch_ndim)
        for name in ("num_summed", "num_samples"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        object.__setattr__(self, "evaluations", self.num_summed + self.num_samples)

    def _choose(self, log_prob: Tensor) -> Tensor:
        summed = log_prob.topk(self.num_summed).indices
        rest = log_prob.scatter(-1, summed, -torch.inf).softmax(-1)
        draws = rest.reshape(-1, rest.shape[-1]).multinomial(self.num_samples, replacement=True)
        return torch.cat((summed, draws.reshape(*rest.shape[:-1], self.num_samples)), -1).movedim(-1, 0)

    def _outcomes(self, log_prob: Tensor) -> tuple[Tensor, Tensor] | None:
        others = len(log_prob) - self.num_summed
        if others**self.num_samples > MAX_OUTCOMES:
            return None
        summed = log_prob.topk(self.num_summed).indices
        rest = torch.ones_like(log_prob, dtype=torch.bool).scatter(0, summed, False).nonzero().squeeze(-1)
        draws = torch.cartesian_prod(*[torch.arange(others)] * self.num_samples).reshape(-1, self.num_samples).T
        probability = log_prob[rest].softmax(0)[draws].prod(0)
        return torch.cat((summed.unsqueeze(-1).expand(-1, draws.shape[1]), rest[draws])), probability

    def _weigh(self, log_prob: Tensor, number: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        summed = number[: self.num_summed].movedim(0, -1)
        of_summed = log_prob.gather(-1, summed).movedim(-1, 0)
        rest = log_prob.scatter(-1, summed, -torch.inf).logsumexp(-1)
        share = (rest.exp() / self.num_samples).expand(self.num_samples, *rest.shape)
        if self.num_samples == 1:
            of_summed_alone = of_summed.softmax(0)
            return torch.cat((of_summed.exp(), share)), lambda values: (
                of_summed_alone * values[: self.num_summed]
            ).sum(0)

        def leave_one_out(values: Tensor) -> Tensor:
            draws = values[self.num_summed :]
            others = (draws.sum(0) - draws) / (self.num_samples - 1)
            return torch.cat((draws.mean(0).expand(self.num_summed, *draws.shape[1:]), others))

        return torch.cat((of_summed.exp(), share)), leave_one_out
