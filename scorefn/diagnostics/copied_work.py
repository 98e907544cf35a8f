"""How an estimator draws and what it makes of the draws, for many copies of a distribution at once."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

import scorefn.core as core
from scorefn.core import Coupling, Independent, Integrand, PyTree, is_stateful
from scorefn.diagnostics.cuts import LoopedError
from scorefn.diagnostics.estimation import Estimation
from scorefn.estimators import (
    ARMS,
    REBAR,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    LocalExpectation,
    SumAndSample,
    UnorderedSet,
)
from scorefn.estimators.estimator import Estimator, evaluated, parameter
from scorefn.estimators.problems import problem_shape
from scorefn.reducers import Antithetic, DeltaMethod, LinearControlVariate, OrthogonalGaussian, Stratified, Systematic
from scorefn.reducers.quantiles import uniform_shape

_ALONG_AXES = (Independent, Antithetic, Stratified, Systematic)  # couplings that leave batch entries independent
_JOINT = (ARMS, REBAR, DisARM, DoubleControlVariate, Enumerate, LocalExpectation, SumAndSample, UnorderedSet)


def refuse_difference(name: str, mine: Tensor, alone: Tensor, limit: float) -> None:
    """Raise LoopedError where a part of a sweep differs from the same made alone by more than a limit."""
    error = float((mine - alone).abs().amax())
    if not error <= limit:
        raise LoopedError(
            f"made alone from the same draws, an estimate has {name} that differs by {error:.2g}: f or the "
            "estimator looks beyond its own draws, draws afresh, or keeps a state"
        )


class Folded:
    """f for R copies: x ``[N, R, ...]`` is given to f as ``[N R, ...]``."""

    def __init__(self, f: Integrand, count: int) -> None:
        self._f, self._count = f, count
        self.values: Tensor | None = None  # what f returned, where it has a graph
        self.shape: tuple[int, ...] = ()  # of what f would return for one copy
        self.calls: list[tuple[Tensor, Tensor]] = []  # what f was given, and what it returned

    def __call__(self, x: Tensor) -> Any:
        """Values ``[N, R, *B]``, the values of f folded back."""
        values = self._f(x.flatten(0, 1))
        if not isinstance(values, Tensor):
            values = np.asarray(values)
        shape = (len(x), self._count, *values.shape[1:])
        if values.ndim == 0 or values.shape[0] != len(x) * self._count:
            raise LoopedError(f"f returned shape {tuple(values.shape)} for {len(x) * self._count} draws")
        self.shape = (shape[0], *shape[2:])
        folded = values.reshape(shape)
        if isinstance(folded, Tensor) and folded.requires_grad:
            self.values = folded
        self.calls.append((x.detach(), torch.as_tensor(folded).detach()))
        return folded

    def compare_at(self, r: int, eps: float) -> None:
        """Call f with the draws of replicate r alone; LoopedError where its values are others."""
        for x, values in self.calls:
            alone = self._f(x[:, r].clone())
            alone = torch.as_tensor(alone if isinstance(alone, Tensor) else np.asarray(alone)).detach().to(values)
            if alone.shape != values[:, r].shape:
                raise LoopedError(f"f returned shape {tuple(alone.shape)} for {len(x)} draws")
            if values.is_floating_point():
                eps = max(eps, torch.finfo(values.dtype).eps)
            wide = values.double()
            refuse_difference("a value of f", wide[:, r], alone.double(), eps**0.6 * float(wide.abs().amax()))


class _Given:
    """A coupling that has drawn already."""

    unbiased = True

    def __init__(self, x: PyTree, block: Tensor | None) -> None:
        self._drawn = x, block

    def sample(self, p: Any, num_samples: int) -> tuple[PyTree, Tensor | None]:
        return self._drawn


More = list[tuple[Tensor, Tensor]]
"""Leaves ``[R, ...]`` that are cut from tensors outside p, with these tensors."""


class Work(ABC):
    """How an estimator draws and what it makes of the draws: for R copies, and for p alone."""

    needs_graph = False  # whether f must be differentiated with respect to the draws

    @abstractmethod
    def sample(self, p: Distribution, copies: Distribution, count: int) -> PyTree:
        """``[N, R, *batch, *event]``."""

    @abstractmethod
    def surrogate(self, copies: Distribution, x: Tensor, f: Folded, count: int) -> tuple[Tensor, More]:
        """``[R, *B]``."""

    @abstractmethod
    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        """``[*B]``, by the user's own parts."""


def work_of(estimation: Estimation) -> Work:
    """The work of an estimator that serves many copies; LoopedError says why another one does not."""
    estimator = estimation.estimator
    if isinstance(estimator, functools.partial) and estimator.func is core.expectation:
        if estimator.args or "num_samples" not in estimator.keywords:
            raise LoopedError("scorefn.expectation was not given its parts by name, with num_samples")
        return _Expectation(estimation.p, estimator.keywords)
    if type(estimator) in _JOINT:
        return _Joint(estimation.p, estimator)
    name = getattr(estimator, "__name__", type(estimator).__name__)
    raise LoopedError(f"{name} is not among the estimators that serve many copies at once")


class _Expectation(Work):
    def __init__(self, p: Any, keywords: dict[str, Any]) -> None:
        self._p, self._keywords = p, dict(keywords)
        self._coupling: Coupling | None = self._keywords.pop("coupling", None)
        self._block: Tensor | None = None
        for role in ("baseline", "control_variate", "shape"):
            if is_stateful(part := self._keywords.get(role)):
                raise LoopedError(
                    f"the {role.replace('_', ' ')} {type(part).__name__} learns from one estimate to the next"
                )

    def sample(self, p: Distribution, copies: Distribution, count: int) -> PyTree:
        N = self._keywords["num_samples"]
        if self._coupling is None:
            return copies.sample(torch.Size((N,)))
        if type(self._coupling) in _ALONG_AXES or self._by_event(p):
            x, self._block = self._coupling.sample(copies, N)
            return x
        drawn = [self._coupling.sample(p, N) for _ in range(count)]  # by the coupling's own lights, one by one
        for _, block in drawn:
            self._block = block if self._block is None else self._block
            if block is not self._block and (block is None or self._block is None or not block.equal(self._block)):
                raise LoopedError(f"the blocks of {type(self._coupling).__name__} change from one estimate to the next")
        return torch.stack([x for x, _ in drawn], 1)

    def surrogate(self, copies: Distribution, x: Tensor, f: Folded, count: int) -> tuple[Tensor, More]:
        keywords, more = dict(self._keywords), More()
        if type(cv := keywords.get("control_variate")) is LinearControlVariate:
            keywords["control_variate"] = _copied_cv(cv, count, more)
        elif type(cv) is DeltaMethod:
            if cv.p is not self._p:
                raise LoopedError("DeltaMethod was given another distribution than the one that is sampled")
            keywords["control_variate"] = other = copy.copy(cv)
            other.p, other.f = copies, Folded(cv.f, count)
        return core.expectation(copies, f, coupling=_Given(x, self._block), **keywords), more

    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return core.expectation(p, f, coupling=_Given(x, self._block), **self._keywords)

    def _by_event(self, p: Distribution) -> bool:
        """Whether orthogonal directions are those of one event, so that batch entries are independent."""
        return type(self._coupling) is OrthogonalGaussian and len(uniform_shape(p)) > len(p.batch_shape)


def _copied_cv(cv: LinearControlVariate, count: int, more: More) -> LinearControlVariate:
    """For R copies: h is folded as f is, and E h is cut, one leaf for each copy."""
    h, given = Folded(cv.h, count), cv.expected_h
    expected: Any = given() if callable(given) else given
    other = copy.copy(cv)
    other.h = h
    if not isinstance(expected, Tensor) and np.ndim(expected) == 0:
        return other
    source = torch.as_tensor(expected)
    leaf = source.detach().expand(count, *source.shape)
    if source.requires_grad:
        more.append((leaf.requires_grad_(), source))

    def copied() -> Any:
        if h.values is not None:
            raise LoopedError("the h of LinearControlVariate requires grad")
        if source.shape == h.shape:
            found = leaf.movedim(0, 1)
        else:
            rest = h.shape[1:]
            found = leaf.reshape(count, *[1] * (len(rest) - source.ndim), *source.shape).expand(count, *rest)
        return found if isinstance(expected, Tensor) else found.tolist()

    other.expected_h = copied
    return other


class _Joint(Work):
    def __init__(self, p: Any, estimator: Any) -> None:
        self._estimator: Estimator = estimator
        self._copied: Estimator = estimator
        if hasattr(estimator, "batch_ndim"):  # the copies are problems of their own
            self._copied = replace(estimator, batch_ndim=len(problem_shape(p, estimator.batch_ndim)) + 1)
        self.needs_graph = isinstance(estimator, REBAR | DoubleControlVariate)

    def sample(self, p: Distribution, copies: Distribution, count: int) -> PyTree:
        return self._copied.sample(copies)

    def surrogate(self, copies: Distribution, x: Tensor, f: Folded, count: int) -> tuple[Tensor, More]:
        return self._copied.surrogate(copies, x, self._values(copies, x, f)), []

    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return self._estimator.surrogate(p, x, self._values(p, x, f))

    @staticmethod
    def _values(p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return evaluated(f, x, parameter(p), (len(x), *p.batch_shape))
