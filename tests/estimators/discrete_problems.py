"""Small discrete problems with exact answers, and the enumeration of an estimator's own randomness.

Axes: T tuples (cells of the uniforms, or nodes of a quadrature) lead the batch of p, so that one call of the estimator
sees all of its randomness and one backward pass gives the gradient of each tuple; B problems; D sites; C values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical
from torch.nn.functional import one_hot

from tests.oracles.toys import coordinates

TABLE = torch.tensor([[0.3, -1.1, 0.8, 0.2, -0.4], [1.3, 0.4, -0.6, 0.9, 0.1]], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """B problems of D sites; f is not additive, and has a direct gradient in psi and in the logits."""

    family: type
    logits: Tensor  # [B, D] or [B, D, C]
    joined: bool = True  # sites are an event; otherwise batch dimensions that share f

    @property
    def values(self) -> int:
        return 2 if self.family is Bernoulli else self.logits.shape[-1]

    def distribution(self, logits: Tensor) -> Distribution:
        unit = self.family(logits=logits)
        return Independent(unit, 1) if self.joined else unit

    def f(self, x: Tensor, psi: Tensor, logits: Tensor) -> Tensor:
        """`[M, *lead, D]` or `[M, *lead, D, C]` to `[M, *lead]`."""
        if self.family is Bernoulli:
            taken = x * TABLE[: x.shape[-1], 0]
        else:
            onehot = one_hot(x, self.values).double() if self.family is Categorical else x
            taken = (onehot * TABLE[: onehot.shape[-2], : self.values]).sum(-1)
        direct = logits.flatten(psi.ndim)[..., 0]
        return (1.5 * taken.sum(-1) + 0.3).sin() + psi * taken.prod(-1) + 0.2 * direct.square()

    def truth(self, psi: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """E f `[B]` and the gradient of its sum, by listing the support."""
        logits, psi = self.logits.clone().requires_grad_(), psi.clone().requires_grad_()
        index = coordinates(*[self.values] * self.logits.shape[1])
        log_p = logits if self.family is not Bernoulli else torch.stack((torch.zeros_like(logits), logits), -1)
        log_p = log_p.log_softmax(-1)  # [B, D, C]
        weight = torch.stack([log_p[:, torch.arange(index.shape[1]), row].sum(-1) for row in index]).exp()
        fx = self.f(self.point(index).unsqueeze(1), psi, logits)
        value = (weight * fx).sum(0)
        return value.detach(), torch.autograd.grad(value.sum(), (logits, psi))

    def point(self, index: Tensor) -> Tensor:
        if self.family is OneHotCategorical:
            return one_hot(index, self.values).double()
        return index.double() if self.family is Bernoulli else index


def problem(family: type, sites: int, values: int = 3, seed: int = 0, joined: bool = True) -> Problem:
    shape = (2, sites) if family is Bernoulli else (2, sites, values)
    generator = torch.Generator().manual_seed(seed)
    return Problem(family, 1.2 * torch.randn(shape, generator=generator, dtype=torch.float64), joined)


PSI = torch.tensor([0.7, -0.4], dtype=torch.float64)


def expected(given: Problem, weight: Tensor, estimate: Callable[[Distribution, Callable[[Tensor], Tensor]], Tensor]):
    """Expectation of value and of gradients over all tuples, whose weight is `[T, B]`."""
    tuples = len(weight)
    logits = given.logits.expand(tuples, *given.logits.shape).clone().requires_grad_()
    psi = PSI.expand(tuples, 2).clone().requires_grad_()
    value = estimate(given.distribution(logits), lambda x: given.f(x, psi, logits))
    assert value.shape == weight.shape
    gradients = torch.autograd.grad(value.sum(), (logits, psi))
    mean = [(weight.reshape(weight.shape + (1,) * (g.ndim - 2)) * g).sum(0) for g in gradients]
    return (weight * value).sum(0), mean


def check_exact(given: Problem, weight: Tensor, estimate, tolerance: float = 1e-10) -> None:
    value, gradients = expected(given, weight, estimate)
    truth, true_gradients = given.truth(PSI)
    assert (weight.sum(0) - 1).abs().max() < tolerance
    assert (value - truth).abs().max() < tolerance
    for ours, true in zip(gradients, true_gradients, strict=True):
        assert (ours - true).abs().max() < tolerance, (ours - true).abs().max()


@dataclass(frozen=True)
class Axis:
    """One source of randomness: what it can be, `[c, B, *shape]`, and how likely each is, `[c, B]`."""

    values: Tensor
    weight: Tensor


def cells(breaks: Tensor) -> Axis:
    """A uniform, cut at breaks `[b, B]`: the middle of each cell and its width."""
    edges = torch.cat((torch.zeros_like(breaks[:1]), breaks.sort(0).values, torch.ones_like(breaks[:1])))
    return Axis((edges[1:] + edges[:-1]) / 2, edges.diff(dim=0))


def orders(n: int) -> Axis:
    """n uniforms of which only the order matters."""
    u = (torch.tensor(list(permutations(range(n))), dtype=torch.float64) + 0.5) / n
    return Axis(u.unsqueeze(1).expand(-1, 2, n), torch.full((len(u), 2), 1 / len(u), dtype=torch.float64))


def product(axes: list[Axis]) -> tuple[list[Tensor], Tensor]:
    """Every combination: what each axis shows `[T, B, *shape]`, and the weight `[T, B]`."""
    choice = coordinates(*[len(axis.values) for axis in axes]).T
    weight = torch.stack([axis.weight[c] for axis, c in zip(axes, choice, strict=True)]).prod(0)
    return [axis.values[c] for axis, c in zip(axes, choice, strict=True)], weight


class Script:
    """Stands in for `uniform`: gives out what was prepared, in order, and checks that it was asked for that."""

    def __init__(self, *prepared: Tensor):
        self.prepared = list(prepared)

    def __call__(self, shape, like):
        values = self.prepared.pop(0)
        assert tuple(values.shape) == tuple(shape)
        return values
