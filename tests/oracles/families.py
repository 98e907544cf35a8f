"""Plain distributions, with points that integrate them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracles.quadrature import gauss_hermite, normal_points
from tests.oracles.toys import coordinates


@dataclass(frozen=True, eq=False)
class Family:
    """A plain distribution, with points that integrate it: its support, or the nodes of a quadrature.

    Args:
        name: shown where a check fails.
        start: the parameters.
        build: parameters to distribution.
        points: parameters to points `[P, *batch, *event]` and weights `[P, *B]`, without gradient.
        f: x `[..., *batch, *event]` and parameters to `[..., *B]`; the last parameter enters f only.
        truth: parameters to E f, summed over problems.
        batch: B.
        most: the largest N.
    """

    name: str
    start: tuple[Any, ...]
    build: Callable[..., torch.distributions.Distribution]
    points: Callable[..., tuple[Tensor, Tensor]]
    f: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    batch: tuple[int, ...] = ()
    most: int = 2

    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in self.start)


def finite(
    name: str, start: Any, build: Any, support: Tensor, f: Any, *, batch: tuple[int, ...] = (), most: int = 3
) -> Family:
    """A family of finite support: `support` `[P, *rest, *event]` lists the joint outcomes of one problem."""

    def spread(p: torch.distributions.Distribution) -> Tensor:
        tail = support.shape[1:]
        return support.reshape(-1, *[1] * len(batch), *tail).expand(-1, *batch, *tail)

    def mass(p: torch.distributions.Distribution) -> Tensor:
        log_prob = p.log_prob(spread(p))
        return log_prob.flatten(1 + len(batch)).sum(-1).exp() if log_prob.ndim > 1 + len(batch) else log_prob.exp()

    def points(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        p = build(*parameters)
        return spread(p), mass(p)

    def truth(*parameters: Tensor) -> Tensor:
        p = build(*parameters)
        return (mass(p) * f(spread(p), *parameters)).sum()

    return Family(name, start, build, points, f, truth, batch, most)


def _bits(n: int) -> Tensor:
    return coordinates(*[2] * n).double()


def _mixture(weights: Tensor, loc: Tensor, log_scale: Tensor) -> torch.distributions.Distribution:
    d = torch.distributions
    return d.MixtureSameFamily(d.Categorical(logits=weights), d.Normal(loc, log_scale.exp()))


def _trapezoid(weights: Tensor, loc: Tensor, log_scale: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
    return x, _mixture(weights, loc, log_scale).log_prob(x).exp() * 0.1


def _product_points(loc: Tensor, log_scale: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    x, w = normal_points(loc, log_scale.exp(), 6)
    pairs = coordinates(6, 6)
    return torch.stack([x[pairs[:, 0], 0], x[pairs[:, 1], 1]], -1), w[pairs[:, 0], 0] * w[pairs[:, 1], 1]


def _correlated(loc: Tensor, tril: Tensor, psi: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.MultivariateNormal(loc, scale_tril=tril.tril())


def _covariance(tril: Tensor) -> Tensor:
    return tril.tril() @ tril.tril().T


def _correlated_points(loc: Tensor, tril: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights = gauss_hermite(6)
    pairs = coordinates(6, 6)
    return loc + nodes[pairs] @ tril.tril().T, weights[pairs].prod(-1)


_d = torch.distributions
FAMILIES = {
    family.name: family
    for family in (
        finite(
            "Bernoulli", (0.4, 0.3), lambda eta, psi: _d.Bernoulli(logits=eta), _bits(1)[:, 0],
            lambda x, eta, psi: (x - 0.45).square() + psi.exp() * x,
        ),
        finite(
            "Bernoulli, f over its batch", ([0.4, -1.0, 0.3], 0.3), lambda eta, psi: _d.Bernoulli(logits=eta), _bits(3),
            lambda x, eta, psi: (x[..., 0] - 2 * x[..., 1] + x[..., 2] / 2).square() + psi * x[..., 0] * x[..., 2],
            most=2,
        ),
        finite(
            "Bernoulli, f over the tail of its batch", ([[0.4, -1.0], [0.3, 0.9]], 0.3),
            lambda eta, psi: _d.Bernoulli(logits=eta), _bits(2),
            lambda x, eta, psi: (x[..., 0] - 2 * x[..., 1] + psi).square(), batch=(2,),
        ),
        finite(
            "Bernoulli, independent problems", ([0.4, -1.0], 0.3), lambda eta, psi: _d.Bernoulli(logits=eta),
            _bits(1)[:, 0], lambda x, eta, psi: (x - 0.45).square() * (1 + psi * eta), batch=(2,),
        ),
        finite(
            "Independent(Bernoulli)", ([0.4, -1.0, 0.3], 0.3),
            lambda eta, psi: _d.Independent(_d.Bernoulli(logits=eta), 1), _bits(3),
            lambda x, eta, psi: (x.sum(-1) - psi).pow(3), most=2,
        ),
        finite(
            "Categorical", ([0.4, -1.0, 0.3], 0.3), lambda logits, psi: _d.Categorical(logits=logits), torch.arange(3),
            lambda x, logits, psi: (x + psi).square(),
        ),
        finite(
            "OneHotCategorical", ([[0.4, -1.0, 0.3], [0.1, 0.2, 2.0]], 0.3),
            lambda logits, psi: _d.OneHotCategorical(logits=logits), torch.eye(3, dtype=torch.float64),
            lambda x, logits, psi: (x * torch.tensor([1.0, -2.0, 5.0]).to(x)).sum(-1) * psi.exp(), batch=(2,),
        ),
        finite(
            "Binomial", (0.4, 0.3), lambda eta, psi: _d.Binomial(3, logits=eta), torch.arange(4).double(),
            lambda x, eta, psi: (x - psi).pow(3),
        ),
        Family(
            "Normal", (0.7, -0.2, 0.3), lambda m, s, psi: _d.Normal(m, s.exp()),
            lambda m, s, psi: normal_points(m, s.exp()), lambda x, m, s, psi: x.pow(3) + psi * x.square(),
            lambda m, s, psi: m.pow(3) + 3 * m * (2 * s).exp() + psi * (m.square() + (2 * s).exp()), most=3,
        ),
        Family(
            "Normal, independent problems", ([0.7, -0.5], [-0.2, 0.3], 0.3), lambda m, s, psi: _d.Normal(m, s.exp()),
            lambda m, s, psi: normal_points(m, s.exp()), lambda x, m, s, psi: x.square() + psi * x,
            lambda m, s, psi: (m.square() + (2 * s).exp() + psi * m).sum(), batch=(2,),
        ),
        Family(
            "Independent(Normal)", ([0.7, -0.5], [-0.2, 0.3], 0.3),
            lambda m, s, psi: _d.Independent(_d.Normal(m, s.exp()), 1), _product_points,
            lambda x, m, s, psi: (x[..., 0] * x[..., 1] + psi * x[..., 1].square()),
            lambda m, s, psi: m.prod() + psi * (m[1].square() + (2 * s[1]).exp()),
        ),
        Family(
            "MultivariateNormal", ([0.7, -0.5], [[0.8, 0.0], [0.3, 1.1]], 0.3), _correlated, _correlated_points,
            lambda x, m, tril, psi: x[..., 0] * x[..., 1] + psi * x[..., 1].square(),
            lambda m, tril, psi: (lambda c: c[0, 1] + m.prod() + psi * (c[1, 1] + m[1].square()))(_covariance(tril)),
        ),
        Family(
            "LogNormal", (0.2, -0.7, 0.3), lambda m, s, psi: _d.LogNormal(m, s.exp()),
            lambda m, s, psi: (lambda x, w: (x.exp(), w))(*normal_points(m, s.exp(), 30)),
            lambda x, m, s, psi: x + psi * x.log().square(),
            lambda m, s, psi: (m + (2 * s).exp() / 2).exp() + psi * (m.square() + (2 * s).exp()),
        ),
        Family(
            "TransformedDistribution", (0.2, -0.7, 0.3),
            lambda m, s, psi: _d.TransformedDistribution(
                _d.Normal(m, s.exp()), [_d.AffineTransform(1.0, -2.0), _d.ExpTransform(), _d.AffineTransform(3.0, 0.5)]
            ),
            lambda m, s, psi: (lambda x, w: (3 + (1 - 2 * x).exp() / 2, w))(*normal_points(m, s.exp(), 40)),
            lambda x, m, s, psi: (x - 3) * psi.exp(),
            lambda m, s, psi: (1 - 2 * m + 2 * (2 * s).exp()).exp() / 2 * psi.exp(),
        ),
        Family(
            "MixtureSameFamily", ([0.4, -0.3], [-1.0, 1.5], [-0.3, -0.1], 0.3),
            lambda w, m, s, psi: _mixture(w, m, s), _trapezoid, lambda x, w, m, s, psi: x.pow(3) + psi * x.square(),
            lambda w, m, s, psi: (
                w.softmax(-1) * (m.pow(3) + 3 * m * (2 * s).exp() + psi * (m.square() + (2 * s).exp()))
            ).sum(),
        ),
    )
}  # fmt: skip
