"""Many independent estimates in one sweep: the distribution is copied along a new batch axis, and f is called once."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

import scorefn.core as core
from scorefn.core import Coupling, Independent, Integrand, PyTree, is_stateful
from scorefn.diagnostics.cuts import Cuts, LoopedError, batched
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

_ELEMENTS = 2**17  # numbers in the draws of one sweep, and in its gradients: more do not fit the cache
_DIRECT = 48  # replicates of one sweep where f has a gradient of its own, at a cost that grows with their square
_TRIAL = 16  # replicates of the sweep that is checked
_ALONG_AXES = (Independent, Antithetic, Stratified, Systematic)  # couplings that leave batch entries independent
_JOINT = (ARMS, REBAR, DisARM, DoubleControlVariate, Enumerate, LocalExpectation, SumAndSample, UnorderedSet)


class Replicas:
    """Independent repeats of one estimation, made in sweeps; from ``replicas``."""

    def __init__(self, work: _Work, cuts: Cuts, f: Integrand, parameters: tuple[Tensor, ...]) -> None:
        self._work, self._cuts, self._f, self._parameters = work, cuts, f, parameters
        self._direct = False  # whether f has a gradient in the parameters, besides that of the draws
        self._sweep = _TRIAL

    def gradients(self, count: int) -> Tensor:
        """Gradients of ``count`` independent estimates, ``[count, P]``."""
        return self.estimates(count)[1]

    def estimates(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` independent estimates: their values ``[count]``, summed over the problems, and ``gradients``."""
        found = [self._sweep_at(self.draws(size)) for size in self._sizes(count)]
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])

    def gradients_at(self, x: Tensor) -> Tensor:
        """Gradients of the estimates from given draws: x ``[N, R, *batch, *event]`` to ``[R, P]``.

        Each of the R columns stands for what one estimate draws: N draws of p, those of a coupling in its order, or
        what a joint estimator's ``sample`` returns.
        """
        parts = x.split(self._sweep, dim=1)
        return torch.cat([self._sweep_at(part)[1] for part in parts])

    def _sizes(self, count: int) -> list[int]:
        whole, rest = divmod(count, self._sweep)
        return [self._sweep] * whole + [rest] * (rest > 0)

    def draws(self, count: int) -> Tensor:
        """What ``count`` estimates draw, ``[N, count, *batch, *event]``, for ``gradients_at``."""
        with torch.no_grad() if not self._work.needs_graph else torch.enable_grad():
            x = self._work.sample(self._cuts.p, self._cuts.copies(count)[0], count)
        if not isinstance(x, Tensor):
            raise LoopedError(f"its draws are a {type(x).__name__}, not one tensor")
        return x

    def _sweep_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.shape[1]
        p, leaves = self._cuts.copies(count)
        x = x.detach()
        f = _Folded(self._f, count)
        with torch.enable_grad():
            value, more = self._work.surrogate(p, x.requires_grad_() if self._work.needs_graph else x, f, count)
        if value.shape[:1] != (count,):
            raise LoopedError(f"{count} copies gave values of shape {tuple(value.shape)}")
        inner = [*leaves, *(leaf for leaf, _ in more)]
        if f.values is not None:
            inner.append(f.values)
        found: list[Tensor | None] = [None] * len(inner)
        if inner and value.requires_grad:
            found = list(torch.autograd.grad(value.sum(), inner, retain_graph=True, allow_unused=True))
        pairs = self._cuts.pairs(found[: len(leaves)])
        outside = zip(more, found[len(leaves) :], strict=False)
        pairs += [(source, g) for (_, source), g in outside if g is not None]
        if f.values is not None and found[-1] is not None and self._reaches(f.values):
            self._direct = True
            pairs.append((f.values, _apart(found[-1])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation that is batched by a loop is slower, and as right
            slopes = batched(pairs, self._parameters)
        total = [
            (q.new_zeros(count, q.numel()) if g is None else g.reshape(count, -1))
            for q, g in zip(self._parameters, slopes, strict=True)
        ]
        return value.detach().reshape(count, -1).sum(1), torch.cat(total, 1)

    def _reaches(self, values: Tensor) -> bool:
        if self._direct:
            return True
        found = torch.autograd.grad(values.sum(), self._parameters, retain_graph=True, allow_unused=True)
        return any(g is not None for g in found)

    def check(self) -> None:
        """Make a sweep, and some of its replicates again by themselves, from the same draws.

        Raises:
            LoopedError: they differ by more than rounding.
        """
        x = self.draws(_TRIAL)
        value, gradient = self._sweep_at(x)
        per_replicate = max(x.numel() // _TRIAL, gradient.shape[1], 1)
        self._sweep = max(_ELEMENTS // per_replicate, 1)
        if self._direct:
            self._sweep = max(min(math.isqrt(_ELEMENTS // per_replicate), _DIRECT), 1)
        eps = torch.finfo(gradient.dtype).eps
        size, slope_size = float(value.abs().amax()), float(gradient.abs().amax())
        limits = eps**0.6 * size, eps**0.6 * slope_size + 1e3 * eps * size
        for r in {0, int(gradient.abs().amax(1).argmax())}:
            lone = x[:, r].detach().clone()
            with torch.enable_grad():
                one = self._work.alone(self._cuts.p, lone.requires_grad_(self._work.needs_graph), self._f).sum()
            slope = torch.autograd.grad(one, self._parameters, retain_graph=True, allow_unused=True)
            flat = [
                q.new_zeros(q.numel()) if g is None else g.reshape(-1)
                for q, g in zip(self._parameters, slope, strict=True)
            ]
            for name, mine, alone, limit in (
                ("a value", value[r], one.detach(), limits[0]),
                ("a gradient", gradient[r], torch.cat(flat), limits[1]),
            ):
                error = float((mine - alone).abs().amax())
                if not error <= limit:
                    raise LoopedError(
                        f"made alone from the same draws, an estimate has {name} that differs by {error:.2g}: f or the "
                        "estimator looks beyond its own draws, draws afresh, or keeps a state"
                    )


def replicas(estimation: Estimation, parameters: tuple[Tensor, ...]) -> Replicas | str:
    """Independent repeats of an estimation in one sweep, or why they must be looped.

    p is copied along a new first batch axis, the estimator is run once on all copies, and f is called once on all
    draws ``[N R, *batch, *event]``; the gradient of each copy is carried to the parameters by one batched pass. Served
    are ``functools.partial(scorefn.expectation, ...)`` without parts that learn, and the joint estimators. Whether a
    sweep is what single runs would be is not taken on trust: two of its replicates are made again by themselves, from
    the same draws, and must agree to rounding; an f that mixes the draws that it is given, and one that is random, is
    found out and looped.

    Args:
        estimation: p, f and estimator.
        parameters: the tensors to differentiate.

    Returns:
        The repeats, or a sentence that says why there are none.
    """
    try:
        found = Replicas(_work(estimation), Cuts(_distribution(estimation.p)), estimation.f, parameters)
        found.check()
    except torch.OutOfMemoryError:
        raise
    except LoopedError as reason:
        return str(reason)
    except Exception as error:  # what is wrong with the estimation itself, the loop will say in its own words
        return f"the sweep raised {type(error).__name__}: {error}"
    return found


def _distribution(p: Any) -> Distribution:
    if callable(getattr(p, "draws", None)):
        raise LoopedError(f"{type(p).__name__} makes its own draws")
    if not isinstance(p, Distribution):
        raise LoopedError(f"{type(p).__name__} is no torch distribution, so it has no copies")
    return p


def _apart(weight: Tensor) -> Tensor:
    """The weights ``[N, R, *B]`` of the values as one gradient for each copy, ``[R, N, R, *B]``: 0 off the diagonal."""
    own = weight.new_zeros(weight.shape[1], *weight.shape)
    own.diagonal(0, 0, 2).copy_(weight.movedim(1, -1))
    return own


class _Folded:
    """f for R copies: x ``[N, R, ...]`` is given to f as ``[N R, ...]``."""

    def __init__(self, f: Integrand, count: int) -> None:
        self._f, self._count = f, count
        self.values: Tensor | None = None  # what f returned, where it has a graph
        self.shape: tuple[int, ...] = ()  # of what f would return for one copy

    def __call__(self, x: Tensor) -> Any:
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
        return folded


class _Given:
    """A coupling that has drawn already."""

    unbiased = True

    def __init__(self, x: PyTree, block: Tensor | None) -> None:
        self._drawn = x, block

    def sample(self, p: Any, num_samples: int) -> tuple[PyTree, Tensor | None]:
        return self._drawn


More = list[tuple[Tensor, Tensor]]
"""Leaves ``[R, ...]`` that are cut from tensors outside p, with these tensors."""


class _Work:
    """How an estimator draws and what it makes of the draws: for R copies, and for p alone."""

    needs_graph = False  # whether f must be differentiated with respect to the draws

    def sample(self, p: Distribution, copies: Distribution, count: int) -> PyTree:
        """``[N, R, *batch, *event]``."""
        raise NotImplementedError

    def surrogate(self, copies: Distribution, x: Tensor, f: _Folded, count: int) -> tuple[Tensor, More]:
        """``[R, *B]``."""
        raise NotImplementedError

    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        """``[*B]``, by the user's own parts."""
        raise NotImplementedError


def _work(estimation: Estimation) -> _Work:
    estimator = estimation.estimator
    if isinstance(estimator, functools.partial) and estimator.func is core.expectation:
        if estimator.args or "num_samples" not in estimator.keywords:
            raise LoopedError("scorefn.expectation was not given its parts by name, with num_samples")
        return _Expectation(estimation.p, estimator.keywords)
    if type(estimator) in _JOINT:
        return _Joint(estimation.p, estimator)
    name = getattr(estimator, "__name__", type(estimator).__name__)
    raise LoopedError(f"{name} is not among the estimators that serve many copies at once")


class _Expectation(_Work):
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

    def surrogate(self, copies: Distribution, x: Tensor, f: _Folded, count: int) -> tuple[Tensor, More]:
        keywords, more = dict(self._keywords), More()
        if type(cv := keywords.get("control_variate")) is LinearControlVariate:
            keywords["control_variate"] = _copied_cv(cv, count, more)
        elif type(cv) is DeltaMethod:
            if cv.p is not self._p:
                raise LoopedError("DeltaMethod was given another distribution than the one that is sampled")
            keywords["control_variate"] = other = copy.copy(cv)
            other.p, other.f = copies, _Folded(cv.f, count)
        return core.expectation(copies, f, coupling=_Given(x, self._block), **keywords), more

    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return core.expectation(p, f, coupling=_Given(x, self._block), **self._keywords)

    def _by_event(self, p: Distribution) -> bool:
        """Whether orthogonal directions are those of one event, so that batch entries are independent."""
        return type(self._coupling) is OrthogonalGaussian and len(uniform_shape(p)) > len(p.batch_shape)


def _copied_cv(cv: LinearControlVariate, count: int, more: More) -> LinearControlVariate:
    """For R copies: h is folded as f is, and E h is cut, one leaf for each copy."""
    h, given = _Folded(cv.h, count), cv.expected_h
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


class _Joint(_Work):
    def __init__(self, p: Any, estimator: Any) -> None:
        self._estimator: Estimator = estimator
        self._copied: Estimator = estimator
        if hasattr(estimator, "batch_ndim"):  # the copies are problems of their own
            self._copied = replace(estimator, batch_ndim=len(problem_shape(p, estimator.batch_ndim)) + 1)
        self.needs_graph = isinstance(estimator, REBAR | DoubleControlVariate)

    def sample(self, p: Distribution, copies: Distribution, count: int) -> PyTree:
        return self._copied.sample(copies)

    def surrogate(self, copies: Distribution, x: Tensor, f: _Folded, count: int) -> tuple[Tensor, More]:
        return self._copied.surrogate(copies, x, self._values(copies, x, f)), []

    def alone(self, p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return self._estimator.surrogate(p, x, self._values(p, x, f))

    @staticmethod
    def _values(p: Distribution, x: Tensor, f: Integrand) -> Tensor:
        return evaluated(f, x, parameter(p), (len(x), *p.batch_shape))
