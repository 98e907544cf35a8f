"""What control variates refuse: draws that they cannot correct, and values; and dampings that make no regression."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import Draws, NonFiniteError, ScorefnError, ShapeError, Total, in_transform, nearest

DENSITY = ("log_prob",)
"""What makes a subclass another distribution than the family it inherits from, for its moments."""


def innermost(p: Distribution) -> Any:
    """The distribution inside ``Independent``; inside a subclass only where that keeps its density."""
    inner: Any = p
    while nearest(type(inner), (Independent,), DENSITY) == (Independent, ""):
        inner = inner.base_dist
    return inner


def check_one_value(cv: object, draws: Draws) -> None:
    """Refuse draws on which h would be charged to some decisions only, or counted for some draws only."""
    if draws.fx.shape[-1] != 1 or type(draws.credit) is not Total:
        raise ShapeError(
            f"{type(cv).__name__} corrects one value that all decisions are charged with, but these draws have "
            f"{draws.fx.shape[-1]} value(s) under {draws.credit!r}. Sum the values into one, with credit Total()."
        )
    if draws.mask is not None and draws.mask.shape[-1] == 1:
        raise ScorefnError(
            f"{type(cv).__name__} needs every draw, but the mask says that the one decision of some is absent: which "
            "draws count would then depend on what is corrected. Leave those draws out."
        )


def check_sampled(cv: object, p: Distribution, draws: Draws) -> None:
    """Refuse draws that do not have the shape of those of p."""
    wanted = (len(draws), *p.batch_shape, *p.event_shape)
    found = tuple(draws.x.shape) if isinstance(draws.x, Tensor) else type(draws.x).__name__
    if found != wanted:
        raise ShapeError(
            f"{type(cv).__name__} was given a distribution whose {len(draws)} draws have shape {wanted}, but they have "
            f"{found}: give the distribution that is sampled."
        )


def checked_values(name: str, values: Tensor, draws: Draws) -> Tensor:
    """Values of the dtype and device of the draws, finite; integers are converted."""
    if not values.dtype.is_floating_point:
        values = values.to(draws.fx.dtype)
    if values.dtype != draws.fx.dtype or values.device != draws.fx.device:
        raise ScorefnError(
            f"{name} is {values.dtype} on {values.device} beside values of f that are {draws.fx.dtype} on "
            f"{draws.fx.device}: scorefn neither rounds nor copies silently. Convert one of them."
        )
    check_finite(name, values)
    return values


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinities."""
    if not in_transform() and not bool((finite := values.detach().isfinite()).all()):
        raise NonFiniteError(
            f"{name} is {values.detach()[~finite][0].item()}: it would make the whole gradient NaN. A control variate "
            "must be finite wherever the distribution has mass."
        )


def checked_ridge(ridge: Any) -> float:
    """The damping of a regression, refused unless it is a number, positive and finite."""
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0.0 < float(ridge) < float("inf"):
        raise ScorefnError(
            f"ridge must be a positive number, but it is {ridge!r}: functions or features that repeat each other have "
            "no other solution."
        )
    return float(ridge)
