"""The exact tier of ``check_unbiased``: the estimator's own randomness is enumerated, or integrated by quadrature.

An estimator that draws through ``p.sample`` alone is a function of n joint draws of p; from each of the S^n tuples of
points of a finite support, with its probability, follow its exact mean and variance. For normals the points are the
nodes of Gauss-Hermite quadrature, taken as exact where fewer nodes give the same to rounding. A joint estimator of the
library may name its own law: ``Estimator.outcomes``.

Random numbers of the estimator's own are found where they come from a global generator, whose state moves, and where
two estimates from the same draws differ: all are made at least twice, and 1000 in all. A private generator that shows
in fewer than about one of 1000 estimates is not seen, nor is one that is seeded anew by each draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import Independent as IndependentCoupling
from scorefn.core import PyTree, ScorefnError, ShapeError
from scorefn.core.protocols import tensor_leaves
from scorefn.diagnostics.estimation import Estimation, pinned
from scorefn.diagnostics.exact import points, slopes
from scorefn.diagnostics.replicas import Replicas, replicas
from scorefn.diagnostics.report import refuse_non_finite
from scorefn.estimators import DoubleControlVariate
from scorefn.estimators.estimator import Estimator, evaluated, parameter
from scorefn.estimators.probability import probabilities

MAX_OUTCOMES = 100_000
"""Outcomes that are enumerated where many are evaluated at once."""
MAX_LOOPED = 20_000
"""Outcomes that are enumerated where each is an estimate of its own."""
NODES = 48
"""Quadrature nodes per dimension of a draw at most."""
FEWEST = 8
"""Quadrature nodes per dimension of a draw at least."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""What counts as rounding: a share of the mean size of the estimates."""
_REFUSED = 1e-2
REPEATED = 1000
"""Estimates that are made at least where a list of outcomes is made over again."""


class NotEnumerableError(Exception):
    """Why an estimation has no exact answer."""


@dataclass(frozen=True)
class Outcomes:
    """All that an estimate can be.

    Args:
        gradients: ``[T, P]``, float64.
        probability: ``[T]``.
    """

    gradients: Tensor
    probability: Tensor

    @property
    def mean(self) -> Tensor:
        """``[P]``."""
        return self.probability @ self.gradients

    @property
    def size(self) -> Tensor:
        """``E |gradient|``, ``[P]``."""
        return self.probability @ self.gradients.abs()

    @property
    def variance(self) -> Tensor:
        """``[P]``; what is rounding of the estimates is 0."""
        found = self.probability @ (self.gradients - self.mean).square()
        return torch.where(found.sqrt() <= 32 * torch.finfo(found.dtype).eps * self.size, 0.0, found)


def outcomes(estimation: Estimation, parameters: tuple[Tensor, ...]) -> Outcomes | str:
    """All outcomes of an estimation and their probabilities, or a sentence that says why there is no such list.

    Args:
        estimation: p, f and estimator; the estimator is run many times, on draws that are handed to it.
        parameters: the tensors to differentiate.

    Raises:
        ScorefnError: what the estimator or f itself raises, and a gradient that is NaN or infinite.
    """
    try:
        if callable(getattr(estimation.p, "draws", None)):
            raise NotEnumerableError(f"{type(estimation.p).__name__} makes its own draws.")
        estimator = estimation.estimator
        if two_phases(estimator):
            law = estimator.outcomes(cast(Distribution, estimation.p))
            if law is not None:
                return _of_law(estimation, parameters, *law)
        return _of_draws(estimation, parameters)
    except NotEnumerableError as reason:
        return str(reason)


# ------------------------------------------------------------------------------------------- draws through p.sample


def _of_draws(estimation: Estimation, parameters: tuple[Tensor, ...]) -> Outcomes:
    tape = _Tape(*_support(estimation.p, FEWEST))
    shapes, draws = _learn(estimation, parameters, tape)
    if not tape.quadrature or draws == 0:
        return _tuples(estimation, parameters, tape, shapes, draws)
    dimensions = tape.x[0].numel()
    exponent = draws * dimensions
    nodes = min(NODES, int(MAX_LOOPED ** (1 / exponent) + 1e-9))
    if nodes < FEWEST:
        raise NotEnumerableError(
            f"it makes {draws} draws of {dimensions} dimensions, and quadrature takes {FEWEST} nodes for each, "
            f"{FEWEST}^{exponent} tuples, where {MAX_LOOPED} are allowed."
        )
    fine, coarse = (
        _tuples(estimation, parameters, _Tape(*_support(estimation.p, n)), shapes, draws)
        for n in (nodes, nodes - max(2, nodes // 4))
    )
    error = float(((fine.mean - coarse.mean).abs() / fine.size.max().clamp(min=1e-300)).max())
    if not error <= tolerance(parameters[0].dtype):
        raise NotEnumerableError(
            f"quadrature has not converged: with {nodes} nodes and fewer the means differ by {error:.1e}, as they do "
            "where f is not smooth."
        )
    return fine


class _Tape:
    """Points ``[S, *batch, *event]``, handed out by number; it notes what is asked for."""

    def __init__(self, x: Tensor, log_weight: Tensor, quadrature: bool):
        self.x, self.log_weight, self.quadrature = x, log_weight, quadrature
        self.shapes: list[torch.Size] = []
        self._left = torch.zeros(0, dtype=torch.long)

    def wind(self, numbers: Tensor | None) -> None:
        """From here on hand out the points of these numbers; None: the first point, any number of times."""
        self.shapes = []
        self._left = torch.zeros(0, dtype=torch.long) if numbers is None else numbers
        self._endless = numbers is None

    def __call__(self, sample_shape: torch.Size) -> Tensor:
        self.shapes.append(sample_shape)
        count = sample_shape.numel()
        if self._endless:
            self._left = torch.arange(count) % len(self.x)
        if len(self._left) < count:
            raise _changed()
        now, self._left = self._left[:count], self._left[count:]
        return self.x[now].reshape(*sample_shape, *self.x.shape[1:]).clone()


def _changed() -> NotEnumerableError:
    return NotEnumerableError("how many draws it makes depends on their values.")


def _support(p: Any, nodes: int) -> tuple[Tensor, Tensor, bool]:
    try:
        x, weight = points(p, nodes)
    except ScorefnError as error:
        raise NotEnumerableError(str(error).split(". ")[0] + ".") from error
    if not isinstance(x, Tensor):
        raise NotEnumerableError(f"its draws are a {type(x).__name__}, not one tensor.")
    if weight is not None:
        return x, weight.double().log(), True
    with torch.no_grad():
        found = probabilities(p, x)  # 0 where it is 0, which log_prob rounds up
        found = p.log_prob(x) if found is None else found.log()
        log_weight = found.double().reshape(len(x), -1).sum(1)
    possible = log_weight > -torch.inf
    return x[possible], log_weight[possible], False


def _learn(estimation: Estimation, parameters: tuple[Tensor, ...], tape: _Tape) -> tuple[list[torch.Size], int]:
    """The sample shapes of one estimate, made from handed draws without any randomness of its own."""
    held = _held(estimation, tape)
    before, rows = _generators(), []
    for _ in range(2):
        tape.wind(None)
        rows.append(gradient_row(held, parameters))
    if _generators() != before:
        raise NotEnumerableError("it draws in another way than p.sample (a coupling, rsample, torch.rand).")
    if not torch.equal(rows[0], rows[1]):
        raise _two_results()
    return tape.shapes, sum(shape.numel() for shape in tape.shapes)


def _held(estimation: Estimation, tape: _Tape) -> Estimation:
    estimator = estimation.estimator
    if isinstance(estimator, partial) and (coupling := _coupling(estimator)) is not None:
        estimator = partial(estimator, coupling=_Tried(coupling))
    return Estimation(_pinned(estimation.p, tape), estimation.f, estimator)


def _coupling(estimator: Any) -> Any:
    """What ``partial(scorefn.expectation, coupling=...)`` draws by; None: by p.sample alone, N at once."""
    found = estimator.keywords.get("coupling") if isinstance(estimator, partial) else None
    return found if callable(getattr(found, "sample", None)) and type(found) is not IndependentCoupling else None


class _Tried:
    """A coupling that is given points for draws; where it cannot bear them, that is a reason to sample."""

    def __init__(self, coupling: Any) -> None:
        self._coupling = coupling
        self.unbiased = getattr(coupling, "unbiased", False)

    def sample(self, p: Any, num_samples: int) -> tuple[PyTree, Tensor | None]:
        name = type(self._coupling).__name__
        try:
            x, block = self._coupling.sample(p, num_samples)
        except NotEnumerableError:
            raise
        except Exception as error:  # it does bear draws: check_unbiased has made an estimate before
            raise NotEnumerableError(
                f"its coupling {name} raises {type(error).__name__} on the points of the support: {error}"
            ) from error
        if any(leaf.shape[:1] != (num_samples,) for leaf in tensor_leaves(x)):
            raise NotEnumerableError(
                f"its coupling {name} makes of points of the support another number of draws than {num_samples}."
            )
        return x, block


def _pinned(p: Any, sample: Callable[[torch.Size], PyTree]) -> Any:
    """p, and what an ``Independent`` is made of, with another sampler."""
    other = pinned(p, sample)
    if isinstance(p, Independent):
        other.base_dist = _pinned(p.base_dist, sample)
    return other


def _generators() -> list[bytes]:
    """The states of the global generators."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    name, keys, *rest = np.random.get_state()
    others = repr((name, np.asarray(keys).tolist(), rest, random.getstate())).encode()
    return [*(state.cpu().numpy().tobytes() for state in states), others]


def _tuples(
    estimation: Estimation, parameters: tuple[Tensor, ...], tape: _Tape, shapes: list[torch.Size], draws: int
) -> Outcomes:
    size = len(tape.x)
    whole = isinstance(estimation.estimator, partial | DoubleControlVariate)  # what is drawn is all that f is given
    whole = whole and _coupling(estimation.estimator) is None  # else the coupling makes the draws of what it is given
    sweeps = replicas(estimation, parameters) if whole and len(shapes) == 1 and len(shapes[0]) == 1 else ""
    allowed = MAX_OUTCOMES if isinstance(sweeps, Replicas) else MAX_LOOPED
    if draws * np.log(max(size, 1)) > np.log(allowed) + 1e-9:
        raise NotEnumerableError(
            f"it makes {draws} joint draws of {size} values, {size}^{draws} tuples, and {allowed} are enumerated."
        )
    numbers = (
        torch.cartesian_prod(*[torch.arange(size)] * draws).reshape(-1, draws) if draws else torch.zeros(1, 0).long()
    )
    probability = tape.log_weight[numbers].sum(1).exp()
    if isinstance(sweeps, Replicas):
        return _checked(_swept(sweeps, tape.x[numbers.T]), probability, parameters)
    held = _held(estimation, tape)

    def row(number: Tensor) -> Tensor:
        tape.wind(number)
        found = gradient_row(held, parameters)
        if tape.shapes != shapes:
            raise _changed()
        return found

    return _checked(_looped(row, list(numbers)), probability, parameters)


def _looped(row: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Tensor:
    """All rows, ``[T, P]``, made at least twice and ``REPEATED`` in all, in turns from the last and from the first."""
    first = [row(one) for one in inputs]
    for turn in range(max(1, -(-REPEATED // len(inputs)) - 1)):
        order = range(len(inputs)) if turn % 2 else reversed(range(len(inputs)))
        if not all(torch.equal(row(inputs[i]), first[i]) for i in order):
            raise _two_results()
    return torch.stack(first)


def _swept(sweeps: Replicas, x: Tensor) -> Tensor:
    """The rows at draws ``[N, T, ...]``, made twice, from the first and from the last."""
    first = sweeps.gradients_at(x)
    again = sweeps.gradients_at(x.flip(1)).flip(0)
    finite = first.isfinite().all(1)
    slack = 1e3 * torch.finfo(first.dtype).eps * first[finite].abs().sum(1).amax() if bool(finite.any()) else 0.0
    if not bool(((first - again)[finite].abs() <= slack).all()):  # the order of a sum may change
        raise _two_results()
    return first


def _two_results() -> NotEnumerableError:
    return NotEnumerableError(
        "it gives two results on the same draws: it learns from one call to the next, or f or it has random numbers of "
        "its own."
    )


# --------------------------------------------------------------------------------------- the law that is named


def _of_law(estimation: Estimation, parameters: tuple[Tensor, ...], x: Tensor, probability: Tensor) -> Outcomes:
    """From x ``[M, T, *batch, *event]`` and the probability of each of T outcomes."""
    sweeps = replicas(estimation, parameters)
    allowed = MAX_OUTCOMES if isinstance(sweeps, Replicas) else MAX_LOOPED
    if len(probability) > allowed:
        raise NotEnumerableError(f"it has {len(probability)} outcomes, and {allowed} are enumerated.")
    if isinstance(sweeps, Replicas):
        return _checked(_swept(sweeps, x), probability, parameters)

    def row(at: Tensor) -> Tensor:
        return gradient_row(partial(of_draws, estimation, at), parameters)

    return _checked(_looped(row, list(x.unbind(1))), probability, parameters)


def two_phases(estimator: Any) -> TypeGuard[Estimator]:
    """Whether it is a joint estimator that samples, evaluates f and then makes its surrogate, and nothing else."""
    kind = type(estimator)
    return isinstance(estimator, Estimator) and (
        kind.__call__ is Estimator.__call__ or kind.__module__.startswith("scorefn.estimators.")
    )


def of_draws(estimation: Estimation, x: Tensor) -> Tensor:
    """The estimate of a joint estimator from draws ``[M, *batch, *event]`` as its ``sample`` makes them."""
    p: Any = estimation.p
    estimator = cast(Estimator, estimation.estimator)
    return estimator.surrogate(p, x, evaluated(estimation.f, x, parameter(p), (len(x), *p.batch_shape))).sum()


def gradient_row(estimate: Callable[[], Tensor], parameters: tuple[Tensor, ...]) -> Tensor:
    """The gradient of one estimate, flat.

    Raises:
        ScorefnError: no gradient, or one that reaches none of the parameters.
        ShapeError: the estimate is no scalar.
    """
    value = estimate()
    if isinstance(value, Tensor) and value.ndim:
        raise ShapeError(f"The estimate must return a scalar, but it has shape {tuple(value.shape)}.")
    found = slopes(value, parameters, retain_graph=True)
    if all(g is None for g in found):
        raise ScorefnError(
            f"The estimate depends on none of the given parameters, of shapes {[tuple(q.shape) for q in parameters]}: "
            "give the very tensors that p, or f, was computed from, not copies of them."
        )
    return torch.cat(
        [q.new_zeros(q.numel()) if g is None else g.reshape(-1) for q, g in zip(parameters, found, strict=True)]
    )


def _checked(gradients: Tensor, probability: Tensor, parameters: tuple[Tensor, ...]) -> Outcomes:
    gradients, probability = gradients.detach().double(), probability.detach().double()
    kept = probability > 0
    refuse_non_finite(gradients[kept], 0)
    total = float(probability.sum())
    if abs(total - 1) > tolerance(parameters[0].dtype):
        raise NotEnumerableError(f"the probabilities of its outcomes sum to {total}.")
    return Outcomes(gradients[kept], probability[kept])


def tolerance(dtype: torch.dtype) -> float:
    """What counts as rounding, as a share of the mean size of the estimates."""
    return TOLERANCE.get(dtype, _REFUSED)
