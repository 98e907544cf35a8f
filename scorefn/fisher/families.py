"""The closed forms: each is the table of ``fisher_information``, and for matrices the algebra that inverts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Chi2,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
)

from scorefn.core import ScorefnError
from scorefn.fisher.information import (
    FisherInformation,
    FisherMatrix,
    Vector,
    check_finite,
    fisher_information,
    register_fisher,
    singular,
)


def _maker(p: Distribution, **constants: Any) -> Callable[..., Distribution]:
    return partial(type(p), **constants, validate_args=False)


def _matrix(p: Distribution, parameters: Vector, rows: list[list[Tensor]], **constants: Any) -> FisherMatrix:
    """Rows of numbers ``[*batch]``, kept in float64: the determinants of gamma and beta nearly cancel."""
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    rebuild = _maker(p, **constants)
    return FisherMatrix(parameters=parameters, batch_shape=p.batch_shape, rebuild=rebuild, matrix=matrix)


def _trigamma(x: Tensor) -> Tensor:
    """``psi'(x)`` as ``zeta(2, x)``: torch's polygamma(1, x) has only nine digits."""
    trigamma: Tensor = torch.special.zeta(2.0, x)
    return trigamma


@register_fisher(Independent)
def _independent(p: Any) -> FisherInformation:
    return fisher_information(p.base_dist).independent(p.reinterpreted_batch_ndims)


@register_fisher(Normal)
@register_fisher(LogNormal)
def _normal(p: Normal | LogNormal) -> FisherMatrix:
    precision = p.scale.detach().double().square().reciprocal()
    zero = torch.zeros_like(precision)
    return _matrix(p, {"loc": p.loc, "scale": p.scale}, [[precision, zero], [zero, 2 * precision]])


@register_fisher(Laplace)
def _laplace(p: Laplace) -> FisherMatrix:
    precision = p.scale.detach().double().square().reciprocal()
    zero = torch.zeros_like(precision)
    return _matrix(p, {"loc": p.loc, "scale": p.scale}, [[precision, zero], [zero, precision]])


@register_fisher(Poisson)
def _poisson(p: Poisson) -> FisherMatrix:
    return _matrix(p, {"rate": p.rate}, [[p.rate.detach().double().reciprocal()]])


@register_fisher(Exponential)
def _exponential(p: Exponential) -> FisherMatrix:
    return _matrix(p, {"rate": p.rate}, [[p.rate.detach().double().square().reciprocal()]])


@register_fisher(Gamma)
def _gamma(p: Gamma) -> FisherMatrix:
    a, b = p.concentration.detach().double(), p.rate.detach().double()
    parameters = {"concentration": p.concentration, "rate": p.rate}
    return _matrix(p, parameters, [[_trigamma(a), -1 / b], [-1 / b, a / b.square()]])


@register_fisher(Chi2)
def _chi2(p: Chi2) -> FisherMatrix:
    return _matrix(p, {"df": p.df}, [[_trigamma(p.df.detach().double() / 2) / 4]])


@register_fisher(Beta)
def _beta(p: Beta) -> FisherMatrix:
    a, b = p.concentration1.detach().double(), p.concentration0.detach().double()
    both = _trigamma(a + b)
    parameters = {"concentration1": p.concentration1, "concentration0": p.concentration0}
    return _matrix(p, parameters, [[_trigamma(a) - both, -both], [-both, _trigamma(b) - both]])


def _given(p: Any) -> str:
    """Whether a distribution was made with logits or with probs; the other one is computed when it is asked for."""
    held = vars(p)
    if "_param" in held:
        return "logits" if held.get("logits") is p._param else "probs"
    first: str = next(
        name for name in held if name in ("logits", "probs")
    )  # a Geometric, which sets the given one first
    return first


def _chance(
    p: Any,
    in_logits: Callable[[Tensor, Tensor], Tensor],
    in_probs: Callable[[Tensor, Tensor], Tensor],
    **constants: Any,
) -> FisherMatrix:
    """F from q = probs and r = 1 - q, by the parameter that p was made with."""
    name = _given(p)
    given = getattr(p, name)
    value = given.detach().double()
    if name == "logits":
        information = in_logits(value.sigmoid(), (-value).sigmoid())
    else:
        information = in_probs(value, 1 - value)
    return _matrix(p, {name: given}, [[information]], **constants)


@register_fisher(Bernoulli)
def _bernoulli(p: Bernoulli) -> FisherMatrix:
    return _chance(p, lambda q, r: q * r, lambda q, r: 1 / (q * r))


@register_fisher(Binomial)
def _binomial(p: Binomial) -> FisherMatrix:
    n = p.total_count.detach().double()
    return _chance(p, lambda q, r: n * q * r, lambda q, r: n / (q * r), total_count=p.total_count)


@register_fisher(Geometric)
def _geometric(p: Geometric) -> FisherMatrix:
    return _chance(p, lambda q, r: r, lambda q, r: 1 / (q.square() * r))


@register_fisher(NegativeBinomial)
def _negative_binomial(p: NegativeBinomial) -> FisherMatrix:
    if p.total_count.requires_grad:
        raise ScorefnError(
            "The total_count of this NegativeBinomial requires grad, but the Fisher information in total_count is an "
            "infinite sum, and that in the other parameter alone would leave it out, silently. Detach total_count, or "
            "call natural_gradient(p, draws, params=..., damping=...), which estimates F from the draws."
        )
    n = p.total_count.double()
    return _chance(p, lambda q, r: n * q, lambda q, r: n / (q * r.square()), total_count=p.total_count)


@register_fisher(Categorical)
def _categorical(p: Categorical) -> FisherInformation:
    return _simplex(p, p)


@register_fisher(OneHotCategorical)
def _one_hot(p: OneHotCategorical) -> FisherInformation:
    return _simplex(p, p._categorical)


def _simplex(p: Distribution, inner: Any) -> _Simplex:
    name = _given(inner)
    probs = inner.logits.detach().double().softmax(-1) if name == "logits" else inner.probs.detach().double()
    return _Simplex(parameters={name: inner._param}, batch_shape=p.batch_shape, rebuild=_maker(p), probs=probs)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Simplex(FisherInformation):
    """``diag(d) - u u^T``, with d = u = p for logits, and d = 1/p, u = 1 for probs."""

    probs: Tensor = field(repr=False)

    @property
    def _name(self) -> str:
        return next(iter(self.parameters))

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v, in O(P)."""
        v = vector[self._name]
        p = self.probs.to(v)
        if self._name == "logits":
            return {"logits": p * (v - (p * v).sum(-1, keepdim=True))}
        return {"probs": v / p - v.sum(-1, keepdim=True)}

    def inverse(self, gradient: Vector, damping: float) -> dict[str, Tensor]:
        """``(F + damping I)^-1 g`` by Sherman-Morrison, as ``1 - u^T (diag(d) + damping)^-1 u`` vanishes with damping.

        Without damping the solution that sums to 0, for g less the part that no score has.
        """
        p, g = self.probs, gradient[self._name].to(self.probs)
        logits = self._name == "logits"
        if not logits:
            check_finite(p.reciprocal())
        elif damping == 0 and bool((p == 0).any()):
            raise singular("The Fisher information is singular: a category has probability 0")
        if damping == 0:
            if logits:
                solution = (g - g.mean(-1, keepdim=True)) / p
                return {"logits": solution - solution.mean(-1, keepdim=True)}
            return {"probs": p * (g - (p * g).sum(-1, keepdim=True))}
        inverse = 1 / (p + damping) if logits else p / (1 + damping * p)
        u = inverse * p if logits else inverse
        rest = damping * (inverse * p).sum(-1, keepdim=True)
        return {self._name: inverse * g + u * (u * g).sum(-1, keepdim=True) / rest}


@register_fisher(Dirichlet)
def _dirichlet(p: Dirichlet) -> FisherInformation:
    return _Dirichlet(parameters={"concentration": p.concentration}, batch_shape=p.batch_shape, rebuild=_maker(p))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Dirichlet(FisherInformation):
    """``diag(psi'(a)) - psi'(sum a) 1 1^T``; Minka (2000), "Estimating a Dirichlet distribution", section 1."""

    def _trigammas(self) -> tuple[Tensor, Tensor]:
        """``psi'(a)`` ``[..., D]`` and ``psi'(sum a)`` ``[..., 1]``, in float64."""
        a = self.parameters["concentration"].double()
        return _trigamma(a), _trigamma(a.sum(-1, keepdim=True))

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v, in O(D)."""
        v = vector["concentration"]
        own, both = (value.to(v) for value in self._trigammas())
        return {"concentration": own * v - both * v.sum(-1, keepdim=True)}

    def inverse(self, gradient: Vector, damping: float) -> dict[str, Tensor]:
        """``(F + damping I)^-1 g`` by Sherman-Morrison, in O(D)."""
        own, both = self._trigammas()
        diagonal, g = own + damping, gradient["concentration"].to(own)
        check_finite(diagonal)
        rest = 1 - both * diagonal.reciprocal().sum(-1, keepdim=True)  # positive, as F is
        if not bool((rest >= 64 * g.shape[-1] * torch.finfo(rest.dtype).eps).all()):
            raise singular("The Fisher information of a Dirichlet is singular to rounding: it has hardly any spread")
        return {"concentration": (g + both * (g / diagonal).sum(-1, keepdim=True) / rest) / diagonal}


@register_fisher(MultivariateNormal)
def _multivariate_normal(p: MultivariateNormal) -> FisherInformation:
    return _Whitened(
        parameters={"loc": p.loc, "scale_tril": p.scale_tril}, batch_shape=p.batch_shape, rebuild=_maker(p)
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Whitened(FisherInformation):
    """A normal in its mean m and Cholesky factor L.

    With x = m + L z and A = L^-1 dL, lower triangular, ``d log p = z^T L^-1 dm + sum_ij A_ij (z_i z_j - delta_ij)``:
    its terms are uncorrelated, of variance 1 for dm and for i > j, and 2 for i = j.
    """

    def entries(self, name: str) -> Tensor:
        """The lower triangle of ``scale_tril``."""
        if name == "loc":
            return super().entries(name)
        L = self.parameters["scale_tril"]
        triangle = torch.ones(L.shape[len(self.batch_shape) :], dtype=torch.bool, device=L.device).tril()
        return triangle.flatten().nonzero().flatten()

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v: ``L^-T L^-1 dm`` and ``tril(L^-T (A + diag A))``."""
        L = self.parameters["scale_tril"]
        whitened = torch.linalg.solve_triangular(L, vector["loc"].unsqueeze(-1), upper=False)
        loc = torch.linalg.solve_triangular(L.mT, whitened, upper=True).squeeze(-1)
        A = torch.linalg.solve_triangular(L, vector["scale_tril"].tril(), upper=False)
        A = A + A.diagonal(dim1=-2, dim2=-1).diag_embed()
        return {"loc": loc, "scale_tril": torch.linalg.solve_triangular(L.mT, A, upper=True).tril()}

    def inverse(self, gradient: Vector, damping: float) -> dict[str, Tensor]:
        """``L L^T g`` and ``L A``, with A = tril(L^T G) and its diagonal halved."""
        if damping:
            return super().inverse(gradient, damping)
        L = self.parameters["scale_tril"]
        loc = (L @ (L.mT @ gradient["loc"].to(L).unsqueeze(-1))).squeeze(-1)
        A = (L.mT @ gradient["scale_tril"].to(L).tril()).tril()
        A = A - A.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
        return {"loc": loc, "scale_tril": L @ A}


@register_fisher(LowRankMultivariateNormal)
def _low_rank(p: LowRankMultivariateNormal) -> FisherInformation:
    factor, diagonal = p.cov_factor, p.cov_diag
    parameters = {"loc": p.loc, "cov_factor": factor, "cov_diag": diagonal}
    return _LowRank(parameters=parameters, batch_shape=p.batch_shape, rebuild=_maker(p))


@dataclass(frozen=True, eq=False, kw_only=True)
class _LowRank(FisherInformation):
    """A normal of covariance S = W W^T + diag(d), with W of r columns.

    ``dm^T S^-1 dm + tr(S^-1 dS S^-1 dS) / 2`` with ``dS = dW W^T + W dW^T + diag(dd)``; dW = W R with R antisymmetric
    leaves S as it is.
    """

    def product(self, vector: Vector) -> dict[str, Tensor]:
        """F v, in O(D^3)."""
        W, d = self.parameters["cov_factor"], self.parameters["cov_diag"]
        precision = torch.cholesky_inverse(torch.linalg.cholesky(W @ W.mT + d.diag_embed()))
        change = vector["cov_factor"] @ W.mT
        change = precision @ (change + change.mT + vector["cov_diag"].diag_embed()) @ precision
        return {
            "loc": (precision @ vector["loc"].unsqueeze(-1)).squeeze(-1),
            "cov_factor": change @ W,
            "cov_diag": change.diagonal(dim1=-2, dim2=-1) / 2,
        }

    def unidentified(self) -> Tensor | None:
        """The ``r (r - 1) / 2`` rotations of the columns of W."""
        W = self.parameters["cov_factor"]
        D, rank = W.shape[-2:]
        if rank < 2:
            return None
        one, other = torch.triu_indices(rank, rank, 1, device=W.device)
        number = torch.arange(len(one), device=W.device)
        turn = W.new_zeros(len(one), rank, rank).index_put((number, one, other), W.new_ones(()))
        moved = W.unsqueeze(-3) @ (turn - turn.mT)  # [*batch, directions, D, r]
        still = moved.new_zeros(*moved.shape[:-2], D + D * rank + D)
        still[..., D : D + D * rank] = moved.flatten(-2)
        return still.mT
