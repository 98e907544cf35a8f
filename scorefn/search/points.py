"""What users hand in (starts, step sizes, points, values) as float64 tensors; shapes are checked, never repaired."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError

Numbers: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]
"""A tensor, an array, or (nested) lists of numbers."""

WIDEST = 1e150
"""The squares of larger numbers are infinite, and so are variances."""


def as_start(x0: Numbers) -> Tensor:
    """The start ``[D]``, in float64 and on the device of x0; a copy."""
    start = as_numbers(x0, "x0", x0.device if isinstance(x0, Tensor) else torch.device("cpu")).clone()
    if start.ndim != 1 or start.numel() == 0:
        raise ShapeError(
            f"x0 must be one point of shape [D], but it has shape {tuple(start.shape)}: the search runs over vectors. "
            "Flatten it, and reshape inside the function."
        )
    if not bool(torch.isfinite(start).all()):
        bad = (~torch.isfinite(start)).nonzero().flatten().tolist()
        raise NonFiniteError(f"x0 is not finite at coordinates {bad[:10]}: no distribution can be centred there.")
    return start


def as_sigma(sigma0: float | Numbers, start: Tensor) -> Tensor:
    """The initial standard deviations ``[D]``."""
    sigma = as_numbers(sigma0, "sigma0", start.device)
    if sigma.ndim and sigma.shape != start.shape:
        raise ShapeError(
            f"sigma0 has shape {tuple(sigma.shape)}, but x0 has shape {tuple(start.shape)}: give one number, or one "
            "standard deviation per coordinate."
        )
    if not bool(((sigma > 0) & torch.isfinite(sigma)).all()):
        raise ScorefnError(
            f"sigma0 must be positive and finite, but it is {sigma0}: it is the standard deviation of the first "
            "points. About a quarter of the width of the region of interest is a good choice."
        )
    if float(torch.maximum(start.abs(), sigma).max()) > WIDEST:
        raise ScorefnError(
            f"x0 and sigma0 may be as large as {WIDEST:g}, but they reach {float(start.abs().max()):g} and "
            f"{float(sigma.max()):g}: their squares would be infinite in float64. Search in other units."
        )
    return sigma.expand_as(start).clone()


def as_points(x: Numbers, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The told points ``[N, D]``."""
    points = as_numbers(x, "x", device)
    if tuple(points.shape) != shape:
        raise ShapeError(
            f"tell needs the points x of a whole generation, [N, D] = {shape}, but x has shape {tuple(points.shape)}. "
            "Pass what ask returned (repaired points are welcome), and NaN as the value of points that failed."
        )
    if not bool(points.sum().isfinite()) and not bool(torch.isfinite(points).all()):  # the sum is a fifth of the cost
        bad = (~torch.isfinite(points).all(1)).nonzero().flatten().tolist()
        raise NonFiniteError(f"The told points are not finite in rows {bad[:10]}: pass those that were evaluated.")
    return points


def as_values(f: Numbers, num_values: int, device: torch.device) -> Tensor:
    """The told values ``[N]``; NaN and infinities are kept (they mark failures)."""
    values = as_numbers(f, "f", device)
    if tuple(values.shape) != (num_values,):
        repair = "Give one value per point, and NaN to points that failed."
        if tuple(values.shape) == (num_values, 1):
            repair = "The trailing 1 would broadcast [N] against [N, 1]: use f.squeeze(-1)."
        raise ShapeError(
            f"The values f must be [N] = ({num_values},), but they have shape {tuple(values.shape)}. {repair}"
        )
    return values


def is_number(value: object) -> bool:
    """Whether this is one real number, of Python or numpy, that float64 holds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def as_integer(value: Any) -> int | None:
    """The int of whatever has an ``__index__``, numpy's integers among them; None where it is none, or a flag."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_numbers(value: object, name: str, device: torch.device, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """A tensor of real numbers of any shape; dtype None: as they are."""
    if isinstance(value, Sequence) and value and all(isinstance(entry, Tensor) for entry in value):
        try:
            value = torch.stack([entry.detach() for entry in value])
        except RuntimeError as error:
            raise ShapeError(f"{name} is a list of tensors of different shapes or devices; all must agree.") from error
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ScorefnError(f"{name} is complex, but only real numbers have an order: take a norm or the real part.")
        if value.device != device:
            raise ScorefnError(
                f"{name} is on {value.device}, but the search runs on {device}, the device of x0: move one of them; "
                "scorefn never copies between devices."
            )
        return value.detach() if dtype is None else value.detach().to(dtype)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"{name} is a ragged list; all of its rows must have one length.") from error
    if array.dtype.kind not in "biuf":
        repair = (
            "Tell NaN where an evaluation returned nothing." if name == "f" else "Convert it, for instance by float."
        )
        raise ScorefnError(
            f"{name} must hold real numbers, but it holds {array.dtype}, namely {_excerpt(value)}: there is no order "
            f"and no arithmetic in float64 for these. {repair}"
        )
    return torch.tensor(array.astype(np.float64), device=device) if dtype else torch.tensor(array, device=device)


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
