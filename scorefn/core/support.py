"""Refusal, by type, of supports that move with a parameter that requires grad.

The identity differentiates under the integral sign; a moving boundary adds a term that no score sees, f times the
density there. For U(-1, 2) and f = x^2 the score function gives (0.333, -0.333) where the gradient is (0, 1). Where the
density is 0 at the boundary (theta * Beta(2, 2)) the identity holds, but a type does not tell: these are refused too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MixtureSameFamily, TransformedDistribution, constraints
from torch.distributions import transforms as tr

from scorefn.core.errors import SupportError


def check_support(p: object) -> None:
    """Raise SupportError where the support of p depends on a parameter that requires grad.

    Raises:
        SupportError: it does, and grad mode is on.

    Example:
        >>> import torch, scorefn as sf
        >>> rate = torch.tensor(2.0, requires_grad=True)
        >>> sf.core.check_support(torch.distributions.Exponential(rate))  # always (0, inf)
        >>> sf.core.check_support(torch.distributions.Uniform(0.0, rate))
        Traceback (most recent call last):
        scorefn.core.errors.SupportError: The support of Uniform moves with a parameter that requires grad, ...
    """
    if not torch.is_grad_enabled():
        return  # a value alone may have any support
    declared = getattr(p, "__dict__", {}).get("support", getattr(type(p), "support", None))
    if isinstance(declared, constraints.Constraint) and not isinstance(declared, property):
        moves = _requires_grad(declared)  # a constant, nearly always of the family, so that the check costs little
    else:
        moves = isinstance(p, Distribution) and _image(p)[0]
    if moves:
        raise SupportError(
            f"The support of {type(p).__name__} moves with a parameter that requires grad, and the score-function "
            "identity misses what crosses its boundary: unless the density is 0 there, which cannot be seen from "
            "here, the estimate would be wrong, silently. Detach the parameters that set the support, choose a family "
            "of fixed support (Normal, Beta, LogNormal, ...), or use the pathwise gradient (rsample) of this one."
        )


def _image(p: Any) -> tuple[bool, list[Tensor] | None]:
    """Whether the support of p moves, and its end points; None: it has none to follow (integers, a simplex)."""
    if isinstance(p, MixtureSameFamily):
        return _image(p.component_distribution)
    if isinstance(p, TransformedDistribution):
        if type(p).support is TransformedDistribution.support:  # a chain of the user's, not a named family
            return _pushed(*_image(p.base_dist), p.transforms)
    elif isinstance(base := getattr(p, "base_dist", None), Distribution):  # Independent and other wrappers
        return _image(base)
    try:
        support = p.support
    except NotImplementedError:  # a distribution that declares no support cannot be judged
        return False, None
    return _requires_grad(support), _end_points(support)


def _requires_grad(part: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether a constraint or a transform holds a tensor that requires grad, at any depth."""
    if isinstance(part, Tensor):
        return part.requires_grad
    if isinstance(part, nn.Module) and any(parameter.requires_grad for parameter in part.parameters()):
        return True
    if isinstance(part, list | tuple):
        return any(_requires_grad(inner, seen) for inner in part)
    if id(part) in seen or not isinstance(part, constraints.Constraint | tr.Transform | Distribution):
        return False
    held = (value for name, value in vars(part).items() if not name.startswith("_cached"))
    return any(_requires_grad(value, seen | {id(part)}) for value in held)


def _pushed(moves: bool, ends: list[Tensor] | None, chain: list[tr.Transform]) -> tuple[bool, list[Tensor] | None]:
    """Follow the end points of a support through transforms, which move it where a finite one is displaced."""
    for transform in chain:
        if isinstance(transform, tr.ComposeTransform | tr.IndependentTransform):
            moves, ends = _pushed(
                moves, ends, getattr(transform, "parts", [getattr(transform, "base_transform", None)])
            )
            continue
        if _requires_grad(transform):
            moves = moves or ends is None or any(_displaces(transform, end) for end in ends)
        if ends is not None and _same(ends, _end_points(transform.domain)):  # mapped onto the whole codomain
            ends = _end_points(transform.codomain)
        elif ends is not None and transform.bijective and transform.domain.event_dim == 0:
            with torch.no_grad():
                ends = [transform(end) for end in ends]
        else:
            ends = None
    return moves, ends


def _end_points(support: Any) -> list[Tensor] | None:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (constraints.real, constraints.real_vector):
        return [torch.tensor(-torch.inf), torch.tensor(torch.inf)]
    if support.is_discrete or support.event_dim or not hasattr(support, "lower_bound"):
        return None
    ends = support.lower_bound, getattr(support, "upper_bound", torch.inf)
    return [torch.as_tensor(end).detach() for end in ends]


def _same(ends: list[Tensor], others: list[Tensor] | None) -> bool:
    return others is not None and all(bool((a == b).all()) for a, b in zip(ends, others, strict=True))


def _displaces(transform: tr.Transform, end: Tensor) -> bool:
    """Whether an end point moves with a parameter of the transform; infinite ones and fixed points do not."""
    end = end[torch.isfinite(end)]
    if isinstance(transform, tr.AffineTransform) and not getattr(transform.loc, "requires_grad", False):
        return bool((end != 0).any())
    if isinstance(transform, tr.PowerTransform):
        return bool(((end != 0) & (end != 1)).any())
    return end.numel() > 0
