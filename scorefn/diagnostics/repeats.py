"""Repeats of an estimate for a test of its bias, with controls of known mean on the same draws.

What an estimate shares with a reference on the same draws is noise, not bias. With r the library's own score-function
estimate from these draws, whose mean is the exact gradient g, and s their mean score, whose mean is 0, the rows ::

    estimate - g - beta (r - g) - beta' s

have the bias of the estimate as their mean, whatever beta is, and a variance that may be smaller by many orders: that
of what the estimate does differently. beta is fitted per coordinate on a pilot sample of its own, so that it is a
constant for the rows of the test. Where g is not known the rows are ``estimate - r - beta' s``: the bias is that
against the reference. Where a reference is given that is not known to be g, only controls of mean 0 are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import PyTree, expectation
from scorefn.diagnostics.certificate import gradient_row, of_draws, two_phases
from scorefn.diagnostics.estimation import Estimate, Estimation, pinned
from scorefn.diagnostics.guards import random_at
from scorefn.diagnostics.moments import Moments
from scorefn.diagnostics.replicas import Replicas, replicas
from scorefn.diagnostics.report import refuse_non_finite
from scorefn.estimators import ARMS, DisARM, DoubleControlVariate, LocalExpectation
from scorefn.estimators.estimator import Estimator
from scorefn.reducers import Constant

PILOT = 500
"""Repeats to which the coefficients of the controls are fitted."""
APART = 16
"""Draws of a reference that is compared with from draws of its own."""
CHUNK = 1000
"""Repeats that are made at once."""

Batch = tuple[Tensor, Tensor | None]
"""Gradients ``[n, P]`` and draws ``[N, n, *batch, *event]`` that each follow p; None: they are not seen."""


class Repeats:
    """The stream of rows for one estimate.

    Args:
        estimate: what is checked.
        parameters: the tensors to differentiate.
        exact: what the mean is compared with, ``[P]``; None: the reference on the same draws.
        known: whether ``exact`` is the gradient of E f for certain, which a given one need not be.

    Attributes:
        apart: whether the reference has draws of its own, as those of the estimate are not seen.
        remark: what was done.
    """

    def __init__(self, estimate: Estimate, parameters: tuple[Tensor, ...], exact: Tensor | None, known: bool):
        self.raw, self.epsilon = Moments(), torch.finfo(parameters[0].dtype).eps
        self._made, self._exact, self._known = 0, exact, known
        self._parameters = parameters
        self._score: Replicas | None = None
        self._source, independent = _source(estimate, parameters)
        self._references: list[Replicas | _Alone] = []
        self._reference = Moments()
        self._beta: Tensor | None = None
        self.remark = ""
        self.apart = False
        if isinstance(estimate, Estimation):
            self._begin(estimate, independent)

    def take(self, count: int) -> Tensor:
        """The next rows, whose mean is the bias, ``[count, P]``."""
        parts = [torch.zeros(0, sum(q.numel() for q in self._parameters), dtype=torch.float64)]
        while count > 0:
            parts.append(self._rows(min(count, CHUNK)))
            count -= len(parts[-1])
        return torch.cat(parts)

    def scale(self, margin: Callable[[Moments], Tensor]) -> float:
        """The largest exact coordinate; where there is none, the lower limit of the reference's."""
        if self._exact is not None:
            return float(self._exact.abs().max())
        lower = self._reference.mean.abs() - margin(self._reference)
        return max(float(lower.max()), 0.0)

    @property
    def paired(self) -> bool:
        """Whether the reference takes the place of the exact gradient."""
        return self._exact is None

    @property
    def ready(self) -> bool:
        """Whether there is anything to compare with."""
        return self._exact is not None or bool(self._references)

    def _begin(self, estimate: Estimation, independent: bool) -> None:
        gradients, x = self._source(PILOT)
        if x is None and self._exact is None and hasattr(estimate.p, "sample"):
            self.apart = independent = True
            own, source = estimate.p, self._source
            self._source = lambda count: (source(count)[0], own.sample(torch.Size((APART, count))))
            gradients, x = self._source(PILOT)
        if not isinstance(x, Tensor):
            return
        parameters, p, f = self._parameters, estimate.p, estimate.f
        with torch.no_grad():
            level = float(torch.as_tensor(f(x[:, 0])).double().mean())
            like = p.log_prob(x[:, 0])
        size = len(x)
        kinds: list[Any] = [partial(expectation, num_samples=size, baseline=Constant(level))]
        if independent and size > 1:
            kinds.insert(0, partial(expectation, num_samples=size))
        made = [replicas(Estimation(p, f, kind), parameters) for kind in [*_ancestor(estimate.estimator), *kinds]]
        bare = partial(expectation, num_samples=size, baseline=None)
        score = replicas(Estimation(p, lambda x: like.new_ones(len(x)), bare), parameters)
        self._references = [one for one in made if isinstance(one, Replicas)]
        self._score = score if isinstance(score, Replicas) else None
        if not self._references and self._exact is None and random_at(f, x[:, 0], like):
            self._references, self.apart = [_Alone(estimate, parameters)], True
        if not self._references:
            return
        rows, controls = self._split(gradients.double(), self._at(x))
        self._beta = _coefficients(rows, controls)
        before, after = gradients.double().var(0).sum(), (rows - (self._beta * controls).sum(0)).var(0).sum()
        left = float(after / before) if float(before) > 0 else 1.0
        self.remark = "" if self.apart else f"References on the same draws left {left:.1e} of the variance."

    def _rows(self, count: int) -> Tensor:
        gradients, x = self._source(count)
        refuse_non_finite(gradients, self._made)
        self._made += len(gradients)
        gradients = gradients.double()
        self.raw.add(gradients)
        if not self._references or x is None:
            assert self._exact is not None
            return gradients - self._exact
        values = self._at(x)
        self._reference.add(values[0])
        rows, controls = self._split(gradients, values)
        assert self._beta is not None
        return rows - (self._beta * controls).sum(0)

    def _at(self, x: Tensor) -> list[Tensor]:
        """The references ``[n, P]``, and last the score, where there is one."""
        return [one.gradients_at(x).double() for one in [*self._references, *([self._score] if self._score else [])]]

    def _split(self, gradients: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The rows without controls ``[n, P]``, and the controls, of mean 0, ``[C, n, P]``."""
        size = len(self._references)
        references, score = values[:size], values[size:]
        differences = [one - references[0] for one in references[1:]]
        if self._exact is None:
            rows = gradients - references[0]
        else:
            rows = gradients - self._exact
            if self._known:
                differences = [one - self._exact for one in references]
        return rows, torch.stack([*differences, *score]) if differences or score else rows.new_zeros(0, *rows.shape)


class _Alone:
    """The library's estimate with draws, and values of a random f, of its own; made one by one."""

    def __init__(self, estimate: Estimation, parameters: tuple[Tensor, ...]):
        self._parameters = parameters
        self._one = Estimation(estimate.p, estimate.f, partial(expectation, num_samples=APART))

    def gradients_at(self, x: Tensor) -> Tensor:
        """As many as x ``[N, n, ...]`` has columns, ``[n, P]``."""
        return torch.stack([gradient_row(self._one, self._parameters) for _ in range(x.shape[1])])


def _coefficients(rows: Tensor, controls: Tensor) -> Tensor:
    """Least squares of rows ``[n, P]`` on controls ``[C, n, P]`` and a constant, per coordinate: ``[C, 1, P]``."""
    if not len(controls):
        return rows.new_zeros(0, 1, rows.shape[1])
    y = (rows - rows.mean(0)).T.unsqueeze(-1)
    z = (controls - controls.mean(1, keepdim=True)).permute(2, 1, 0)
    size = z.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(z.dtype).tiny)
    found = torch.linalg.pinv(z / size, rtol=1e-6) @ y / size.mT
    coefficients: Tensor = found.squeeze(-1).T.unsqueeze(1)
    return coefficients


def _source(estimate: Estimate, parameters: tuple[Tensor, ...]) -> tuple[Callable[[int], Batch], bool]:
    """How gradients are made, with the draws where they are seen, and whether these are independent."""
    if not isinstance(estimate, Estimation):
        return lambda count: (torch.stack([gradient_row(estimate, parameters) for _ in range(count)]), None), False
    sweeps = replicas(estimate, parameters)
    if isinstance(sweeps, Replicas):
        seen = _seen(estimate.estimator)

        def swept(count: int) -> Batch:
            x = sweeps.draws(count)
            return sweeps.gradients_at(x), None if seen is None else x.detach()[seen]

        return swept, _independent(estimate.estimator)
    return partial(_recorded, estimate, parameters), not two_phases(estimate.estimator)


def _seen(estimator: Any) -> slice | None:
    """Which of the draws of a swept estimator follow p."""
    if isinstance(estimator, LocalExpectation):
        return slice(estimator.num_samples)
    if isinstance(estimator, partial | ARMS | DisARM | DoubleControlVariate):
        return slice(None)
    return None


def _ancestor(estimator: Any) -> list[Any]:
    """Of a variant of one of the library's joint estimators, the original with the same settings, as a reference."""
    for base in type(estimator).__mro__[1:]:
        if base in (ARMS, DisARM, DoubleControlVariate):
            original = object.__new__(base)
            vars(original).update(vars(estimator))
            return [original]
    return []


def _independent(estimator: Any) -> bool:
    if isinstance(estimator, partial):
        return estimator.keywords.get("coupling") is None
    return isinstance(estimator, LocalExpectation | DoubleControlVariate)


def _recorded(estimation: Estimation, parameters: tuple[Tensor, ...], count: int) -> Batch:
    """Estimates one by one; their draws, where all are made by ``p.sample`` and as many each time."""
    rows, drawn = [], []
    for _ in range(count):
        here: list[Tensor] = []
        rows.append(gradient_row(_recording(estimation, here), parameters))
        drawn.append(torch.cat(here) if here else torch.zeros(0))
    if not len(drawn[0]) or any(x.shape != drawn[0].shape for x in drawn):
        return torch.stack(rows), None
    return torch.stack(rows), torch.stack(drawn, 1)


def _recording(estimation: Estimation, here: list[Tensor]) -> Estimate:
    """The estimation, which puts its draws there."""
    if callable(getattr(estimation.p, "draws", None)):
        return estimation
    if two_phases(estimator := estimation.estimator) and type(estimator).weights is Estimator.weights:

        def in_two() -> Tensor:  # draws that each follow p, by what such weights promise
            x = estimator.sample(cast(Distribution, estimation.p))
            here.append(x.detach())
            return of_draws(estimation, x)

        return in_two
    shape = (*getattr(estimation.p, "batch_shape", ()), *getattr(estimation.p, "event_shape", ()))

    def sample(sample_shape: torch.Size) -> PyTree:
        x = estimation.p.sample(sample_shape)
        if isinstance(x, Tensor) and tuple(x.shape) == (*sample_shape, *shape):
            here.append(x.detach().clone().reshape(-1, *shape))
        return x

    return Estimation(pinned(estimation.p, sample), estimation.f, estimation.estimator)
