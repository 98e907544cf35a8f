"""Couplings: how the draws of a plain measure share randomness.

Each draw follows p exactly, whatever the others are; draws that share randomness form a block, and blocks are
independent of each other. So every coupling here is unbiased, with or without a baseline, as long as a baseline leaves
out the whole block, as ``LeaveOneOut`` does: one that leaves out the draw alone reads the draw in its partners.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent as IndependentDistribution
from torch.distributions import StudentT, VonMises
from torch.quasirandom import SobolEngine

from scorefn.core import Independent, Measure, ScorefnError, nearest
from scorefn.core.representation import representation
from scorefn.reducers.quantiles import SAMPLING, device_of, from_normal, quantile, uniform_shape

__all__ = ["Antithetic", "Independent", "OrthogonalGaussian", "Sobol", "Stratified", "Systematic"]


class _Blocks(ABC):
    """A coupling of uniforms: blocks that are independent of each other, made into draws by ``quantile``."""

    unbiased = True

    def sample(self, p: Measure, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws ``[N, *batch, *event]``, each distributed as p, and their block ``[N]``."""
        u, block = self.uniforms(num_samples, uniform_shape(p), device_of(p))
        return quantile(p, u), block

    @abstractmethod
    def uniforms(self, n: int, shape: torch.Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Uniforms ``[N, *shape]`` in (0, 1), float64, and their block ``[N]``."""


@dataclass(frozen=True)
class Antithetic(_Blocks):
    """Pairs ``u`` and ``1 - u``: for a symmetric family x and its mirror image ``2 loc - x``.

    ``StudentT`` and ``VonMises``, symmetric families without a quantile function, are sampled and mirrored as they are.

    What is odd around the median cancels within a pair. The score of a location is odd and that of a scale even, so
    the gradient of a location loses the noise of the even part of f and that of a scale the noise of the odd part;
    the other parts are seen by half as many draws, and their noise is up to twice as large. Source: Hammersley &
    Morton (1956), "A new Monte Carlo technique: antithetic variates".

    Raises:
        ScorefnError: an odd number of draws.

    Example:
        >>> import torch, scorefn as sf
        >>> loc = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Normal(loc, 1.0)
        >>> sf.expectation(p, torch.square, 8, coupling=sf.Antithetic()).backward()
        >>> bool(loc.grad.abs() < 1e-12)  # f is even, and all its noise cancels
        True
    """

    __repr__ = representation

    def sample(self, p: Measure, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws ``[N, *batch, *event]``, each distributed as p, and their block ``[N]``."""
        family: Any = p
        while nearest(type(family), (IndependentDistribution,), SAMPLING) == (IndependentDistribution, ""):
            family = family.base_dist
        mirror, override = nearest(type(family), (StudentT, VonMises), SAMPLING)
        if mirror is None or override:
            return super().sample(p, num_samples)
        x = family.sample(torch.Size((_count(num_samples, 2, "Antithetic"),))).detach()
        mirrored = 2 * family.loc.detach() - x
        if mirror is VonMises:  # an angle
            mirrored = (mirrored + math.pi) % (2 * math.pi) - math.pi
        return _labelled(torch.stack([x, mirrored], 1))

    def uniforms(self, n: int, shape: torch.Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``[N, *shape]`` and the block ``[N]``: draws 2i and 2i + 1 are a pair."""
        u = _rand((_count(n, 2, "Antithetic"), 1, *shape), device)
        return _labelled(torch.cat([u, 1 - u], 1))


@dataclass(frozen=True)
class Stratified(_Blocks):
    """Latin hypercubes: in each coordinate, one draw of a block in each of ``strata`` equal cells of probability.

    ``u_i = (pi(i) + v_i) / strata`` with a random permutation pi and uniform v_i, in each coordinate anew: what is
    additive over the coordinates of u is integrated with an error of order strata^-3/2. Source: McKay, Beckman &
    Conover (1979), "A comparison of three methods for selecting values of input variables".

    Args:
        strata: draws per block; it must divide N. None: the largest that leaves two blocks.

    Raises:
        ScorefnError: N is no multiple of ``strata``, or, where that is None, N is 2 or has no divisor.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Uniform(torch.zeros(2), 1.0)
        >>> x, block = sf.Stratified(4).sample(p, 8)
        >>> (4 * x[block == 0]).floor().sort(0).values.T  # one in each quarter, either way
        tensor([[0., 1., 2., 3.],
                [0., 1., 2., 3.]])
    """

    strata: int | None = None

    __repr__ = representation

    def uniforms(self, n: int, shape: torch.Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``[N, *shape]`` and the block ``[N]``."""
        size = _size(n, self.strata, n, "Stratified")
        count = _count(n, size, "Stratified")
        cell = _permutations(count, size, shape, device)
        return _labelled((cell + _rand((count, size, *shape), device)) / size)


@dataclass(frozen=True)
class Systematic(_Blocks):
    """Equally spaced points under one random shift: ``u_i = (pi(i) + v) / points``, v shared by the block.

    In one coordinate this is systematic sampling (Madow & Madow, 1944). In several, the permutations pi and the shifts
    v are independent from coordinate to coordinate: a Latin hypercube whose draws lie at the same place in their
    cells (Patterson, 1954). Without the permutations all draws would lie on one diagonal.

    Args:
        points: draws per block; it must divide N. None: the largest that leaves two blocks.

    Raises:
        ScorefnError: as ``Stratified``.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Uniform(torch.zeros(2), 1.0)
        >>> x, block = sf.Systematic(4).sample(p, 8)
        >>> x[block == 0].sort(0).values.diff(dim=0).T  # equal distances, either way
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """

    points: int | None = None

    __repr__ = representation

    def uniforms(self, n: int, shape: torch.Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``[N, *shape]`` and the block ``[N]``."""
        size = _size(n, self.points, n, "Systematic")
        count = _count(n, size, "Systematic")
        cell = _permutations(count, size, shape, device)
        return _labelled((cell + _rand((count, 1, *shape), device)) / size)


@dataclass(frozen=True)
class Sobol(_Blocks):
    """Scrambled points of Sobol' (1967): quasi-Monte Carlo, each block randomised anew and each point uniform.

    The first log2(points) binary digits of a point are multiplied by a random lower-triangular matrix and shifted by
    random digits, in each coordinate anew (Matousek, 1998, "On the L2-discrepancy for anchored boxes");
    the digits beyond are uniform. The smoother f is (Owen, 1997, "Scrambled net variance for integrals of smooth
    functions"), and the fewer coordinates matter, the more it gains. All coordinates of a draw, those of its batch
    included, share one sequence, and later coordinates are the worse ones.

    Large blocks gain most: all N draws in one block, with a baseline that comes from past draws (``Sobol(N)`` with
    ``MovingAverage()``), beat two blocks with leave-one-out.

    Args:
        points: draws per block, a power of two that divides N. None: the largest that leaves two blocks, so choose N
            a power of two.

    Raises:
        ScorefnError: N is no multiple of ``points``, that is no power of two, or there are more than 21201
            coordinates, for which no Sobol sequence is tabulated.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Uniform(torch.zeros(2), 1.0)
        >>> x, block = sf.Sobol(16).sample(p, 16)
        >>> row, column = (4 * x).long().T
        >>> (4 * row + column).bincount()  # of the 4 x 4 squares each holds one draw
        tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    """

    points: int | None = None

    __repr__ = representation

    def uniforms(self, n: int, shape: torch.Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``[N, *shape]`` and the block ``[N]``."""
        size = _size(n, self.points, n & -n, "Sobol")
        if size & (size - 1):
            raise ScorefnError(
                f"Sobol points are balanced in powers of two, but points = {size}: use {2 ** (size.bit_length() - 1)} "
                f"or {2 ** size.bit_length()}."
            )
        count, dimension = _count(n, size, "Sobol"), shape.numel()
        if dimension > SobolEngine.MAXDIM:
            raise ScorefnError(
                f"A draw has {dimension} coordinates, but Sobol sequences are tabulated up to {SobolEngine.MAXDIM}: "
                "use Stratified(), which has no limit."
            )
        points = _sobol(dimension, size).to(device)
        digits = _integers(0, size, (count, 1, dimension), device)  # the shift
        for b in range(size.bit_length() - 1):  # the image of digit b: itself, and random ones below it
            image = _integers(2**b, 2 ** (b + 1), (count, 1, dimension), device)
            digits = digits ^ (image * (points >> b & 1))
        digits = digits.expand(count, size, dimension).reshape(count, size, *shape)
        return _labelled((digits + _rand((count, size, *shape), device)) / size)


@dataclass(frozen=True)
class OrthogonalGaussian:
    """Gaussian draws in orthogonal directions, each of a length of its own.

    A block is ``z_i = r_i q_i`` with q the columns of a random orthogonal matrix and independent r_i ~ chi_D, so each
    z_i is standard normal (Yu et al., 2016, "Orthogonal random features", section 3; Choromanski et al., 2018,
    "Structured evolution with compact architectures"). D counts the coordinates of the event, for each entry of the
    batch apart; without an event, those of the whole batch.

    Args:
        directions: of a block, at most D; None: as many as fit and leave two blocks.
        mirrored: each direction is used both ways, and a block has twice as many draws.

    Raises:
        ScorefnError: p is not made of a Gaussian, N is no multiple of the block, or there are more directions than D.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        >>> x, block = sf.OrthogonalGaussian(3).sample(p, 6)
        >>> x[block == 0].shape
        torch.Size([3, 3])
        >>> products = x[block == 0] @ x[block == 0].T
        >>> bool((products - products.diag().diag()).abs().max() < 1e-4)  # right angles
        True
    """

    directions: int | None = None
    mirrored: bool = False
    unbiased = True

    __repr__ = representation

    def sample(self, p: Measure, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draws ``[N, *batch, *event]``, each distributed as p, and their block ``[N]``."""
        shape = uniform_shape(p)
        batch = torch.Size(getattr(p, "batch_shape", ()))
        batch = batch if len(shape) > len(batch) else torch.Size()
        dimension = shape[len(batch) :].numel()
        sides = 2 if self.mirrored else 1
        name = "OrthogonalGaussian"
        if self.mirrored and num_samples % 2:
            _count(num_samples, 2, f"{name}(mirrored=True)")
        size = 1 if dimension == 1 else _size(num_samples // sides, self.directions, dimension, name)
        if size > dimension:
            raise ScorefnError(
                f"{size} directions cannot be orthogonal in {dimension} dimension(s): use directions={dimension} or "
                "fewer, or None."
            )
        count = _count(num_samples, sides * size, name)
        g = _randn((count, *batch, dimension, size), device_of(p))
        q, r = torch.linalg.qr(g)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # Haar; it depends on the directions of g alone
        z = (q * torch.linalg.vector_norm(g, dim=-2, keepdim=True)).movedim(-1, 1).reshape(count, size, *shape)
        z, block = _labelled(torch.cat([z, -z], 1) if self.mirrored else z)
        return from_normal(p, z), block


# ------------------------------------------------------------------------------------------------ blocks and dice


def _size(n: int, given: int | None, most: int, name: str) -> int:
    """Draws per block: what was given, or the largest divisor of N, at most ``most``, that leaves two blocks."""
    if given is not None:
        if isinstance(given, bool) or not hasattr(given, "__index__") or operator.index(given) < 1:
            raise ScorefnError(
                f"A block needs a draw at least, but {name} was given {given!r}: use an integer of at least 1, or None "
                "to have the size chosen."
            )
        return operator.index(given)
    size = next((size for size in range(min(most, n // 2), 1, -1) if n % size == 0), 1)
    if size == 1:
        raise ScorefnError(
            f"{name} cannot split {n} draws into two equal blocks or more that hold two draws or more: choose a "
            "num_samples with more divisors, such as a power of two from 4 on, or give the size of a block."
        )
    return size


def _count(n: int, size: int, name: str) -> int:
    """How many blocks N draws make."""
    if n % size:
        fewer = max(1, n // size)
        raise ScorefnError(
            f"{name} makes its draws in blocks of {size}, which share their randomness, but num_samples is {n}: an "
            f"incomplete block would lose its balance. Use {fewer * size} or {(fewer + 1) * size}."
        )
    return n // size


def _labelled(u: Tensor) -> tuple[Tensor, Tensor]:
    """``[blocks, size, *shape]`` to ``[N, *shape]`` and the block ``[N]``."""
    return u.flatten(0, 1), torch.arange(len(u), device=u.device).repeat_interleave(u.shape[1])


def _rand(shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=device)


def _randn(shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


def _integers(low: int, high: int, shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    """Uniform on low, ..., high - 1."""
    return torch.randint(low, high, shape, device=device)


def _permutations(count: int, size: int, shape: torch.Size, device: torch.device | None) -> Tensor:
    """Independent random permutations along the second axis, ``[count, size, *shape]``."""
    return torch.rand((count, size, *shape), dtype=torch.float64, device=device).argsort(1)


@lru_cache(maxsize=16)
def _sobol(dimension: int, size: int) -> Tensor:
    """The first points of the sequence as integers in 0, ..., size - 1: ``[size, dimension]``."""
    if dimension == 0:
        return torch.zeros(size, 0, dtype=torch.long)
    return (SobolEngine(dimension).draw(size, dtype=torch.float64) * size).long()
