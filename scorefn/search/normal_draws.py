"""Standard normal coordinates of the points of a generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FAR = 1e100


def orthogonal_directions(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    """Standard normal vectors ``[n, D]``, orthogonal within blocks of at most D; each keeps a length of its own.

    Each vector alone is exactly normal. Source: Yu et al. (2016), "Orthogonal random features", section 3.
    """
    g = torch.randn((count, dimension), dtype=torch.float64, device=generator.device, generator=generator)
    if dimension == 1 or count == 1:
        return g
    if count <= dimension:
        return _orthogonal(g)
    return torch.cat([_orthogonal(block) for block in g.split(dimension)])


def _orthogonal(g: Tensor) -> Tensor:
    """At most D rows ``[n, D]``, turned into orthogonal directions; each keeps its length."""
    q, r = torch.linalg.qr(g.T)
    turned: Tensor = (q * torch.copysign(torch.linalg.vector_norm(g, dim=1), r.diagonal())).T
    return turned


def local_coordinates(points: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """The z ``[N, D]`` of which points ``[N, D]`` are ``mean + factor z``; factor ``[D, D]``."""
    z: Tensor = torch.linalg.solve(factor, (points - mean).T).T
    return z


def pulled_back(z: Tensor) -> Tensor:
    """Local coordinates ``[N, D]``, none longer than ``sqrt D + 6``: what no draw is, and an injected point may be.

    Each keeps its direction, however far it lies.

    Source: Hansen (2011), "Injecting external solutions into CMA-ES", whose bound is tighter.
    """
    longest = math.sqrt(z.shape[1]) + 6
    largest = z.abs().amax(1, keepdim=True)
    z = torch.where(largest > _FAR, z * (_FAR / largest), z)  # their squares would overflow
    bounded: Tensor = z * (longest / torch.linalg.vector_norm(z, dim=1, keepdim=True)).clamp(max=1)
    return bounded
