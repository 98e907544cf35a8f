"""From uniforms to draws: one open registry that every coupling shares.

A draw of p is made from uniforms u in (0, 1), of shape ``uniform_shape(p)``: one for each coordinate in most families,
one for a whole OneHotCategorical, one more for the component of a mixture. In each coordinate a draw is monotone in its
uniform (but for the component of a mixture), so that what is done to the uniforms is done to the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import one_hot

from scorefn.core import Measure, ScorefnError, ShapeError, nearest, overridden

__all__ = ["quantile", "register_quantile"]

Quantile = Callable[[Any, Tensor], Tensor]
Shape = Callable[[Any], torch.Size]
F = TypeVar("F", bound=Quantile)

_REGISTRY: dict[type, tuple[Quantile, Shape]] = {}
SAMPLING = ("icdf", "sample", "rsample")


def _componentwise(p: Any) -> torch.Size:
    """One uniform per coordinate, ``[*batch, *event]``."""
    return torch.Size(p.batch_shape + p.event_shape)


def _jointly(p: Any) -> torch.Size:
    """One uniform per draw, whatever its event, ``[*batch]``."""
    return torch.Size(p.batch_shape)


def register_quantile(cls: type, shape: Shape = _componentwise) -> Callable[[F], F]:
    """Decorator: this function makes draws of a family, and of its subclasses, from uniforms.

    A subclass that overrides ``sample``, ``rsample`` or ``icdf`` does not inherit it: it may be another distribution.
    Its own ``icdf`` serves it, where that is what it overrides; otherwise it is refused until it is registered.

    Args:
        cls: the family.
        shape: p to the shape of the uniforms of one draw, which leads with the batch shape of p; one for each
            coordinate, ``[*batch, *event]``, unless told otherwise.

    Returns:
        A decorator for a function ``(p, u) -> x``, from ``[N, *shape(p)]`` in float64 to ``[N, *batch, *event]``,
        such that uniform u give draws of p. It is called without grad.

    Example:
        >>> import torch
        >>> from scorefn import register_quantile
        >>> class Triangular(torch.distributions.Distribution):
        ...     '''The sum of two uniforms.'''
        >>> @register_quantile(Triangular)
        ... def triangular(p, u):
        ...     return torch.where(u < 0.5, (2 * u).sqrt(), 2 - (2 - 2 * u).sqrt())
    """

    def decorator(function: F) -> F:
        _REGISTRY[cls] = (function, shape)
        return function

    return decorator


def quantile(p: Measure, u: Tensor) -> Tensor:
    """Draws of p from uniforms: ``[N, *uniforms] -> [N, *batch, *event]``, without grad.

    Uniform u give draws that follow p exactly. Scalar families use the inverse distribution function (Devroye, 1986,
    "Non-uniform random variate generation", section II.2), vectors are pushed through transforms and Cholesky factors.
    u of 0 or 1 is moved inside by half a unit of precision, so that no draw is infinite.

    Args:
        p: a distribution whose family is registered, or a parent that it samples like, or which has ``icdf``.
        u: ``[N, *batch, *event]`` for most families, ``[N, *batch]`` for OneHotCategorical,
            ``[N, *batch, 1 + coordinates]`` for MixtureSameFamily.

    Raises:
        ShapeError: u does not have one uniform where p needs one.
        ScorefnError: no quantile is known for this family.

    Example:
        >>> import torch, scorefn as sf
        >>> from torch.distributions import Categorical, Exponential
        >>> sf.quantile(Exponential(1.0), torch.tensor([0.25, 0.5, 0.75]))  # -log(1 - u)
        tensor([0.2877, 0.6931, 1.3863])
        >>> sf.quantile(Categorical(torch.tensor([0.2, 0.3, 0.5])), torch.tensor([0.1, 0.4, 0.9]))
        tensor([0, 1, 2])
    """
    function, shape = _served(p)
    if tuple(u.shape[1:]) != tuple(shape(p)):
        raise ShapeError(
            f"{type(p).__name__} makes a draw from uniforms of shape {tuple(shape(p))}, but u is {tuple(u.shape)}: it "
            "must be [N, *that], and is never repaired by broadcasting."
        )
    margin = torch.finfo(u.dtype).eps / 2  # 1 - margin is the largest number below 1
    with torch.no_grad():
        x = function(p, u.clamp(margin, 1 - margin))
    own = [value.dtype for value in vars(p).values() if isinstance(value, Tensor) and value.is_floating_point()]
    return x.to(own[0]) if own and x.is_floating_point() else x


def uniform_shape(p: Measure) -> torch.Size:
    """Shape of the uniforms from which ``quantile`` makes one draw."""
    return torch.Size(_served(p)[1](p))


def from_normal(p: Any, z: Tensor) -> Tensor:
    """Draws of a Gaussian, or of a transformed one, from standard normals ``[N, *batch, *event]``, without grad.

    Raises:
        ScorefnError: p is not made of a Gaussian.
    """
    family, override = nearest(type(p), _FROM_NORMAL, SAMPLING)
    if family is not None and not override:
        with torch.no_grad():
            return _FROM_NORMAL[family](p, z)
    if reason := overridden(type(p), _FROM_NORMAL, SAMPLING, "way of being made from a Gaussian"):
        raise ScorefnError(
            f"{reason} Orthogonal directions are a property of Gaussians: use another coupling, such as Sobol() with "
            "scorefn.register_quantile for this family, or leave coupling out."
        )
    raise ScorefnError(
        f"{type(p).__name__} is not made from a Gaussian, and orthogonal directions are a property of Gaussians: use "
        "Normal, MultivariateNormal, LowRankMultivariateNormal, Independent of them or transforms of them, or another "
        "coupling, such as Sobol()."
    )


def _stretched(p: Any, z: Tensor) -> Tensor:
    return p.loc + (p.scale_tril @ z.to(p.loc).unsqueeze(-1)).squeeze(-1)  # type: ignore[no-any-return]


_FROM_NORMAL: dict[type, Quantile] = {
    td.Normal: lambda p, z: p.loc + p.scale * z.to(p.loc),
    td.MultivariateNormal: _stretched,
    td.LowRankMultivariateNormal: _stretched,
    td.Independent: lambda p, z: from_normal(p.base_dist, z),
    td.TransformedDistribution: lambda p, z: _pushed(p, from_normal(p.base_dist, z)),
}


def device_of(p: Any) -> torch.device | None:
    """Where p lives; None where it shows no tensor."""
    inner = ("base_dist", "component_distribution", "mixture_distribution")
    tensors = [value.device for value in vars(p).values() if isinstance(value, Tensor)]
    parts = [device_of(getattr(p, name)) for name in inner if isinstance(getattr(p, name, None), td.Distribution)]
    return next((device for device in tensors + parts if device is not None), None)


def _served(p: Any) -> tuple[Quantile, Shape]:
    """The entry of p's nearest registered parent or ``icdf``, whichever is nearer, unless sampling is overridden."""
    family, method = nearest(type(p), _REGISTRY, SAMPLING)
    if family is not None and not method:
        return _REGISTRY[family]
    if method == "icdf":
        return (lambda p, u: p.icdf(u)), _componentwise
    if reason := overridden(type(p), _REGISTRY, SAMPLING, "quantile"):
        raise ScorefnError(f"{reason} Add its own with scorefn.register_quantile, give it icdf, or leave coupling out.")
    raise ScorefnError(
        f"No quantile is known for {type(p).__name__}, so a coupling cannot make its draws from uniforms. Served are "
        f"{', '.join(sorted(cls.__name__ for cls in _REGISTRY))} and every family with icdf: use one of these, add "
        "this one with scorefn.register_quantile, or leave coupling out."
    )


# ------------------------------------------------------------------------------------------------------- continuous


def _standard_normal(u: Tensor) -> Tensor:
    return (2 * u - 1).erfinv() * sqrt(2)  # odd around 1/2, to the bit


@register_quantile(td.Normal)
@register_quantile(td.MultivariateNormal)
@register_quantile(td.LowRankMultivariateNormal)
def _gaussian(p: Any, u: Tensor) -> Tensor:
    return from_normal(p, _standard_normal(u))


@register_quantile(td.HalfNormal)
def _half_normal(p: td.HalfNormal, u: Tensor) -> Tensor:
    return (u.erfinv() * sqrt(2)).to(p.scale) * p.scale


@register_quantile(td.HalfCauchy)
def _half_cauchy(p: td.HalfCauchy, u: Tensor) -> Tensor:
    return (u * torch.pi / 2).tan().to(p.scale) * p.scale


@register_quantile(td.Exponential)
def _exponential(p: td.Exponential, u: Tensor) -> Tensor:
    return -(-u).log1p() / p.rate


@register_quantile(td.Laplace)
@register_quantile(td.Cauchy)
def _inverted(p: Any, u: Tensor) -> Tensor:
    return p.icdf(u)  # type: ignore[no-any-return]


@register_quantile(td.Uniform)
def _uniform(p: td.Uniform, u: Tensor) -> Tensor:
    x = torch.lerp(p.low.to(u), p.high.to(u), u).to(p.low)
    return x.minimum(p.high.nextafter(p.low))  # rounding must not reach the end, which has density 0


# --------------------------------------------------------------------------------------------------------- discrete


def _outcome(mass: Tensor, u: Tensor) -> Tensor:
    """The first outcome whose distribution function exceeds u: mass ``[*batch, P]``, u ``[N, *batch]``."""
    upper = mass.double().cumsum(-1)
    upper = (upper / upper[..., -1:]).contiguous()
    return torch.searchsorted(upper, u.to(upper).movedim(0, -1).contiguous(), right=True).movedim(-1, 0)


@register_quantile(td.Bernoulli)
def _bernoulli(p: td.Bernoulli, u: Tensor) -> Tensor:
    return (u >= 1 - p.probs.to(u)).to(p.probs)


@register_quantile(td.Categorical)
def _categorical(p: td.Categorical, u: Tensor) -> Tensor:
    return _outcome(p.probs, u)


@register_quantile(td.OneHotCategorical, _jointly)
def _one_hot(p: td.OneHotCategorical, u: Tensor) -> Tensor:
    return one_hot(_outcome(p.probs, u), p.event_shape[-1]).to(p.probs)


@register_quantile(td.Geometric)
def _geometric(p: td.Geometric, u: Tensor) -> Tensor:
    return ((-u).log1p() / (-p.probs.to(u)).log1p()).floor()


@register_quantile(td.Binomial)
def _binomial(p: td.Binomial, u: Tensor) -> Tensor:
    n = p.total_count.to(u)
    k = torch.arange(int(n.max()) + 1, device=u.device).to(u).reshape(-1, *[1] * n.ndim)
    twin = td.Binomial(n, logits=p.logits.to(u), validate_args=False)
    mass = torch.where(k <= n, twin.log_prob(k.minimum(n)).exp(), 0.0)
    return _outcome(mass.movedim(0, -1), u).to(p.total_count)


@register_quantile(td.Poisson)
def _poisson(p: td.Poisson, u: Tensor) -> Tensor:
    rate = p.rate.to(u)

    def behind(k: Tensor) -> Tensor:
        return torch.special.gammaincc(k + 1, rate).le(u)  # type: ignore[no-any-return]

    low, high = torch.full_like(u, -1.0), torch.ones_like(u)  # the draw lies in (low, high]
    while bool((short := behind(high)).any()):
        low, high = torch.where(short, high, low), torch.where(short, 2 * high, high)
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).ceil()
        short = behind(middle)
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return high


# --------------------------------------------------------------------------------------------------------- wrappers


@register_quantile(td.Independent, lambda p: uniform_shape(p.base_dist))
def _independent(p: Any, u: Tensor) -> Tensor:
    return quantile(p.base_dist, u)


@register_quantile(td.TransformedDistribution, lambda p: uniform_shape(p.base_dist))
def _transformed(p: td.TransformedDistribution, u: Tensor) -> Tensor:
    return _pushed(p, quantile(p.base_dist, u))


def _pushed(p: td.TransformedDistribution, x: Tensor) -> Tensor:
    for transform in p.transforms:
        x = transform(x)
    return x.detach()  # another object: one that a transform had cached would be scored without its inverse's gradient


def _mixture_shape(p: td.MixtureSameFamily) -> torch.Size:
    """One uniform for the component, then those of a component."""
    coordinates = uniform_shape(p.component_distribution)[len(p.batch_shape) + 1 :]
    return torch.Size((*p.batch_shape, 1 + coordinates.numel()))


@register_quantile(td.MixtureSameFamily, _mixture_shape)
def _mixture(p: td.MixtureSameFamily, u: Tensor) -> Tensor:
    shape = uniform_shape(p.component_distribution)
    axis = 1 + len(p.batch_shape)  # of the components
    every = u[..., 1:].unsqueeze(axis).expand(*u.shape[:-1], shape[axis - 1], u.shape[-1] - 1)
    x = quantile(p.component_distribution, every.reshape(-1, *shape))
    component = _outcome(p.mixture_distribution.probs, u[..., 0])
    index = component.reshape(*component.shape, *[1] * (x.ndim - axis))
    return x.gather(axis, index.expand(*component.shape, 1, *x.shape[axis + 1 :])).squeeze(axis)
