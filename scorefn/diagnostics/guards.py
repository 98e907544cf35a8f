"""What ``check_unbiased`` does not take on trust: that nothing is changed, that f repeats itself, that p is one law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal

from scorefn.core import Integrand, ScorefnError, evaluate
from scorefn.diagnostics.exact import points

SPOT = 50_000
"""Draws by which a sampler of one's own is compared with its density."""
FALSE_ALARM = 1e-9
"""Of that comparison."""
REPEATED = 1024
"""Values of f that are made again at least."""
_NODES = 16
_METHODS = ("sample", "rsample", "sample_n", "log_prob", "enumerate_support")


class Unchanged:
    """Parameters whose values and ``.grad`` the estimate must leave alone; what it has changed is put back.

    Raises:
        ScorefnError: on leaving, where a value or a ``.grad`` is another; an error of the estimate is its cause.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters

    def __enter__(self) -> Unchanged:
        """Note the values."""
        self._values = [q.detach().clone() for q in self._parameters]
        self._grads = [_grad(q) for q in self._parameters]
        self._copies = [None if g is None else g.detach().clone() for g in self._grads]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Compare, and put back; not where the user stopped it."""
        changed = []
        for i, (q, value, grad, copy) in enumerate(
            zip(self._parameters, self._values, self._grads, self._copies, strict=True)
        ):
            if not _same(q.detach(), value):
                changed.append(f"the values of params[{i}], of shape {tuple(value.shape)}, in place")
                q.data = value if q.shape != value.shape else q.data.copy_(value)  # not a new version for autograd
            now = _grad(q)
            if now is not grad or not _same(grad, copy):
                changed.append(f"params[{i}].grad")
                if grad is not None and copy is not None:
                    grad.data.copy_(copy)
                q.grad = grad
        if changed and (error is None or isinstance(error, Exception)):
            raise ScorefnError(
                f"The estimate changes {' and '.join(changed)}, so that no two estimates are of the same gradient; "
                "what it changed was put back. Return the differentiable value alone, without backward(), an "
                "optimiser's step or assignments to .data."
            ) from error


def _grad(q: Tensor) -> Tensor | None:
    return q.grad if q.is_leaf or q.retains_grad else None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def f_fault(p: Any, f: Integrand) -> str:
    """Why f has no one value at each point of p's list of points: a sentence; empty where it has, or there is no list.

    f is evaluated twice at all points, once at every other one, and once at many copies of them.
    """
    try:
        x, _ = points(p, _NODES)
    except (ScorefnError, AttributeError, TypeError, NotImplementedError):  # p lists no points
        return ""
    if not isinstance(x, Tensor):
        return ""
    log_prob = p.log_prob(x).detach()
    possible = log_prob.reshape(len(x), -1).sum(1) > -torch.inf
    x, log_prob = x[possible], log_prob[possible]
    first = evaluate(f, x, log_prob).detach()
    if random_at(f, x, log_prob):
        return "f is random: it gives two values at the same point, so that no call of it is exact."
    copies = max(1, REPEATED // max(len(x), 1))
    many = evaluate(f, x.repeat(copies, *[1] * (x.ndim - 1)), log_prob.repeat(copies, *[1] * (log_prob.ndim - 1)))
    half = evaluate(f, x[::2], log_prob[::2]).detach()
    if any(not _near(one, first) for one in many.detach().split(len(x))) or not _near(half, first[::2]):
        return "f gives other values at the same points where it is given others beside them, or it is random."
    return ""


def random_at(f: Integrand, x: Tensor, log_prob: Tensor) -> bool:
    """Whether f gives two values at the same points."""
    one, other = (evaluate(f, x, log_prob).detach() for _ in range(2))
    return not _near(one, other)


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal to rounding, which the order of a sum on several threads may change."""
    if one.shape != other.shape:
        return False
    slack = 1e3 * torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
    finite = other[other.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=slack * size, equal_nan=True)


def refuse_empty(p: Any) -> None:
    """Refuse a p without a single number to draw."""
    shape = (*getattr(p, "batch_shape", ()), *getattr(p, "event_shape", ()))
    if 0 in shape:
        raise ScorefnError(
            f"{type(p).__name__} has a dimension of size 0, in batch_shape + event_shape = {shape}: there is nothing "
            "to draw, and no gradient. Give a p with at least one element."
        )


# ------------------------------------------------------------------------------------------------ sampler and density


def density_fault(p: Any, rounding: float) -> str:
    """Why ``log_prob`` is not the density of what p draws: a sentence; empty where nothing was found.

    The probabilities of a finite support are summed, and the density of a normal is compared with that of its location
    and scale, at the nodes of quadrature. Where p, or a part of it, is not torch's own class, draws are compared with
    it: of a finite support, frequencies by Bernstein's inequality; of a normal, the distribution functions of the
    whitened coordinates and of their sum by that of Dvoretzky, Kiefer and Wolfowitz, with Massart's constant (1990).
    """
    try:
        x, weight = points(p, _NODES)
    except (ScorefnError, AttributeError, TypeError, NotImplementedError):  # p lists no points
        return ""
    if not isinstance(x, Tensor):
        return ""
    with torch.no_grad():
        found = p.log_prob(x).double().reshape(len(x), -1).sum(1)
        if weight is not None:
            unit = _unit(p)
            own = _plain(unit).log_prob(x.reshape(len(x), *unit.batch_shape, *unit.event_shape))
            own = own.double().reshape(len(x), -1).sum(1)
            off = float((found - own).abs().max())
            if not off <= rounding * (1 + float(own.abs().max())):
                return (
                    f"log_prob of {type(p).__name__} is no density of the normal with its location and scale: it is "
                    f"off by up to {off:.3g} at the nodes of quadrature, where the draws come from the normal."
                )
        else:
            total = float(found.exp().sum())
            if not abs(total - 1) <= rounding:
                return (
                    f"The probabilities of the {len(x)} values of {type(p).__name__} sum to {total:.6g}, not to 1: "
                    "log_prob is not normalised, or not of what is drawn."
                )
        if _own(p) or not callable(getattr(p, "sample", None)):
            return ""
        drawn = p.sample(torch.Size((SPOT,)))
        if not isinstance(drawn, Tensor) or drawn.shape[1:] != x.shape[1:]:
            return ""
        return _frequencies(p, x, found.exp(), drawn) if weight is None else _distribution_functions(p, drawn)


def _own(p: Any) -> bool:
    """Whether p and its parts are torch's own classes, with nothing of theirs replaced."""
    if not type(p).__module__.startswith("torch.distributions.") or any(name in vars(p) for name in _METHODS):
        return False
    parts: list[Any] = [p.base_dist] if isinstance(p, Independent) else []
    if isinstance(p, MixtureSameFamily):
        parts = [p.component_distribution, p.mixture_distribution]
    return all(_own(part) for part in parts)


def _unit(p: Any) -> Any:
    while isinstance(p, Independent):
        p = p.base_dist
    return p


def _plain(unit: Any) -> Distribution:
    if isinstance(unit, MultivariateNormal):
        return MultivariateNormal(unit.loc, scale_tril=unit.scale_tril, validate_args=False)
    return Normal(unit.loc, unit.scale, validate_args=False)


def _frequencies(p: Any, x: Tensor, probability: Tensor, drawn: Tensor) -> str:
    size = len(x)
    rows = torch.cat([x, drawn.to(x)]).reshape(size + len(drawn), -1)
    _, index = rows.unique(dim=0, return_inverse=True)
    counts = index[size:].bincount(minlength=int(index.max()) + 1)
    if int(counts[index[:size]].sum()) != len(drawn):
        return f"{type(p).__name__} draws values that are not in its support."
    frequency = counts[index[:size]].double() / len(drawn)
    level = math.log(2 * size / FALSE_ALARM) / len(drawn)
    limit = level / 3 + ((level / 3) ** 2 + 2 * probability * (1 - probability).clamp(min=0) * level).sqrt()
    excess = (frequency - probability).abs() - limit
    if float(excess.max()) <= 0:
        return ""
    at = int(excess.argmax())
    return (
        f"{type(p).__name__} draws {x[at].tolist()} with frequency {float(frequency[at]):.4g} in {len(drawn)} draws, "
        f"where log_prob gives it probability {float(probability[at]):.4g}: sample and log_prob are of two laws."
    )


def _distribution_functions(p: Any, drawn: Tensor) -> str:
    unit = _unit(p)
    x = drawn.reshape(len(drawn), *unit.batch_shape, *unit.event_shape).double() - unit.loc.double()
    if isinstance(unit, MultivariateNormal):
        white = torch.linalg.solve_triangular(unit.scale_tril.double(), x.T, upper=False).T
    else:
        white = (x / unit.scale.double()).reshape(len(drawn), -1)
    white = torch.cat([white, white.sum(1, keepdim=True) / white.shape[1] ** 0.5], 1).sort(0).values
    n, columns = white.shape
    level = torch.special.ndtr(white)
    step = torch.arange(n + 1, dtype=torch.float64)[:, None] / n
    off = float(torch.maximum((level - step[:-1]).abs(), (level - step[1:]).abs()).max())
    if off <= math.sqrt(math.log(2 * columns / FALSE_ALARM) / (2 * n)):
        return ""
    return (
        f"The draws of {type(p).__name__} do not follow the normal of its location and scale: their distribution "
        f"function is off by {off:.3g} in {n} draws. sample and log_prob are of two laws."
    )
