"""First-order linear recurrences by a log-step scan."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import ShapeError


def linear_recurrence(x: Tensor, decay: Tensor | float, *, reverse: bool = False, dim: int = 0) -> Tensor:
    """``y_t = x_t + decay_t * y_{t-1}`` along ``dim``, or ``y_t = x_t + decay_t * y_{t+1}`` with ``reverse``.

    A log-step scan (Hillis & Steele, 1986): log2(T) rounds of ``y_t += a_t y_{t-s}``, ``a_t *= a_{t-s}``, with no
    division, so that decays of 0 (the end of an episode) cut exactly. Differentiable in x and decay.

    Args:
        x: any shape; T is its size along ``dim``.
        decay: a number, or a tensor that broadcasts to x; the first one (with ``reverse`` the last) is not used.
        reverse: run from the end.
        dim: the axis of time.

    Returns:
        y, of the shape of x.

    Raises:
        ShapeError: decay does not broadcast to x.

    Example:
        >>> linear_recurrence(torch.tensor([1.0, 1.0, 1.0]), 0.5, reverse=True)
        tensor([1.7500, 1.5000, 1.0000])
    """
    length = x.shape[dim]
    coefficient: Tensor | float = decay
    if isinstance(decay, Tensor) and decay.ndim:
        try:
            coefficient = torch.broadcast_to(decay, x.shape)
        except RuntimeError as error:
            raise ShapeError(
                f"decay {tuple(decay.shape)} does not broadcast to x {tuple(x.shape)}: give one decay per step."
            ) from error
    elif isinstance(decay, float | int) and decay == 1:
        return x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)
    y, step = x, 1
    while step < length:
        rest = length - step
        near, far = (0, step) if reverse else (step, 0)  # y[near] is at t, y[far] at t -+ step

        def at(tensor: Tensor, start: int, rest: int = rest) -> Tensor:
            return tensor.narrow(dim, start, rest)

        factor = at(coefficient, near) if isinstance(coefficient, Tensor) and coefficient.ndim else coefficient
        moved = at(y, near) + factor * at(y, far)
        kept = y.narrow(dim, rest if reverse else 0, step)  # no term lies step beyond the border
        y = torch.cat([moved, kept] if reverse else [kept, moved], dim)
        if isinstance(coefficient, Tensor) and coefficient.ndim:
            product = at(coefficient, near) * at(coefficient, far)
            edge = coefficient.narrow(dim, rest if reverse else 0, step)
            coefficient = torch.cat([product, edge] if reverse else [edge, product], dim)
        else:
            coefficient = coefficient * coefficient
        step *= 2
    return y.clone() if y is x else y
