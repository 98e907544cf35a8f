"""What is measured: an estimate, a zero-argument callable; best one that names its p, f and estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorefn.core import Integrand, Measure, PyTree, ScorefnError
from scorefn.core.representation import representation

Estimate: TypeAlias = Callable[[], Tensor]
"""Any zero-argument callable that returns a differentiable scalar; each call draws afresh."""

Estimator: TypeAlias = Callable[[Any, Integrand], Tensor]
"""``estimator(p, f) -> [*B]``: ``partial(sf.expectation, num_samples=8)``, ``sf.DisARM()``, or your own function."""


@dataclass(frozen=True)
class Estimation:
    """An estimator at work on a problem: an estimate whose parts are known.

    Calling it draws afresh and returns the estimate, summed over the independent problems B. As its parts are known,
    its repeats can be made in one sweep, and its own randomness can be enumerated instead of sampled; a bare callable
    can only be called again and again. Wherever an estimate is expected, a tuple ``(p, f, estimator)`` does as well.

    Args:
        p: the distribution or measure, built from the parameters.
        f: the integrand, x ``[N, *batch, *event]`` to ``[N, *B]``.
        estimator: ``estimator(p, f) -> [*B]``, a differentiable estimate of E f.

    Raises:
        ScorefnError: p is no measure, or f or the estimator is not callable.

    Example:
        >>> import torch, scorefn as sf
        >>> from functools import partial
        >>> from scorefn.diagnostics import Estimation
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> estimate = Estimation(p, lambda x: x.sum(-1), partial(sf.expectation, num_samples=4))
        >>> estimate().shape
        torch.Size([])
    """

    p: Measure
    f: Integrand
    estimator: Estimator

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse parts that cannot play their role."""
        if not (hasattr(self.p, "draws") or (hasattr(self.p, "sample") and hasattr(self.p, "log_prob"))):
            raise ScorefnError(
                f"{type(self.p).__name__} is not a measure: the first part of (p, f, estimator) needs sample and "
                "log_prob, as every torch.distributions object has them."
            )
        for name, part in (("f", self.f), ("estimator", self.estimator)):
            if not callable(part) or isinstance(part, type):
                raise ScorefnError(
                    f"{name} must be callable, but it is {part!r}: give (p, f, estimator) with f(x) -> [N, *B] and "
                    "estimator(p, f) -> [*B], such as functools.partial(sf.expectation, num_samples=8) or sf.DisARM()."
                )

    def __call__(self) -> Tensor:
        """One estimate, a differentiable scalar: summed over the problems B."""
        value = self.estimator(self.p, self.f)
        return value.sum() if isinstance(value, Tensor) else value

    def at(self, sample: Callable[[torch.Size], PyTree]) -> Estimation:
        """The same estimation whose draws are made by ``sample(sample_shape)`` instead of by p."""
        return replace(self, p=pinned(self.p, sample))


def pinned(p: Any, sample: Callable[[torch.Size], PyTree]) -> Any:
    """p with its log-probability and another sampler: a shallow copy, which leaves p as it is."""
    other = copy.copy(p)

    def detached(sample_shape: Any = ()) -> PyTree:
        return sample(torch.Size(sample_shape))

    other.sample = detached
    return other


def as_estimate(subject: Any) -> Estimate:
    """An estimate: as it stands, or made from a tuple ``(p, f, estimator)``.

    Raises:
        ScorefnError: neither a callable nor such a tuple.
    """
    if isinstance(subject, tuple) and len(subject) == 3:
        return Estimation(*subject)
    if not callable(subject) or isinstance(subject, type):
        raise ScorefnError(
            f"An estimate must be a callable without arguments that returns a differentiable scalar, or a tuple "
            f"(p, f, estimator), but it is {subject!r}."
        )
    estimate: Estimate = subject
    return estimate


def as_parameters(params: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (params,) if isinstance(params, Tensor) else tuple(params)


def checked_parameters(params: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors to differentiate, as a tuple.

    Raises:
        ScorefnError: there are none, one is no tensor, does not require grad, or is given twice.
    """
    if isinstance(params, torch.nn.Module) or not isinstance(params, Tensor | Iterable):
        raise ScorefnError(
            f"params is a {type(params).__name__}, but parameters are tensors that require grad: pass one tensor, a "
            "list of them, or module.parameters()."
        )
    parameters = as_parameters(params)
    if not parameters:
        raise ScorefnError("There are no parameters to differentiate: pass tensors that require grad.")
    for i, q in enumerate(parameters):
        if not isinstance(q, Tensor):
            raise ScorefnError(
                f"params[{i}] is a {type(q).__name__}, but parameters are tensors that require grad: pass "
                "module.parameters(), not named_parameters() or an optimiser's groups."
            )
        if not q.requires_grad:
            raise ScorefnError(
                f"params[{i}], of shape {tuple(q.shape)}, does not require grad, so it has no gradient: leave it out, "
                "or create it with requires_grad=True before p is built from it."
            )
        if (first := next(j for j, other in enumerate(parameters) if other is q)) != i:
            raise ScorefnError(
                f"params[{i}] is the same tensor as params[{first}], of shape {tuple(q.shape)}: it would count twice "
                "in every sum. Give each parameter once."
            )
    return parameters
