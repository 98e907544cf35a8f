"""Gradients of several parameters as one vector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def flat(parts: Iterable[Tensor]) -> Tensor:
    """All entries of some tensors, one after the other, detached: ``[P]``."""
    return torch.cat([part.detach().reshape(-1) for part in parts])


def flat_grad(parameters: Iterable[Tensor]) -> Tensor:
    """What backward left in the parameters' ``.grad``, ``[P]``; zeros where it left nothing."""
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
