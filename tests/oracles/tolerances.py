"""What is equal, and what is seen to differ."""

from __future__ import annotations

from torch import Tensor

EXACT = 1e-10
VISIBLE = 1e-3


def near(ours: Tensor, truth: Tensor, tolerance: float = 1e-11) -> bool:
    """Equal to rounding, relatively for what is large: without the looseness that `allclose` has by default."""
    return bool(((ours - truth).abs() <= tolerance * truth.abs().clamp(min=1.0)).all())
