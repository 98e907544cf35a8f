"""How noisy a gradient estimate is, where the noise comes from, and what it costs."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, PyTree, ScorefnError, ShapeError, check_count
from scorefn.core.protocols import tensor_leaves
from scorefn.diagnostics.allocation import variance_split
from scorefn.diagnostics.estimation import Estimate, Estimation, as_estimate, as_parameters, checked_parameters
from scorefn.diagnostics.replicas import replicas
from scorefn.diagnostics.summary import GradientStatistics, moment_fields, summary

_SINGLE = 11  # single estimates that are timed where the repeats are made in sweeps
_FEW = 32  # repeats up to which a sweep, which is checked first, is no faster than a loop


def gradient_statistics(
    subject: Any,
    params: Tensor | Iterable[Tensor],
    repeats: int = 1000,
    *,
    batches: Sequence[Any] | None = None,
) -> GradientStatistics:
    """Mean, variance, signal-to-noise ratio, noise scale and cost of a gradient estimate.

    The repeats of ``(p, f, estimator)`` are made in a few sweeps, where the estimator is scorefn's own and keeps no
    state, and f treats each draw by itself: one call of f for many repeats, checked against single estimates from
    the same draws, in a trial and in the first and the last of the sweeps that are used. Everything else is called
    again and again; ``looped`` says why.

    With ``batches``, the subject is a function of one of them, each gets an equal part of the repeats, and the noise
    is split into what more draws and what more data would remove (``variance_split``); mean and variance are then those
    of one estimate on a minibatch chosen at random.

    Args:
        subject: a callable without arguments that returns a differentiable scalar (your own, or another library's), or
            a tuple ``(p, f, estimator)``. With ``batches``: a function of a minibatch that returns such a scalar or
            such a tuple.
        params: the tensors to differentiate.
        repeats: independent estimates, at least 2; with ``batches`` at least 2 for each.
        batches: minibatches of the data, at least one.

    Raises:
        ScorefnError: too few repeats; no parameters, or parameters that do not require grad or are given twice; an
            estimate that is no tensor, is complex, has no gradient, does not depend on the parameters, or is constant;
            batches that are no sequence.
        NonFiniteError: a gradient that is NaN or infinite.
        ShapeError: the estimate is not a scalar.

    Example:
        >>> import torch, scorefn as sf
        >>> from functools import partial
        >>> from scorefn.diagnostics import gradient_statistics
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> found = gradient_statistics(
        ...     (p, lambda x: x.sum(-1), partial(sf.expectation, num_samples=4)), logits
        ... )
        >>> found.evaluations, found.looped is None
        (4, True)
    """
    parameters = checked_parameters(params)
    if batches is not None:
        return _over_batches(subject, parameters, repeats, batches)
    estimate = as_estimate(subject)
    made = _repeated(estimate, parameters, checked_repeats(repeats))
    _refuse_constant(made.values, made.gradients)
    return replace(
        summary(made.gradients, made.seconds, parameters, evaluations=evaluations_of(estimate)), looped=made.looped
    )


def sample_gradients(subject: Any, params: Tensor | Iterable[Tensor], count: int) -> Tensor:
    """Gradients of independent estimates, ``[count, P]``: in sweeps where that can be, otherwise one by one.

    All parameters are side by side, in their order. The rows are what ``FixedSample.judge`` and its like take.

    Args:
        subject: a callable without arguments that returns a differentiable scalar, or a tuple ``(p, f, estimator)``.
        params: the tensors to differentiate.
        count: how many estimates.

    Raises:
        ScorefnError: a count below 1; no parameters, or parameters that do not require grad or are given twice; an
            estimate that is no tensor, has no gradient, or does not depend on the parameters.
        NonFiniteError: a gradient that is NaN or infinite.
        ShapeError: the estimate is not a scalar.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import sample_gradients
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> sample_gradients((p, lambda x: x.sum(-1), sf.DisARM()), logits, 100).shape
        torch.Size([100, 3])
    """
    parameters = checked_parameters(params)
    return _repeated(as_estimate(subject), parameters, check_count("count", count), timed=0).gradients


def interleaved(
    estimates: Mapping[str, Estimate], parameters: tuple[Tensor, ...], repeats: int
) -> dict[str, tuple[Tensor, list[float]]]:
    """Gradients ``[repeats, P]`` and CPU seconds of each estimate, taken in turn so that drift meets all alike."""
    repeats = checked_repeats(repeats)
    gradients: dict[str, list[Tensor]] = {name: [] for name in estimates}
    seconds: dict[str, list[float]] = {name: [] for name in estimates}
    for number in range(1, repeats + 1):
        for name, estimate in estimates.items():
            _, found, taken = _single(name, estimate, parameters, number)
            gradients[name].append(found)
            seconds[name].append(taken)
    return {name: (torch.stack(gradients[name]), seconds[name]) for name in estimates}


def matching(exact: Tensor | Iterable[Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The exact gradient, one tensor per parameter and of its shape, or ShapeError."""
    truths = as_parameters(exact) if isinstance(exact, Iterable) else (exact,)
    for i, t in enumerate(truths):
        if not isinstance(t, Tensor) or t.is_complex():
            kind = f"of {t.dtype}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ScorefnError(
                f"exact[{i}] is {kind}, but an exact gradient is a tensor of real numbers: give one tensor per "
                "parameter, such as torch.as_tensor(value, dtype=torch.float64)."
            )
    if [t.shape for t in truths] != [q.shape for q in parameters]:
        raise ShapeError(
            f"exact has shapes {[tuple(t.shape) for t in truths]} but params {[tuple(q.shape) for q in parameters]}: "
            "give one exact gradient per parameter, in the same order."
        )
    return truths


def checked_repeats(repeats: Any) -> int:
    """The number of repeats, at least 2."""
    if isinstance(repeats, bool) or not hasattr(repeats, "__index__") or operator.index(repeats) < 2:
        raise ScorefnError(f"repeats must be an integer of at least 2 to have a variance, but it is {repeats!r}.")
    return operator.index(repeats)


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Made:
    values: Tensor  # [repeats]
    gradients: Tensor  # [repeats, P]
    seconds: list[float]  # of single estimates
    looped: str | None


def _repeated(estimate: Estimate, parameters: tuple[Tensor, ...], count: int, timed: int = _SINGLE) -> _Made:
    """Independent estimates, in sweeps where that can be."""
    reason = "a callable without arguments can only be called again"
    if isinstance(estimate, Estimation):
        reason = f"there are no more than {_FEW} repeats"
        if count > _FEW:
            sweeps = replicas(estimate, parameters)
            if not isinstance(sweeps, str):
                found = sweeps.checked_estimates(count)
                if isinstance(found, str):
                    sweeps = found
                elif bool(found[1].isfinite().all()):
                    seconds = [_single("estimate", estimate, parameters, 1)[2] for _ in range(timed)]
                    return _Made(*found, seconds, None)
                else:
                    sweeps = "a gradient is NaN or infinite"
            reason = sweeps
    made = [_single("estimate", estimate, parameters, number) for number in range(1, count + 1)]
    values, gradients = torch.stack([one[0] for one in made]), torch.stack([one[1] for one in made])
    return _Made(values, gradients, [one[2] for one in made], reason)


def _single(name: str, estimate: Estimate, parameters: tuple[Tensor, ...], number: int) -> tuple[Tensor, Tensor, float]:
    """The value of one estimate, its gradient ``[P]`` and the CPU seconds that both took."""
    start = time.process_time()
    value = estimate()
    if not isinstance(value, Tensor):
        raise ScorefnError(
            f"The estimate must return a scalar tensor, but it returned a {type(value).__name__}: return the tensor "
            "itself, not .item() or .backward()."
        )
    if value.ndim:
        raise ShapeError(
            f"The estimate must return a scalar, but it has shape {tuple(value.shape)}: take .mean() over "
            "draws and .sum() over independent problems."
        )
    if value.is_complex():
        raise ScorefnError(
            f'The estimate "{name}" must be a real number, but it is complex ({value.dtype}), which has no gradient to '
            "descend: return its real part, its absolute value, or whatever is to be optimised."
        )
    flat = _flat_gradient(value, parameters, retain_graph=isinstance(estimate, Estimation))
    seconds = time.process_time() - start
    if not bool(flat.isfinite().all()):
        raise NonFiniteError(
            f'The gradient of "{name}" is NaN or infinite (repeat {number}): such an estimate '
            "has neither mean nor variance. Make it finite before it is measured."
        )
    return value.detach(), flat, seconds


def _flat_gradient(value: Tensor, parameters: tuple[Tensor, ...], *, retain_graph: bool) -> Tensor:
    """``[P]``."""
    if not value.requires_grad:
        raise ScorefnError(
            "The estimate does not require grad, so it has no gradient: build the distribution, or f, from the given "
            "parameters, with requires_grad=True and outside torch.no_grad()."
        )
    try:
        found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=retain_graph)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ScorefnError(
            "The estimate was built on a graph that the estimate before it has freed: build the distribution inside "
            "the callable, or pass (p, f, estimator), which keeps the graph of p."
        ) from error
    if all(g is None for g in found):
        raise ScorefnError(
            f"The estimate depends on none of the given parameters, of shapes {[tuple(q.shape) for q in parameters]}: "
            "it was computed from other tensors. Give those that p, or f, was built from, not copies of them."
        )
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(q) if g is None else g).reshape(-1) for q, g in pairs])


def evaluations_of(estimate: Estimate) -> int | None:
    """Rows that one estimate gives to f."""
    if not isinstance(estimate, Estimation):
        return None
    rows = 0

    def counted(x: PyTree) -> Any:
        nonlocal rows
        rows += len(tensor_leaves(x)[0])
        return estimate.f(x)

    replace(estimate, f=counted)()
    return rows


def _refuse_constant(values: Tensor, gradients: Tensor) -> None:
    if bool(gradients.any()) or not bool((values == values[0]).all()):
        return
    raise ScorefnError(
        f"The estimate is constant: in {len(values)} repeats its value was always {values[0].item():.4g} and its "
        "gradient 0 in every parameter, so there is nothing to measure. Build p, or f, from the given parameters; if f "
        "depends on a rare event, it was never drawn: take more repeats, or scorefn.diagnostics.exact_gradient."
    )


def _over_batches(
    subject: Any, parameters: tuple[Tensor, ...], repeats: int, batches: Sequence[Any]
) -> GradientStatistics:
    if not callable(subject) or isinstance(subject, type | Estimation):
        raise ScorefnError(
            "With batches, the subject must be a function of one minibatch that returns a differentiable scalar or "
            f"(p, f, estimator), but it is {subject!r}: write lambda batch: (...)."
        )
    if not (hasattr(batches, "__len__") and hasattr(batches, "__iter__")) or isinstance(batches, str | Mapping):
        raise ScorefnError(
            f"batches must be a sequence of minibatches, whose number is known, but it is a {type(batches).__name__}: "
            "pass list(batches)."
        )
    if not len(batches):
        raise ScorefnError("There are no batches to measure on: give at least one, or leave batches out.")
    each = checked_repeats(repeats) // len(batches)
    if each < 2:
        raise ScorefnError(
            f"{repeats} repeats on {len(batches)} batches are fewer than 2 for each, and only two estimates on one "
            f"minibatch tell its noise from that between minibatches: use repeats={2 * len(batches)} or more."
        )
    made, evaluations = [], None
    for batch in batches:
        estimate = _on(subject, batch)
        made.append(_repeated(estimate, parameters, each))
        if evaluations is None:
            evaluations = evaluations_of(estimate)
    gradients = torch.stack([one.gradients for one in made])  # [batches, each, P]
    flat = gradients.flatten(0, 1)
    _refuse_constant(torch.cat([one.values for one in made]), flat)
    within, between = variance_split(gradients, 1)
    means, noise = gradients.mean(1), gradients.var(1).mean(0)
    mean, of_mean, variance = means.mean(0), noise / each, noise
    if len(batches) > 1:
        of_mean = means.var(0) / len(batches)
        variance = noise * (1 - 1 / each) + means.var(0)
    return GradientStatistics(
        **moment_fields(mean, variance, of_mean, parameters),
        seconds=median(s for one in made for s in one.seconds),
        repeats=len(flat),
        evaluations=evaluations,
        squared_deviations=(flat - mean).double().square().sum(1),
        within=within,
        between=max(between, 0.0),
        looped=next((one.looped for one in made if one.looped is not None), None),
    )


def _on(subject: Callable[[Any], Any], batch: Any) -> Estimate:
    """The estimate on one minibatch, which is kept where its parts are known."""
    first = subject(batch)
    if isinstance(first, tuple | Estimation):
        return as_estimate(first)
    return lambda: subject(batch)
