"""Estimators that choose points of the joint support and weigh each by a formula of its probability."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import Integrand, ShapeError
from scorefn.estimators.estimator import Estimator, evaluated
from scorefn.estimators.gradient import first_order
from scorefn.estimators.problems import check_problems
from scorefn.estimators.sites import JointSupport, Sites

MAX_OUTCOMES = 100_000
"""Choices of points that are listed at most."""


class WeightedSupport(Estimator):
    """``sum_k w_k (f(x_k) + stop(f(x_k) - b_k) (log p(x_k) - stop(log p(x_k))))`` over M points of the support.

    The weights w and what makes the baseline b are numbers: they depend on the probabilities and on the points. Where
    the support has M values or fewer, each is taken once: ``w_k = p(x_k)``, and the estimate is exact. A subclass says
    how the points are chosen, and how they are weighed where they are not the whole support.
    """

    evaluations: int
    batch_ndim: int | None

    @abstractmethod
    def _choose(self, log_prob: Tensor) -> Tensor:
        """Numbers of the points to evaluate, ``[M, *B]``, from the log-probabilities of the support, ``[*B, S]``."""

    @abstractmethod
    def _weigh(self, log_prob: Tensor, number: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The weights ``[M, *B]`` of the points, and what maps their values to baselines (None: no baseline)."""

    def sample(self, p: Distribution) -> Tensor:
        """The points, ``[M, *batch, *event]``; fewer where the support has fewer values."""
        joint = self._joint(p)
        return joint.sites.points(joint.values(self._numbers(joint)))

    def outcomes(self, p: Distribution) -> tuple[Tensor, Tensor] | None:
        """All choices of points ``[M, T, *batch, *event]`` and their probabilities; None for several problems."""
        joint = self._joint(p)
        if joint.log_prob.numel() > (size := joint.log_prob.shape[-1]):
            return None
        log_prob = joint.log_prob.reshape(size).double()
        if size <= self.evaluations:
            numbers, probability = torch.arange(size).unsqueeze(-1), torch.ones(1, dtype=torch.float64)
        elif (listed := self._outcomes(log_prob)) is None:
            return None
        else:
            numbers, probability = listed
        flat = numbers.to(joint.log_prob.device).reshape(-1, *[1] * len(joint.sites.problems))
        return joint.sites.points(joint.values(flat)).unflatten(0, tuple(numbers.shape)), probability

    @abstractmethod
    def _outcomes(self, log_prob: Tensor) -> tuple[Tensor, Tensor] | None:
        """All that ``_choose`` can return of a support ``[S]``, ``[M, T]``, and the probabilities ``[T]``."""

    def surrogate(self, p: Distribution, x: Tensor, fx: Tensor) -> Tensor:
        """The estimate, ``[*B]``."""
        joint = self._joint(p)
        return self._estimate(joint, joint.sites.index(x), fx)

    def weights(self, p: Distribution, x: Tensor) -> Tensor:
        """``[M, *B]``; they sum to 1 in expectation, not for each choice of points."""
        joint = self._joint(p)
        return self._weights(joint, joint.number(joint.sites.index(x)))[0]

    def __call__(self, p: Distribution, f: Integrand) -> Tensor:
        """Choose the points, call f once on all of them, and return the estimate ``[*B]``."""
        joint = self._joint(p)  # once for both phases
        index = joint.values(self._numbers(joint))
        x = joint.sites.points(index)
        return self._estimate(joint, index, evaluated(f, x, joint.log_prob, (len(x), *p.batch_shape)))

    def _joint(self, p: Distribution) -> JointSupport:
        return JointSupport(Sites(p, self.batch_ndim, type(self).__name__))

    def _numbers(self, joint: JointSupport) -> Tensor:
        size = joint.log_prob.shape[-1]
        if size > self.evaluations:
            return self._choose(joint.log_prob)
        everything = torch.arange(size, device=joint.log_prob.device)
        return everything.reshape(size, *[1] * len(joint.sites.problems)).expand(size, *joint.sites.problems)

    def _weights(self, joint: JointSupport, number: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        size, points = joint.log_prob.shape[-1], len(number)
        if points != min(size, self.evaluations):
            raise ShapeError(
                f"x has {points} points, but {type(self).__name__} evaluates {min(size, self.evaluations)} of the "
                f"{size} values of this {type(joint.sites.p).__name__}: pass what sample returned for it, unchanged."
            )
        if points < size:
            return self._weigh(joint.log_prob, number)
        weights = joint.log_prob.movedim(-1, 0).gather(0, number).exp()
        return weights, lambda values: (weights * values).sum(0)

    def _estimate(self, joint: JointSupport, index: Tensor, fx: Tensor) -> Tensor:
        check_problems(self, joint.sites.p, len(index), fx, joint.sites.problems)
        weights, baseline = self._weights(joint, joint.number(index))
        values = fx.detach()
        advantage = values if baseline is None else values - baseline(values)
        score = (weights * advantage * joint.sites.log_prob(index)).sum(0)
        return first_order((weights * fx).sum(0) + (score - score.detach()))
