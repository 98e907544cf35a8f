"""Exact expectations and gradients: enumeration of finite supports, Gauss-Hermite quadrature for normals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from scorefn.core import Integrand, Measure, PyTree, ScorefnError, evaluate, joint_log_prob
from scorefn.diagnostics.estimation import as_parameters
from scorefn.estimators import Enumerate
from scorefn.estimators.probability import joint_probability

MAX_NODES = 2**20
"""Quadrature nodes that are used at most."""


def exact_expectation(p: Measure, f: Integrand, *, nodes: int = 64) -> Tensor:
    """E_{x~p}[f(x)] without sampling, ``[*B]``; differentiable in p and in f, to any order.

    Finite supports are enumerated: ``sum_x p(x) f(x)`` over all joint values of the batch and event dimensions.
    Normals (also ``Independent``, ``MultivariateNormal``) of 1 to 3 dimensions are integrated by Gauss-Hermite
    quadrature, ``sum_i w_i f(x_i) exp(log p(x_i) - stop(log p(x_i)))``, exact for polynomial f up to degree
    ``2 nodes - 1`` less the degree of the score.

    Args:
        p: a distribution of finite support (``Bernoulli``, ``Categorical``, ``OneHotCategorical``, ``Binomial``,
            ``Independent`` and ``MixtureSameFamily`` of these), a normal of 1 to 3 dimensions, or a measure with
            ``enumerate_support() -> x`` and ``log_prob``.
        f: as for ``scorefn.draw``: x ``[S, *batch, *event]`` to ``[S, *B]``.
        nodes: quadrature nodes per dimension.

    f is called once, and taken for a function of x: what is random in it stays in the answer. The draws of p are taken
    to follow ``log_prob``, whose probabilities are not checked to sum to 1 here; ``check_unbiased`` does. The families
    of torch that are given ``probs`` are summed by these, which have a slope at 0 and 1, where ``log_prob`` has none.

    Raises:
        ScorefnError: the support is neither finite nor that of a normal in 1 to 3 dimensions, or has more than 2^20
            joint values; or p is a measure of several decisions (it has ``draws``), such as an environment's episodes.
        ShapeError: f's shape is not ``[S, *B]``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import exact_expectation
        >>> p = torch.distributions.Bernoulli(torch.tensor([0.25, 0.5]))
        >>> exact_expectation(p, lambda x: x.sum(-1))
        tensor(0.7500)
    """
    probability, values = _table(p, f, nodes)
    expectation: Tensor = torch.tensordot(probability, values, dims=1)
    return expectation


def _table(p: Measure, f: Integrand, nodes: int) -> tuple[Tensor, Tensor]:
    """Probabilities ``[S]`` and values ``[S, *B]`` of f, differentiable."""
    x, weight = points(p, nodes)
    log_prob = p.log_prob(x)
    fx = evaluate(f, x, log_prob)
    joint = joint_log_prob(log_prob, fx).flatten(1).sum(1)  # the problems in B are enumerated jointly
    if weight is None:
        probability = joint_probability(p, x, log_prob, 1)
    else:
        probability = weight.to(joint) * (joint - joint.detach()).exp()
    return probability, fx.to(probability)


def exact_gradient(
    p: Measure, f: Integrand, params: Tensor | Iterable[Tensor], *, nodes: int = 64
) -> tuple[Tensor, ...]:
    """The gradient of ``exact_expectation(p, f)``, summed over B, for each parameter.

    The constant E f is subtracted from f beforehand, which leaves the gradient as it is, ``sum_x grad p(x) = 0``, and
    keeps its digits where f is large beside its differences.

    Args:
        p: see ``exact_expectation``; what it was computed from can be differentiated again.
        f: see ``exact_expectation``.
        params: tensors that require grad, from which p (and perhaps f) was computed.
        nodes: quadrature nodes per dimension.

    Returns:
        One tensor per parameter, of its shape; zeros where the expectation does not depend on it.

    Raises:
        ScorefnError: as ``exact_expectation``; nothing requires grad; or p's graph was freed by an earlier backward.
        ShapeError: f's shape is not ``[S, *B]``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import exact_gradient
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> exact_gradient(p, lambda x: x.sum(-1), logits)  # q (1 - q) for each bit
        (tensor([0.2500, 0.2500]),)
    """
    probability, values = _table(p, f, nodes)
    total = probability.detach().sum()
    if abs(float(total) - 1) <= torch.finfo(total.dtype).eps ** 0.5:  # else sum_x c grad p(x) is not zero
        level = torch.tensordot(probability.detach(), values.detach(), dims=1)
        values = values - torch.where(level.isfinite(), level, 0.0)
    return gradient(torch.tensordot(probability, values, dims=1).sum(), as_parameters(params), retain_graph=True)


def gradient(value: Tensor, params: tuple[Tensor, ...], *, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` with zeros for parameters that the value does not depend on."""
    found = slopes(value, params, retain_graph=retain_graph)
    return tuple(torch.zeros_like(q) if g is None else g for q, g in zip(params, found, strict=True))


def slopes(value: Tensor, params: tuple[Tensor, ...], *, retain_graph: bool = False) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, None for parameters that the value does not depend on.

    Raises:
        ScorefnError: the value is no tensor, is complex or requires no grad; a part of its graph was freed before.
    """
    if not isinstance(value, Tensor):
        raise ScorefnError(f"A differentiable scalar tensor is needed, but it is a {type(value).__name__}.")
    if value.is_complex():
        raise ScorefnError(
            f"The value is complex ({value.dtype}), which has no gradient to descend: return its real part, its "
            "absolute value, or whatever is to be optimised."
        )
    if not value.requires_grad:
        raise ScorefnError(
            "The value does not require grad, so it has no gradient: build the distribution, or f, from the given "
            "parameters, with requires_grad=True and outside torch.no_grad()."
        )
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            value, params, allow_unused=True, retain_graph=retain_graph
        )
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ScorefnError(
            "The graph that p was computed by was freed by an earlier backward, so there is no second gradient: build "
            "p anew before it is given, inside the callable where the estimate is one, or call the earlier backward "
            "with retain_graph=True."
        ) from error
    return found


def points(p: Any, nodes: int) -> tuple[PyTree, Tensor | None]:
    """All values of x with leading S, and quadrature weights ``[S]`` (None: weigh by probability)."""
    unit = p
    while isinstance(unit, Independent):
        unit = unit.base_dist
    if isinstance(unit, Normal | MultivariateNormal):
        return _hermite(unit, nodes)
    if callable(getattr(p, "draws", None)) and not hasattr(p, "enumerate_support"):
        raise ScorefnError(
            f"{type(p).__name__} cannot be enumerated, however small the instance: it makes several decisions and "
            "draws what lies between them (the transitions of an environment) itself, and their probabilities are not "
            "known to the library. Write the expectation of a small instance out by hand (of an environment, with the "
            "probabilities of its transitions, backward from the end), differentiate that, and compare estimates with "
            "it by diagnostics.check_unbiased(estimate, exact, params)."
        )
    return Enumerate(batch_ndim=0).sample(p), None


def _hermite(unit: Normal | MultivariateNormal, nodes: int) -> tuple[Tensor, Tensor]:
    location = unit.loc.detach()
    dimensions = location.numel()
    if isinstance(unit, MultivariateNormal):
        scale = unit.scale_tril.detach()
        if location.ndim > 1:
            raise _refusal(unit, "quadrature takes one multivariate normal, without batch dimensions")
    else:
        scale = torch.diag(unit.scale.detach().expand_as(location).reshape(-1))
    if dimensions > 3:
        raise _refusal(unit, f"quadrature covers 1 to 3 dimensions, and it has {dimensions}")
    node, weight = (torch.as_tensor(a).to(location) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weight = weight / weight.sum()
    if nodes**dimensions > MAX_NODES:
        raise _refusal(unit, f"{nodes}^{dimensions} nodes are more than the {MAX_NODES} that are used")
    grid = torch.cartesian_prod(*[node] * dimensions).reshape(-1, dimensions)
    weights = torch.cartesian_prod(*[weight] * dimensions).reshape(-1, dimensions).prod(1)
    return (location.reshape(-1) + grid @ scale.T).reshape(-1, *location.shape), weights


def _refusal(p: object, reason: str) -> ScorefnError:
    return ScorefnError(
        f"{type(p).__name__} cannot be integrated exactly: {reason}. Use a smaller instance of the problem, or compare "
        "estimators with diagnostics.check_unbiased and diagnostics.compare."
    )
