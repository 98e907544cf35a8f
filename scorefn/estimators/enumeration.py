"""The whole support, weighed by its probabilities: no variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Integrand, PyTree
from scorefn.core.representation import representation
from scorefn.estimators.estimator import Estimator, evaluated
from scorefn.estimators.probability import joint_probability
from scorefn.estimators.problems import check_batch_ndim, check_problems, problem_shape
from scorefn.estimators.support import support


@dataclass(frozen=True)
class Enumerate(Estimator):
    """E f itself: ``sum_x p(x) f(x)`` over the S values of a finite support, differentiable to any order.

    Serves every distribution with a finite support (``Bernoulli``, ``Categorical``, ``OneHotCategorical``,
    ``Binomial``; ``Independent`` and ``MixtureSameFamily`` of these) and measures with ``enumerate_support() -> x``
    and ``log_prob``. f is evaluated S times, also where the probability is 0. Value and gradient have no variance, and
    of families of torch that are given ``probs`` they are right also where one of these is 0 or 1.

    Args:
        batch_ndim: how many leading batch dimensions of p are problems of their own; the others are drawn jointly,
            with the event. None: all of them where p is an ``Independent``, none otherwise.

    Raises:
        ScorefnError: the support is not finite or has more than 2^20 joint values.
        ShapeError: f returned values of other problems than batch_ndim says.

    Example:
        >>> import torch
        >>> from scorefn import Enumerate
        >>> p = torch.distributions.Bernoulli(torch.tensor([0.25, 0.5]))
        >>> Enumerate()(p, lambda x: x.prod(-1))
        tensor(0.1250)
    """

    batch_ndim: int | None = None
    evaluations = None
    unbiased = True

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse a batch_ndim that is no number of dimensions."""
        check_batch_ndim(self.batch_ndim)

    def sample(self, p: Any) -> PyTree:
        """The support, ``[S, *batch, *event]``, in the same order at each call."""
        return support(p, len(problem_shape(p, self.batch_ndim)))

    def surrogate(self, p: Any, x: PyTree, fx: Tensor) -> Tensor:
        """``sum_x p(x) f(x)``, ``[*B]``."""
        return self._sum(p, x, p.log_prob(x), fx)

    def weights(self, p: Any, x: PyTree) -> Tensor:
        """The probabilities ``[S, *B]``."""
        kept = 1 + len(problem_shape(p, self.batch_ndim))
        with torch.no_grad():
            return joint_probability(p, x, p.log_prob(x), kept)

    def __call__(self, p: Any, f: Integrand) -> Tensor:
        """Enumerate, call f once on the whole support, and return the sum ``[*B]``."""
        x = self.sample(p)
        log_prob = p.log_prob(x)
        return self._sum(p, x, log_prob, evaluated(f, x, log_prob, tuple(log_prob.shape)))

    def _sum(self, p: Any, x: PyTree, log_prob: Tensor, fx: Tensor) -> Tensor:
        check_problems(self, p, len(log_prob), fx, problem_shape(p, self.batch_ndim))
        return (joint_probability(p, x, log_prob, fx.ndim) * fx).sum(0)
