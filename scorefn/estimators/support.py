"""Finite supports, enumerated: all values of one draw, and of several that are drawn jointly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily

from scorefn.core import PyTree, ScorefnError
from scorefn.estimators.finite import COUNTS, is_count, named

MAX_POINTS = 2**20
"""Points that are enumerated at most."""


def support(p: Any, problems: int = 0) -> PyTree:
    """All values of p, ``[S, *batch, *event]``.

    Args:
        p: a distribution of finite support, or a measure with ``enumerate_support() -> x``.
        problems: how many leading batch dimensions are problems of their own: each of them sees the same S values,
            which are the joint values of the other batch dimensions and of the event.

    Raises:
        ScorefnError: the support is not finite, or has more than 2^20 values.
    """
    if not isinstance(p, Distribution) and hasattr(p, "enumerate_support"):
        return p.enumerate_support()
    values = _values(p, p)
    batch = p.batch_shape
    x = _joint(p, values, batch[problems:].numel()).reshape(-1, *[1] * problems, *batch[problems:], *p.event_shape)
    return x.expand(-1, *batch, *p.event_shape)


def refuse_size(p: object, size: int, sites: int) -> None:
    """Raise ScorefnError where ``size^sites`` joint values are too many, or where there is no site at all."""
    if sites == 0:
        raise _refusal(p, "it has a dimension of size 0, so there is nothing to draw")
    if size**sites > MAX_POINTS:
        raise _refusal(p, f"it has {size}^{sites} joint values, more than the {MAX_POINTS} that are enumerated")


def _values(p: Any, whole: object) -> Tensor:
    """All values of one problem of p, ``[S, *event]``."""
    if isinstance(p, MixtureSameFamily):
        return _values(p.component_distribution, whole)
    if isinstance(p, Independent):
        size = len(p.event_shape) - len(p.base_dist.event_shape)
        return _joint(whole, _values(p.base_dist, whole), p.event_shape[:size].numel()).reshape(-1, *p.event_shape)
    if not getattr(p, "has_enumerate_support", False):
        counts = COUNTS if is_count(p) else ""
        raise _refusal(whole, "its support is not finite", counts)
    try:
        values: Tensor = p.enumerate_support(expand=False)
    except NotImplementedError as error:  # Binomials of different counts
        raise _refusal(whole, f"its support has no common list of values ({error})") from error
    return values.reshape(-1, *p.event_shape)


def _joint(whole: object, values: Tensor, elements: int) -> Tensor:
    """Every choice of one of the values ``[S, *event]`` for each element: ``[S^elements, elements, *event]``."""
    refuse_size(whole, len(values), elements)
    if elements == 1:
        return values.unsqueeze(1)
    if values.ndim == 1:
        return torch.cartesian_prod(*[values] * elements)
    index = torch.cartesian_prod(*[torch.arange(len(values), device=values.device)] * elements)
    return values[index]


def _refusal(p: object, reason: str, repair: str = "") -> ScorefnError:
    usual = "Use a smaller instance of the problem, or an estimate from draws: scorefn.expectation."
    return ScorefnError(f"{named(p)} cannot be enumerated: {reason}. {repair or usual}")
