"""The forms in which users give bounds, read as a box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.bounds import Bounds, Everywhere, SmoothBounds

BoundsLike: TypeAlias = Bounds | Sequence[Any] | Any
"""``Bounds``, ``(lower, upper)``, a list of ``(low, high)`` per coordinate, or ``scipy.optimize.Bounds``."""


def as_bounds(bounds: BoundsLike, start: Tensor) -> Bounds:
    """Bounds in the forms that users have, as a box for x0 ``[D]``; None is the whole space.

    D rows of two numbers are pairs ``(low, high)``, as for ``scipy.optimize.minimize``; so are two rows of two where D
    is 2, whatever numbers they hold. Everything else of two entries is ``(lower, upper)``.

    Raises:
        ScorefnError: what is no box.
        ShapeError: bounds of another length than x0.
    """
    if bounds is None:
        return Everywhere()
    if isinstance(bounds, Bounds):
        return bounds
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return SmoothBounds(_broadcast(bounds.lb), _broadcast(bounds.ub))
    entries = list(bounds) if isinstance(bounds, Sequence | np.ndarray | Tensor) else []
    dimension = len(start)
    lengths = [None if entry is None else _length(entry) for entry in entries]
    if len(entries) == dimension and all(length == 2 for length in lengths):
        return _of_pairs(entries, start)
    if len(entries) == 2 and all(length in (None, dimension) for length in lengths):
        return SmoothBounds(entries[0], entries[1])
    raise ShapeError(
        f"bounds must be (lower, upper), each one number or {dimension} of them, or {dimension} pairs (low, high), "
        f"but they are {bounds!r}. Open sides are None or infinite."
    )


def _of_pairs(pairs: list[Any], start: Tensor) -> Bounds:
    """The box of ``(low, high)`` for each coordinate, in which the start ``[D]`` must lie."""
    try:
        box = SmoothBounds([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        box.start(start)
        return box
    except ScorefnError as error:
        if len(pairs) != 2:
            raise
        raise type(error)(
            f"{error} Two rows of two numbers, arrays too, were read as pairs (low, high), one for each coordinate: "
            "for the other reading write SmoothBounds(lower, upper)."
        ) from error


def _broadcast(side: Any) -> Any:
    """One number for all coordinates, where SciPy keeps it as an array of one."""
    return side[0] if np.ndim(side) == 1 and len(side) == 1 else side


def _length(entry: object) -> int | None:
    shape = getattr(entry, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    return len(entry) if isinstance(entry, Sequence) else None
