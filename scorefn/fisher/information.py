"""What a Fisher information is, and the registry of families that have one in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import ScorefnError, ShapeError, nearest, overridden
from scorefn.core.representation import representation

Vector: TypeAlias = Mapping[str, Tensor]
"""One tensor per parameter of a distribution, of its shape ``[*batch, *shape]``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FisherInformation(ABC):
    """``F = E[score score^T]``, the score being the gradient of log p in the parameters of one distribution.

    As ``E[score] = 0`` it is the covariance of the score, and the Hessian of ``KL(p || p')`` at ``p' = p``: the metric
    in which a step has the same length whatever the parameters are called. Nothing in it requires grad. A subclass
    gives ``product``, and ``inverse`` where it knows better than a Cholesky factorisation of ``dense()``.

    Sources: Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10; Martens (2020), "New
    insights and perspectives on the natural gradient method", JMLR 21, sections 5 and 6.

    Args:
        parameters: each ``[*batch, *shape]``, by the name that the constructor gives it; P numbers in all per problem.
        batch_shape: of the distribution: independent problems, each with an F of its own.
        rebuild: makes the distribution from tensors like ``parameters``, as keywords.
        joined: how many batch dimensions ``Independent`` has made part of one draw: F is block diagonal over them.

    Example:
        >>> import torch, scorefn as sf
        >>> fisher = sf.fisher_information(torch.distributions.Normal(0.0, 2.0))
        >>> fisher.dense()  # of loc and scale: 1/s^2 and 2/s^2
        tensor([[0.2500, 0.0000],
                [0.0000, 0.5000]])
        >>> fisher.solve({"loc": torch.tensor(1.0), "scale": torch.tensor(1.0)})
        {'loc': tensor(4.), 'scale': tensor(2.)}
    """

    parameters: Vector
    batch_shape: torch.Size
    rebuild: Callable[..., Distribution] = field(repr=False)
    joined: int = 0

    __repr__ = representation

    def __post_init__(self) -> None:
        """Detach the parameters."""
        object.__setattr__(self, "parameters", {name: value.detach() for name, value in self.parameters.items()})

    @abstractmethod
    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v, for v with any leading dimensions: ``[..., *batch, *shape]`` for each parameter."""

    def inverse(self, gradient: Vector, damping: float) -> dict[str, Tensor]:
        """``(F + damping I)^-1 g``, ``[*batch, *shape]`` for each parameter; in float64, block by block."""
        # The directions that leave p unchanged are orthogonal to F's range and to g, so that filling them changes
        # nothing but makes F invertible, and the solution is the shortest one.
        first = next(iter(self.parameters.values()))
        exact = replace(
            self,
            parameters={name: value.double() for name, value in self.parameters.items()},
            batch_shape=first.shape[: len(self.batch_shape) + self.joined],
            joined=0,
        )
        matrix = exact.dense()
        if (still := exact.unidentified()) is not None and damping == 0:
            size = still.square().sum((-2, -1), keepdim=True).clamp(min=torch.finfo(still.dtype).tiny)
            trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            matrix = matrix + (trace / size) * still @ still.mT
        return exact._unflat(solve_positive(matrix, exact._flat(gradient).double(), damping))

    def unidentified(self) -> Tensor | None:
        """Directions in which p does not change, as columns ``[*batch, P, directions]``; None: none is known.

        Asked for only where nothing is joined.
        """
        return None

    def entries(self, name: str) -> Tensor:
        """Positions of the numbers of a parameter that are free, in its flattened ``shape``."""
        value = self.parameters[name]
        return torch.arange(value.shape[len(self.batch_shape) :].numel(), device=value.device)

    def solve(self, gradient: Vector, damping: float = 0.0) -> dict[str, Tensor]:
        """``(F + damping I)^-1 g``: the natural gradient that belongs to a plain one.

        Where p has directions in which it does not change (a shift of categorical logits, a rotation of a low-rank
        factor) and damping is 0, this is the inverse on the others: see ``fisher_information`` for which solution.

        Args:
            gradient: for each parameter, of its shape ``[*batch, *shape]``.
            damping: added to the diagonal, at least 0; in units of F, hence of the parameters.

        Raises:
            ScorefnError: F + damping I is singular or not finite; damping is negative; a parameter is missing.
            ShapeError: an entry does not have the shape of its parameter.
        """
        check_damping(damping)
        self._check(gradient)
        solution = self.inverse({name: value.detach() for name, value in gradient.items()}, damping)
        return {name: solution[name].to(value) for name, value in self.parameters.items()}

    def dense(self) -> Tensor:
        """The matrix, ``[*batch, P, P]``; parameters in their order, each flattened over ``entries``.

        Raises:
            ScorefnError: it is not finite.
        """
        columns = torch.cat([self.entries(name) for name in self.parameters]).numel()
        kind = next(iter(self.parameters.values()))
        basis = torch.eye(columns, dtype=kind.dtype, device=kind.device)
        basis = basis.reshape(columns, *[1] * len(self.batch_shape), columns)
        rows = self._flat(self.product(self._unflat(basis.expand(columns, *self.batch_shape, columns))))
        matrix = rows.movedim(0, -1)
        check_finite(matrix.diagonal(dim1=-2, dim2=-1))
        return matrix

    def independent(self, rank: int) -> Self:
        """The same numbers for ``Independent(p, rank)``: the last ``rank`` batch dimensions belong to one draw."""
        if rank == 0:
            return self
        batch_shape = self.batch_shape[: len(self.batch_shape) - rank]
        rebuild = partial(_rebuilt_independent, self.rebuild, rank)  # and no closure, which could not be pickled
        return replace(self, batch_shape=batch_shape, rebuild=rebuild, joined=self.joined + rank)

    def _check(self, vector: Vector) -> None:
        if not isinstance(vector, Mapping) or set(vector) != set(self.parameters):
            raise ScorefnError(
                f"The gradient must be a mapping with the parameters {list(self.parameters)}, but it is "
                f"{list(vector) if isinstance(vector, Mapping) else type(vector).__name__}: give each parameter of the "
                "distribution its own tensor, zeros where nothing depends on it."
            )
        for name, value in self.parameters.items():
            if vector[name].shape != value.shape:
                raise ShapeError(
                    f"The gradient of {name} has shape {tuple(vector[name].shape)}, but {name} has shape "
                    f"{tuple(value.shape)}: nothing is broadcast. Give one number per number of {name}."
                )

    def _flat(self, vector: Vector) -> Tensor:
        """``[..., *batch, *shape]`` of each parameter to ``[..., *batch, P]``."""
        parts = []
        for name, value in self.parameters.items():
            event = value.ndim - len(self.batch_shape)
            part = vector[name].flatten(vector[name].ndim - event) if event else vector[name].unsqueeze(-1)
            parts.append(part[..., self.entries(name)])
        return torch.cat(parts, -1)

    def _unflat(self, flat: Tensor) -> dict[str, Tensor]:
        """``[..., *batch, P]`` to ``[..., *batch, *shape]`` of each parameter, 0 where an entry is not free."""
        vector, start = {}, 0
        for name, value in self.parameters.items():
            entries, event = self.entries(name), value.shape[len(self.batch_shape) :]
            part = flat.new_zeros(*flat.shape[:-1], event.numel())
            part[..., entries] = flat[..., start : start + len(entries)]
            vector[name] = part.reshape(*flat.shape[:-1], *event)
            start += len(entries)
        return vector


def _rebuilt_independent(inner: Callable[..., Distribution], rank: int, /, **parameters: Tensor) -> Distribution:
    return torch.distributions.Independent(inner(**parameters), rank, validate_args=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class FisherMatrix(FisherInformation):
    """F as small matrices: every parameter has one number in each place of a common shape.

    What most families need, and what a rule for ``register_fisher`` usually returns.

    Args:
        matrix: ``[*shape, k, k]`` for k parameters of shape ``[*shape]`` each, in their order.

    Raises:
        ShapeError: the matrix has another shape.

    Example:
        >>> import torch, scorefn as sf
        >>> rate = torch.tensor([1.0, 2.0])
        >>> fisher = sf.FisherMatrix(
        ...     parameters={"rate": rate},
        ...     batch_shape=rate.shape,
        ...     rebuild=torch.distributions.Exponential,
        ...     matrix=1 / rate.square()[..., None, None],
        ... )
        >>> fisher.solve({"rate": torch.ones(2)})
        {'rate': tensor([1., 4.])}
    """

    matrix: Tensor = field(repr=False)

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse a matrix that does not fit the parameters."""
        super().__post_init__()
        object.__setattr__(self, "matrix", self.matrix.detach())
        count = len(self.parameters)
        for name, value in self.parameters.items():
            if self.matrix.shape != (*value.shape, count, count):
                raise ShapeError(
                    f"matrix has shape {tuple(self.matrix.shape)}, but {count} parameter(s), of which {name} has shape "
                    f"{tuple(value.shape)}, ask for {(*value.shape, count, count)}: one k x k matrix in each place. "
                    "Expand the matrix, or subclass FisherInformation for parameters of different shapes."
                )

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v, place by place."""
        stacked = torch.stack([vector[name] for name in self.parameters], -1)
        rows = (self.matrix.to(stacked) @ stacked.unsqueeze(-1)).squeeze(-1)
        return dict(zip(self.parameters, rows.unbind(-1), strict=True))

    def inverse(self, gradient: Vector, damping: float) -> dict[str, Tensor]:
        """``(F + damping I)^-1 g``, place by place."""
        stacked = torch.stack([gradient[name] for name in self.parameters], -1).to(self.matrix)
        return dict(zip(self.parameters, solve_positive(self.matrix, stacked, damping).unbind(-1), strict=True))


def solve_positive(matrix: Tensor, vector: Tensor, damping: float, least: float = 0.0) -> Tensor:
    """``(matrix + damping I)^-1 vector`` for a positive definite matrix ``[..., P, P]`` and a vector ``[..., P]``.

    Rows and columns are scaled to a unit diagonal first, so that the units of the parameters do not decide what counts
    as singular: a smallest eigenvalue below ``64 P eps``, or below ``least``.

    Raises:
        ScorefnError: it is singular to rounding, or not finite.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) + damping
    check_finite(diagonal)
    scale = diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt()
    scaled = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    scaled.diagonal(dim1=-2, dim2=-1).copy_(diagonal * scale.square())
    factor, info = torch.linalg.cholesky_ex(scaled)
    least = max(least, 64 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps)
    if bool((diagonal <= 0).any()) or bool((info != 0).any()) or bool((_smallest_eigenvalue(factor) < least).any()):
        raise singular(
            f"The Fisher information of {matrix.shape[-1]} parameter(s) is singular: some direction does not change "
            "the distribution, at least not to rounding"
        )
    return torch.cholesky_solve((vector * scale).unsqueeze(-1), factor).squeeze(-1) * scale


def check_finite(diagonal: Tensor) -> None:
    """Refuse a Fisher information whose diagonal is not finite."""
    if not bool(torch.isfinite(diagonal).all()):
        raise ScorefnError(
            "The Fisher information is not finite: a parameter lies on the boundary of its domain, or so near to it "
            "that its Fisher information overflows. Move the parameter inside; no damping repairs this."
        )


def _smallest_eigenvalue(factor: Tensor) -> Tensor:
    """Of ``L L^T``, ``[..., P, P] -> [...]``: two steps of inverse iteration, which find the order of a tiny one.

    A pivot of L would not do: it is the eigenvalue over a squared entry of the eigenvector, which may be tiny too.
    """
    start = torch.arange(1.0, factor.shape[-1] + 1, dtype=factor.dtype, device=factor.device).cos()
    vector = start.expand(factor.shape[:-1]).unsqueeze(-1)
    for _ in range(2):
        vector = torch.cholesky_solve(vector / vector.norm(dim=-2, keepdim=True), factor)
    smallest: Tensor = vector.norm(dim=-2).squeeze(-1).reciprocal()
    return smallest


def singular(fact: str) -> ScorefnError:
    """The refusal of a singular Fisher information."""
    return ScorefnError(
        f"{fact}, so F^-1 does not exist. Pass damping=1e-3, or more, to use (F + damping I)^-1, or choose parameters "
        "that all matter."
    )


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or no number."""
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise ScorefnError(
            f"damping must be a finite number of at least 0, but it is {damping!r}: it is added to the diagonal of the "
            "Fisher information, which a negative one could make indefinite. Use damping=0.0 for none."
        )


Rule: TypeAlias = Callable[[Any], FisherInformation]
_Rule = TypeVar("_Rule", bound=Rule)
_RULES: dict[type, Rule] = {}


def register_fisher(family: type) -> Callable[[_Rule], _Rule]:
    """Decorator: the closed form of a family, as torch's ``register_kl`` does for divergences.

    The rule of the nearest class in the method resolution order is used, but not by a subclass that overrides
    ``log_prob``, which may be another distribution; a later registration replaces an earlier one.

    Args:
        family: a distribution class; the rule maps one of its instances to a ``FisherInformation``.

    Raises:
        ScorefnError: family is not a class.

    Example:
        >>> import torch, scorefn as sf
        >>> class Folded(torch.distributions.HalfNormal):
        ...     pass
        >>> @sf.register_fisher(Folded)
        ... def _(p):
        ...     matrix = 2 / p.scale.square()[..., None, None]
        ...     return sf.FisherMatrix(
        ...         parameters={"scale": p.scale},
        ...         batch_shape=p.batch_shape,
        ...         rebuild=Folded,
        ...         matrix=matrix,
        ...     )
        >>> sf.fisher_information(Folded(torch.tensor(2.0))).dense()
        tensor([[0.5000]])
    """
    if not isinstance(family, type):
        raise ScorefnError(
            f"register_fisher takes a distribution class, but it was given {family!r}: write "
            "@register_fisher(MyDistribution), with the class itself, above the rule."
        )

    def register(rule: _Rule) -> _Rule:
        _RULES[family] = rule
        return rule

    return register


def fisher_information(p: Distribution) -> FisherInformation:
    """The Fisher information of p in the parameters of its constructor, in closed form.

    ========================== ============================ ==========================================================
    family                     parameters                   F
    ========================== ============================ ==========================================================
    Normal                     loc, scale                   diag(1, 2) / scale^2
    MultivariateNormal         loc, scale_tril              with A = L^-1 dL: |L^-1 dm|^2 + |A|^2 + |diag A|^2
    LowRankMultivariateNormal  loc, cov_factor, cov_diag    |dm|^2 in S^-1, and tr(S^-1 dS S^-1 dS) / 2
    LogNormal                  loc, scale                   diag(1, 2) / scale^2
    Laplace                    loc, scale                   diag(1, 1) / scale^2
    Bernoulli, Binomial (n)    logits, or probs             n p (1 - p), or n / (p (1 - p))
    Geometric                  logits, or probs             1 - p, or 1 / (p^2 (1 - p))
    NegativeBinomial (r)       logits, or probs             r p, or r / (p (1 - p)^2)
    Categorical, OneHot        logits, or probs             diag(p) - p p^T, or diag(1/p) - 1 1^T
    Poisson                    rate                         1 / rate
    Exponential                rate                         1 / rate^2
    Gamma                      concentration a, rate b      [[psi'(a), -1/b], [-1/b, a/b^2]]
    Chi2                       df                           psi'(df / 2) / 4
    Beta                       concentration1, ...0         diag(psi'(a), psi'(b)) - psi'(a + b) 1 1^T
    Dirichlet                  concentration a              diag(psi'(a)) - psi'(sum a) 1 1^T
    Independent                those of its base            block diagonal
    ========================== ============================ ==========================================================

    What has logits or probs is taken in those it was made with, a count of trials being given; multivariate normals
    always in ``scale_tril`` (its lower triangle), whatever they were made with: F is diagonal there after whitening,
    and the solution V gives the natural gradient of the covariance, ``V L^T + L V^T = 2 S G S``.

    Three families have directions in which the distribution does not change, and ``solve`` without damping leaves them
    out: a shift of categorical logits and a rescaling of unnormalised probabilities (the solution sums to 0 over the
    categories in both, a tangent of the simplex), and rotations of a ``cov_factor`` of rank 2 or more (the shortest
    solution). ``solve`` costs O(P), for a multivariate normal O(D^3); with damping, and for a low-rank factor always,
    O(P^3).

    Args:
        p: a distribution of a registered family; see ``register_fisher``.

    Raises:
        ScorefnError: no closed form is registered for the family, or p overrides the ``log_prob`` of one that has it;
            the total_count of a NegativeBinomial requires grad.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> fisher = sf.fisher_information(p)
        >>> fisher.dense().shape
        torch.Size([2, 2, 2])
        >>> fisher.solve({"loc": torch.ones(2), "scale": torch.ones(2)})
        {'loc': tensor([1., 4.]), 'scale': tensor([0.5000, 2.0000])}
    """
    family, method = nearest(type(p), _RULES, ("log_prob",))
    if family is not None and not method:
        return _RULES[family](p)
    if reason := overridden(type(p), _RULES, ("log_prob",), "Fisher information"):
        raise ScorefnError(
            f"{reason} Register its own with scorefn.register_fisher, or call natural_gradient(p, draws, params=..., "
            "damping=...), which estimates it from the draws."
        )
    raise ScorefnError(
        f"No closed form of the Fisher information is known for {type(p).__name__}. Register one with "
        "scorefn.register_fisher, or call natural_gradient(p, draws, params=..., damping=...), which estimates it from "
        "the draws (solver=DenseSolve(), Woodbury() or ConjugateGradients())."
    )
