"""Gauss-Hermite nodes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal, exact for polynomials of degree below 2n."""
    off_diagonal = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, vectors[0].square()


def normal_points(loc: Tensor, scale: Tensor, n: int = 10) -> tuple[Tensor, Tensor]:
    """`[P, *B]` points and weights of a batch of normals."""
    nodes, weights = gauss_hermite(n)
    lead = (-1, *[1] * loc.ndim)
    return loc + scale * nodes.reshape(lead), weights.reshape(lead).expand(-1, *loc.shape)
