"""Refusal, by type, of supports that move with a parameter that requires grad.

The identity differentiates under the integral sign; a moving boundary adds a term that no score sees. For U(-1, 2)
and f = x^2 the score function gives (0.333, -0.333) where the gradient is (0, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MixtureSameFamily, TransformedDistribution
from torch.distributions.constraints import Constraint, independent
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    PowerTransform,
    Transform,
)

from scorefn.core.errors import SupportError


def check_support(p: object) -> None:
    """Raise SupportError where the support of p depends on a parameter that requires grad."""
    if isinstance(p, Distribution) and _moves(p):
        raise SupportError(
            f"The support of {type(p).__name__} moves with a parameter that requires grad, and the score-function "
            "identity holds only for a fixed support: the estimate would miss the boundary term and be wrong, "
            "silently. Detach the parameters that set the support, choose a family of fixed support (Normal, Beta, "
            "LogNormal, ...), or use the pathwise gradient (rsample) of this one."
        )


def _moves(p: Distribution) -> bool:
    if isinstance(p, MixtureSameFamily):
        return _moves(p.component_distribution)
    if isinstance(p, TransformedDistribution):
        if type(p).support is TransformedDistribution.support:  # a chain of the user's, not a named family
            return _moves(p.base_dist) or _chain_moves(p.base_dist.support, _parts(p.transforms))
    elif isinstance(base := getattr(p, "base_dist", None), Distribution):  # Independent and other wrappers
        return _moves(base)
    try:
        return _requires_grad(p.support)
    except NotImplementedError:  # a distribution that declares no support cannot be judged
        return False


def _requires_grad(part: Any) -> bool:
    """Whether a constraint or a transform holds a tensor that requires grad, at any depth."""
    if isinstance(part, nn.Module):
        return any(parameter.requires_grad for parameter in part.parameters())
    return any(
        value.requires_grad if isinstance(value, Tensor) else _requires_grad(value)
        for value in vars(part).values()
        if isinstance(value, Tensor | Constraint | Transform | Distribution)
    )


def _chain_moves(support: Any, chain: list[Transform]) -> bool:
    """Follow the end points of the base's support through the transforms."""
    ends = _end_points(support)
    for transform in chain:
        if _requires_grad(transform) and (ends is None or any(_displaces(transform, end) for end in ends)):
            return True
        if ends is None or transform.domain.event_dim:
            ends = None if _finite(ends) else ends
        elif transform.bijective:
            with torch.no_grad():
                ends = [transform(end) for end in ends]
        else:
            ends = _end_points(transform.codomain)
    return False


def _parts(chain: list[Transform]) -> list[Transform]:
    parts: list[Transform] = []
    for transform in chain:
        if isinstance(transform, ComposeTransform):
            parts += _parts(transform.parts)
        else:
            parts += [transform.base_transform if isinstance(transform, IndependentTransform) else transform]
    return parts


def _end_points(support: Any) -> list[Tensor] | None:
    """End points of a scalar continuous support; None where it has none to follow (integers, a simplex)."""
    while isinstance(support, independent):
        support = support.base_constraint
    if support.is_discrete or support.event_dim:
        return None
    bounds = (getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf))
    return [torch.as_tensor(bound).detach() for bound in bounds]


def _finite(ends: list[Tensor] | None) -> bool:
    return ends is None or any(bool(torch.isfinite(end).any()) for end in ends)


def _displaces(transform: Transform, end: Tensor) -> bool:
    """Whether an end point moves with a parameter of the transform; infinite ones and fixed points do not."""
    end = end[torch.isfinite(end)]
    if isinstance(transform, AffineTransform) and not (
        isinstance(transform.loc, Tensor) and transform.loc.requires_grad
    ):
        return bool((end != 0).any())
    if isinstance(transform, PowerTransform):
        return bool(((end != 0) & (end != 1)).any())
    return end.numel() > 0
