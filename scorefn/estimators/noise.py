"""The uniforms of antithetic and relaxed draws: the only place where these draw randomness."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uniforms in [0, 1), of the dtype and on the device of a tensor."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)
