"""Which batch dimensions are problems of their own: a joint draw has to know before f is called."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.distributions import Independent

from scorefn.core import ScorefnError, ShapeError


def check_batch_ndim(batch_ndim: Any) -> None:
    """Refuse what is neither None nor an integer of at least 0."""
    if batch_ndim is None:
        return
    if isinstance(batch_ndim, bool) or not hasattr(batch_ndim, "__index__") or operator.index(batch_ndim) < 0:
        raise ScorefnError(
            f"batch_ndim={batch_ndim!r} must be None or an integer of at least 0: how many leading batch dimensions "
            "are problems of their own."
        )


def problem_shape(p: Any, batch_ndim: int | None) -> tuple[int, ...]:
    """``[*B]``, the shape of the independent problems in p.

    Args:
        p: a distribution; anything without a batch shape is one problem.
        batch_ndim: how many leading batch dimensions are problems of their own. None: all of them where p is an
            ``Independent``, whose event is the joint draw, and otherwise none: all batch dimensions are drawn jointly.

    Raises:
        ShapeError: p has fewer batch dimensions.
    """
    batch = tuple(getattr(p, "batch_shape", ()))
    if batch_ndim is None:
        return batch if isinstance(p, Independent) else ()
    if batch_ndim > len(batch):
        raise ShapeError(
            f"batch_ndim={batch_ndim} batch dimensions were declared problems of their own, but the batch shape of "
            f"{type(p).__name__} is {batch}: it has {len(batch)}. Lower batch_ndim."
        )
    return batch[:batch_ndim]


def check_problems(owner: object, p: Any, points: int, fx: Tensor, problems: tuple[int, ...]) -> None:
    """Refuse values that are not ``[M, *B]`` with the B that was sampled for."""
    if tuple(fx.shape) == (points, *problems):
        return
    batch, name = tuple(getattr(p, "batch_shape", ())), type(owner).__name__
    found = fx.ndim - 1
    repair = (
        f"If these are the problems, say so before the draws are made: {name}(..., batch_ndim={found}), or let "
        "Independent(p, ...) declare the dimensions that are drawn jointly. "
        if tuple(fx.shape[1:]) == batch[: max(found, 0)] and fx.shape[:1] == (points,)
        else ""
    )
    raise ShapeError(
        f"f returned shape {tuple(fx.shape)}, but {name} drew {points} points of {type(p).__name__} with batch shape "
        f"{batch} for problems of shape {problems}, and all other dimensions jointly: f must return [M, *B] = "
        f"{(points, *problems)}. {repair}Otherwise reduce f over the dimensions that are drawn jointly."
    )
