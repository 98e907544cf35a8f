"""Discrete states under continuous globals: what ``mixture`` and ``hmm`` share.

A model has a few globals g and many discrete states z. The guide is ``q(x) q(z | x)``: x is g without its constraints,
``q(x)`` Gaussian with a full covariance and by default pathwise, ``q(z | x)`` sampled, never summed. Since sums over z
are cheap given x, Gauss-Hermite quadrature gives the bound of any guide, with its gradient. The exact posterior is in
``latent_posterior``, fits in ``latent_fit``, the noise of gradients in ``latent_gradients``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

TOGETHER = 1000
"""Draws of a fitted guide, and nodes of a quadrature, that run together."""


# ----------------------------------------------------------------------------------------------------------- quadrature


def hermite(dims: int, per_dim: int) -> tuple[Tensor, Tensor]:
    """Nodes ``[M, dims]`` and weights ``[M]`` for the mean under a standard Gaussian, M = per_dim ** dims.

    Exact for polynomials of degree ``2 per_dim - 1`` in each coordinate.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(per_dim))
    nodes = torch.cartesian_prod(*[points] * dims).reshape(-1, dims)
    weight = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * dims).reshape(-1, dims).prod(-1)
    return nodes, weight


# ------------------------------------------------------------------------------------------------------ model and guide


class Globals(nn.Module):
    """N(loc, L L^T) with ``L = diag(exp(log_scale)) (I + strictly lower)``.

    Args:
        loc: ``[D]``, where it starts.
        scale: of each coordinate at the start.
    """

    def __init__(self, loc: Tensor, scale: float = 0.1) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        self.lower = nn.Parameter(loc.new_zeros(len(loc), len(loc)))

    @property
    def scale_tril(self) -> Tensor:
        """L."""
        unit = torch.eye(len(self.loc), dtype=self.loc.dtype) + self.lower.tril(-1)
        return self.log_scale.exp().unsqueeze(-1) * unit

    def normal(self) -> Any:
        """As a distribution of Pyro."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def white(self, x: Tensor) -> Tensor:
        """``L^-1 (x - loc)``."""
        solved: Tensor = torch.linalg.solve_triangular(
            self.scale_tril, (x - self.loc).unsqueeze(-1), upper=False
        ).squeeze(-1)
        return solved

    def nodes(self, per_dim: int) -> tuple[Tensor, Tensor]:
        """x ``[M, D]``, differentiable, and weights ``[M]``."""
        standard, weight = hermite(len(self.loc), per_dim)
        return self.loc + standard @ self.scale_tril.mT, weight

    def set(self, loc: Tensor, covariance: Tensor) -> None:
        """Take this mean and covariance."""
        tril = torch.linalg.cholesky(covariance)
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(tril.diagonal().log())
            self.lower.copy_((tril / tril.diagonal().unsqueeze(-1)).tril(-1))


class Part(NamedTuple):
    """A global of the model as a function of x: its value, and log |d value / d x|."""

    value: Tensor
    log_jacobian: Tensor


class Program(nn.Module, ABC):
    """A model and a guide as Pyro programs, and what sums over the states say of both.

    Batches of x are ``[M, D]`` in all methods but ``parts``.

    Args:
        pathwise: whether x is reparameterised; otherwise it is a decision like the states.
    """

    name: ClassVar[str]
    depth: ClassVar[int]
    """Plates of the model, ``max_plate_nesting``."""
    labels: ClassVar[tuple[str, ...]]
    """Of the globals that ``values`` gives."""

    def __init__(self, *, pathwise: bool = True) -> None:
        super().__init__()
        self.pathwise = pathwise
        self.globals = Globals(self.start())

    @abstractmethod
    def start(self) -> Tensor:
        """x where guides and searches start, ``[D]``."""

    @abstractmethod
    def parts(self, x: Tensor) -> dict[str, Part]:
        """The model's globals by site; x is ``[*batch, D]``, values are ``[*batch, *event]``."""

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """The globals whose means count, ``[M, G]``."""

    @abstractmethod
    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y), ``[M]``: the states are summed out, the density is that of x."""

    @abstractmethod
    def states(self, x: Tensor) -> Tensor:
        """P(state = 1 | x, y), ``[M, S]``."""

    @abstractmethod
    def guide_states(self, x: Tensor) -> Tensor:
        """q(state = 1 | x), ``[M, S]``."""

    @abstractmethod
    def expected(self, x: Tensor) -> Tensor:
        """E log p(x, z, y) - log q(z | x) over q(z | x), ``[M]``."""

    @abstractmethod
    def model(self) -> None:
        """The log joint."""

    @abstractmethod
    def sample_states(self, x: Tensor, infer: dict[str, Any]) -> None:
        """q(z | x); ``infer`` goes to every site."""

    def guide(self, infer: Mapping[str, Any] | None = None) -> None:
        """q(x) q(z | x): an auxiliary Gaussian, from which the model's globals follow."""
        own = pyro.module(self.name, self)
        normal = own.globals.normal().has_rsample_(self.pathwise)
        x = pyro.sample("x", normal, infer={"is_auxiliary": True})
        for name, (value, log_jacobian) in own.parts(x).items():
            event_dim = value.ndim - log_jacobian.ndim
            pyro.sample(name, dist.Delta(value, -log_jacobian, event_dim=event_dim))
        own.sample_states(x, dict(infer or {}))

    def bound(self, per_dim: int = 5) -> Tensor:
        """The ELBO, differentiable: sums over z, quadrature over x."""
        x, weight = self.globals.nodes(per_dim)
        found: Tensor = weight @ self.expected(x) + self.globals.normal().entropy()
        return found

    @torch.no_grad()
    def moments(self, per_dim: int = 7) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``[G]``, standard deviations ``[G]`` and P(state = 1) ``[S]`` under the guide."""
        x, weight = self.globals.nodes(per_dim)
        values = self.values(x)
        means = weight @ values
        pairs = zip(weight.split(TOGETHER), x.split(TOGETHER), strict=True)
        states = torch.stack([own @ self.guide_states(part) for own, part in pairs]).sum(0)
        return means, (weight @ (values - means).square()).sqrt(), states
