"""Refusal, by type, of supports that move with a parameter that requires grad.

The identity differentiates under the integral sign; a moving boundary adds a term that no score sees. For U(-1, 2)
and f = x^2 the score function gives (0.333, -0.333) where the gradient is (0, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MixtureSameFamily, TransformedDistribution, constraints
from torch.distributions import transforms as tr

from scorefn.core.errors import SupportError


def check_support(p: object) -> None:
    """Raise SupportError where the support of p depends on a parameter that requires grad."""
    declared = getattr(type(p), "support", None)
    if isinstance(declared, constraints.Constraint) and not isinstance(declared, property):
        return  # a constant of the family: nearly all, so that the check costs them nothing
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
            return _moves(p.base_dist) or _chain_moves(p.base_dist.support, p.transforms)
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
        if isinstance(value, Tensor | constraints.Constraint | tr.Transform | Distribution)
    )


def _chain_moves(support: Any, chain: list[tr.Transform]) -> bool:
    """Follow the finite end points of the base's support through the transforms; None: it has no end points."""
    parts = tr.ComposeTransform(chain).parts
    while any(isinstance(part, tr.ComposeTransform | tr.IndependentTransform) for part in parts):
        parts = [inner for part in parts for inner in getattr(part, "parts", [getattr(part, "base_transform", part)])]
    ends = _end_points(support)
    for transform in parts:
        if _requires_grad(transform) and (ends is None or any(_displaces(transform, end) for end in ends)):
            return True
        if ends is not None and transform.domain.event_dim == 0:
            with torch.no_grad():
                ends = [transform(e) for e in ends] if transform.bijective else _end_points(transform.codomain)
        elif ends is not None and any(end.isfinite().any() for end in ends):
            ends = None
    return False


def _end_points(support: Any) -> list[Tensor] | None:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support.is_discrete or support.event_dim:
        return None
    ends = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    return [torch.as_tensor(end).detach() for end in ends]


def _displaces(transform: tr.Transform, end: Tensor) -> bool:
    """Whether an end point moves with a parameter of the transform; infinite ones and fixed points do not."""
    end = end[torch.isfinite(end)]
    if isinstance(transform, tr.AffineTransform) and not getattr(transform.loc, "requires_grad", False):
        return bool((end != 0).any())
    if isinstance(transform, tr.PowerTransform):
        return bool(((end != 0) & (end != 1)).any())
    return end.numel() > 0
