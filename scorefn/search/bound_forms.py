"""The forms in which users give bounds, read as a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.bounds import Bounds, Everywhere, SmoothBounds

BoundsLike: TypeAlias = Bounds | Sequence[Any] | Any
"""``Bounds``, ``(lower, upper)``, a list of ``(low, high)`` per coordinate, or ``scipy.optimize.Bounds``."""


def as_bounds(bounds: BoundsLike, start: Tensor) -> Bounds:
    """Bounds in the forms that users have, as a box for x0 ``[D]``; None is the whole space.

    Raises:
        ScorefnError: what is no box, or a list of two pairs that may mean two things.
        ShapeError: bounds of another length than x0.
    """
    if bounds is None:
        return Everywhere()
    if isinstance(bounds, Bounds):
        return bounds
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return SmoothBounds(bounds.lb, bounds.ub)
    entries = list(bounds) if isinstance(bounds, Sequence | np.ndarray | Tensor) else []
    dimension = len(start)
    lengths = [None if entry is None else _length(entry) for entry in entries]
    as_sides = len(entries) == 2 and all(length in (None, dimension) for length in lengths)
    as_pairs = len(entries) == dimension and all(length == 2 for length in lengths)
    if not as_sides and not as_pairs:
        raise ShapeError(
            f"bounds must be (lower, upper), each one number or {dimension} of them, or {dimension} pairs (low, high), "
            f"but they are {bounds!r}. Open sides are None or infinite."
        )
    readings = []
    if as_sides:
        readings.append((entries[0], entries[1]))
    if as_pairs:
        readings.append(([entry[0] for entry in entries], [entry[1] for entry in entries]))
    boxes, refusal = [], None
    for lower, upper in readings:
        try:
            boxes.append(SmoothBounds(lower, upper))
        except ScorefnError as error:
            refusal = error
    if len(boxes) == 2 and not (
        torch.equal(boxes[0].lower, boxes[1].lower) and torch.equal(boxes[0].upper, boxes[1].upper)
    ):
        raise ScorefnError(
            f"bounds={bounds!r} may mean (lower, upper) or a pair (low, high) for each of the two coordinates. Say "
            "which: SmoothBounds(lower, upper)."
        )
    if not boxes and refusal is not None:
        raise refusal
    return boxes[0]


def _length(entry: object) -> int | None:
    shape = getattr(entry, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    return len(entry) if isinstance(entry, Sequence) else None
