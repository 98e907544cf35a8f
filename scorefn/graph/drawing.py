"""How the draws of a site are made and laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import ScorefnError, ShapeError
from scorefn.graph.records import Axis, Path


def drawn(
    name: str, dist: Any, lead: tuple[int, ...], outer: Path | None, number: int | None, pathwise: bool
) -> tuple[Tensor, Tensor, Path]:
    """As it came from dist, ``[N, *axes, *batch, *event]``, and the axes.

    Args:
        name: of the site.
        dist: its distribution.
        lead: N and the sizes of the axes that lead its batch shape.
        outer: these axes; None: dist has no parents, so that it is drawn N times.
        number: of draws along an axis of the site's own.
        pathwise: by ``rsample``.
    """
    draw, own = dist.rsample if pathwise else dist.sample, () if number is None else (number,)
    raw = draw(torch.Size(lead + own if outer is None else own))
    if not isinstance(raw, Tensor):
        raise ScorefnError(f"Site {name!r} drew a {type(raw).__name__}, and only tensors can be followed.")
    if raw.requires_grad and not pathwise:
        raise ScorefnError(
            f"The draws of site {name!r} require grad: differentiating through them as well as through log_prob counts "
            "the gradient twice. Detach them in sample(), or pass pathwise=True."
        )
    before = outer or ()
    path = before if number is None else (*before, Axis(name, number))
    return raw, raw if outer is None or number is None else raw.movedim(0, len(lead)), path


def coupled(
    name: str, dist: Any, lead: tuple[int, ...], outer: Path | None, estimator: Any
) -> tuple[Any, Tensor, Path]:
    """The same by an estimator: one call for a distribution that knows its parents, otherwise N calls.

    Raises:
        ScorefnError: it draws more than values of the site.
        ShapeError: it does not serve the batch and event shape.
    """
    if outer is None:
        several = [_joint(name, dist, estimator) for _ in range(lead[0])]
        weights = torch.stack([estimator.weights(dist, x) for x in several]).detach()
        return several, torch.stack(several), (Axis(name, len(several[0]), weights, coupled=True),)
    dist = of_parents(dist, len(lead), estimator)
    x = _joint(name, dist, estimator)
    weights = estimator.weights(dist, x).detach()
    weights = weights.expand(*lead, len(x)) if weights.ndim == 1 else weights.movedim(0, len(lead))
    return x, x.movedim(0, len(lead)), (*outer, Axis(name, len(x), weights, coupled=True))


def of_parents(dist: Any, leading: int, estimator: Any) -> Any:
    """dist as an estimator is given it: the first ``leading`` dimensions of its batch, draws of parents, are problems.

    This matters to estimators that otherwise take all batch dimensions of a plain distribution for one joint draw.
    """
    plain = isinstance(dist, Distribution) and not isinstance(dist, Independent)
    if plain and getattr(estimator, "batch_ndim", 0) is None:
        return Independent(dist, len(dist.batch_shape) - leading)
    return dist


def check_axis(name: str, number: int, before: int) -> None:
    """Refuse as many draws as the axis before has: an axis that is left out by mistake would not be noticed."""
    if number == before > 1:
        raise ShapeError(
            f"Site {name!r} has {number} draws of its own for each of {before} draws of the graph or of its parents. "
            f"With equal numbers a forgotten axis would be broadcast along the wrong one, silently: [{before}, ...] of "
            f"the parents belongs to [{before}, 1, ...] beside [{before}, {number}, ...]. Choose different numbers."
        )


def _joint(name: str, dist: Any, estimator: Any) -> Tensor:
    x = estimator.sample(dist)
    if not isinstance(x, Tensor) or x.requires_grad:
        raise ScorefnError(
            f"{type(estimator).__name__} draws more than values of a site (it needs the costs at other points, or "
            f"their gradient), but site {name!r} is paid for at its draws alone. Use another estimator there, or none."
        )
    shape = (*getattr(dist, "batch_shape", x.shape[1:]), *getattr(dist, "event_shape", ()))
    if tuple(x.shape[1:]) != shape:
        raise ShapeError(
            f"{type(estimator).__name__} drew {tuple(x.shape)} for site {name!r}, whose draws are [M, *batch, *event] "
            f"with {shape} after M: it does not serve this batch and event shape."
        )
    return x
